"""A TensorList computes what its tensors would, one by one."""

import pytest
import torch

from diffopt._rule import ops
from diffopt._rule.tensorlist import TensorList

XS = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]]), torch.empty(0)]
YS = [torch.tensor([0.5, 4.0]), torch.tensor([[-1.0]]), torch.empty(0)]
SCALAR = torch.tensor(0.3, dtype=torch.float64)

EXPRESSIONS = {
    "arithmetic": lambda x, y: -(2 * x + y * 3 - x / y) * (1 - x) + (x - 0.5) / 2,
    "0-d tensors": lambda x, y: (SCALAR * x + y - SCALAR) / SCALAR,
    "methods": lambda x, y: x.sign() * y.abs().clamp_min(0.7),
    "functions": lambda x, y: torch.where(x > y, torch.sign(x), y) + torch.exp(x),
    "kernels": lambda x, y: torch.add(x, y, alpha=2) + torch.lerp(x, y, 0.5) + torch.maximum(x, y),
    "kernels and tensors": lambda x, y: torch.lerp(x, y, y) + torch.add(x, SCALAR),
    "operators": lambda x, y: abs(x) ** 2 + 2**y + 1 / x,
    "comparisons": lambda x, y: (x >= 1) & (y < 2) | (x == y),
    "add": lambda x, y: ops.add(x, y, 0.5) + ops.add(x, y, SCALAR) + ops.add(x, y, 0),
    "lerp": lambda x, y: ops.lerp(x, y, 0.2) + ops.lerp(x, y, SCALAR),
    "addcmul": lambda x, y: ops.addcmul(x, y, y, 0.2) + ops.addcmul(x, y, y, SCALAR),
    "addcdiv": lambda x, y: ops.addcdiv(x, y, y, 0.2) + ops.addcdiv(x, y, y, SCALAR),
    "roots": lambda x, y: ops.sqrt(ops.maximum(x, y)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_equals_its_tensors(name):
    expression = EXPRESSIONS[name]
    result = expression(TensorList(XS), TensorList(YS))
    assert isinstance(result, TensorList)
    torch.testing.assert_close(
        list(result), [expression(x, y) for x, y in zip(XS, YS, strict=True)]
    )


def test_what_a_list_of_tensors_does_not_have():
    with pytest.raises(AttributeError, match="a TensorList has no shape"):
        _ = TensorList(XS).shape
    with pytest.raises(AttributeError, match="no_such_method"):
        TensorList(XS).no_such_method()
