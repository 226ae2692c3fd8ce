"""A TensorList computes what its tensors would, one by one."""

import dataclasses
import random

import pytest
import torch

import diffopt
from diffopt._rule import lists, ops
from diffopt._rule.tensorlist import Program, TensorList
from diffopt.rules import leafwise
from registry import REGISTRY

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


def test_scalars_on_either_side_of_every_operator():
    for expression in (
        lambda x: SCALAR + x,
        lambda x: SCALAR - x,
        lambda x: SCALAR * x,
        lambda x: SCALAR / x,
        lambda x: x - SCALAR,
        lambda x: torch.sub(x, SCALAR, alpha=3),
        lambda x: torch.div(x, 0.3, rounding_mode="floor"),
        lambda x: x.clamp(-1, 2) + x.clamp(max=1) + x.clamp(min=SCALAR),
        lambda x: torch.stack([x, x]).sum(0),
    ):
        expected = [expression(x) for x in XS]
        torch.testing.assert_close(list(expression(TensorList(XS))), expected)


# Programs


def columns():
    return [[torch.tensor([1.0, -2.0]) * k, torch.tensor([[3.0]]) + k] for k in (1, 2, 3)]


def agrees(function, *, into=True, elementwise=True):
    """The program of a function of three columns, after it was run and has given its result."""
    inputs = [TensorList(column) for column in columns()]
    outputs = list(function(*inputs))
    program = Program(inputs, outputs, into=into, elementwise=elementwise)
    found = columns()
    returned = program.run(found)
    for k, output in enumerate(outputs):
        expected = [function(*row)[k] for row in zip(*columns(), strict=True)]
        if output is not None:
            torch.testing.assert_close(found[k] if into else returned[k], expected)
    return program


CASES = {
    "in place": lambda p, g, m: (p * 2 + g, None, m * 3),
    "an old value needed later": lambda p, g, m: (p + m * 2, None, m + p * 3),
    "swapped": lambda p, g, m: (m, None, p),
    "one that was there": lambda p, g, m: (g, None, m),
    "one value twice": lambda p, g, m: (lambda x: (x, None, x))(p + g),
    "a step that is needed after the next": lambda p, g, m: (p * 2 * 3 + g, None, m + p * 2),
    "a way over another column": lambda p, g, m: (torch.maximum(m + 1, p), None, m + 1),
    "tensor by tensor": lambda p, g, m: (torch.where(p > 1, p, g).exp(), None, m.square() * p),
}


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_program_computes_what_was_noted(name, elementwise, into):
    agrees(CASES[name], into=into, elementwise=elementwise)


@pytest.mark.parametrize("seed", range(40))
def test_programs_of_random_operations(seed):
    choose = random.Random(seed)
    binary = (torch.add, torch.sub, torch.maximum, torch.mul, lambda x, y: torch.lerp(x, y, 0.3))
    unary = (torch.abs, torch.neg, torch.sign, lambda x: x * 2, lambda x: torch.where(x > 0, x, 1))
    steps = [
        (choose.choice(binary), choose.randrange(3 + k), choose.randrange(3 + k))
        if choose.random() < 0.6
        else (choose.choice(unary), choose.randrange(3 + k))
        for k in range(8)
    ]
    wanted = choose.sample(range(11), 2)

    def function(*inputs):
        values = list(inputs)
        for operation, *operands in steps:
            values.append(operation(*(values[i] for i in operands)))
        return values[wanted[0]], None, values[wanted[1]]

    agrees(function)
    agrees(function, into=False)


def test_results_overwrite_what_is_not_needed_any_more():
    program = agrees(lambda p, g, m: (p * 2 + g, None, m * 3))
    assert program.most == 0
    program = agrees(lambda p, g, m: (p - (g.abs() + 1) * m, None, m))
    assert program.most == 1
    assert not agrees(lambda p, g, m: (p.square(), None, m)).lean


def test_gradients_are_not_overwritten():
    given = columns()
    inputs = [TensorList(column) for column in given]
    p, g, m = inputs
    Program(inputs, [g * 2 - p, None, g + m], into=True, elementwise=True).run(given)
    assert torch.equal(given[1][0], columns()[1][0])


ROWS = [row for row, case in REGISTRY.items() if getattr(case.optimizer, "elementwise", False)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("row", ROWS)
def test_a_rule_run_in_limited_memory_is_the_rule(row, dtype, monkeypatch):
    monkeypatch.setattr(lists, "_LEAST", 32)
    case = REGISTRY[row]
    if dtype not in case.dtypes:
        pytest.skip("cannot update this dtype")
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype) for shape in [(5, 3), (2,), (), (0,), (4,), (17,)]]
    found = []
    for way in ("leaf", "foreach"):
        opt, new = dataclasses.replace(case.optimizer, execution=way), [x.clone() for x in params]
        state = opt.init(new)
        for k in range(3):
            opt.update_(new, [(x + k) / 2 for x in params], state, case.record())
        found.append((new, state))
    torch.testing.assert_close(*found, rtol=1e-5 if dtype != torch.bfloat16 else 0.02, atol=1e-6)


@pytest.mark.parametrize("way", ["leaf", "foreach"])
def test_a_rule_that_returns_the_wrong_shape_is_refused_before_anything_has_changed(way):
    opt = leafwise(
        diffopt.sgd().State,
        diffopt.sgd().hparams,
        lambda p, step: diffopt.sgd().State(step, ()),
        lambda p, g, s, hp, c: (torch.cat([p, g]), s),
        execution=way,
    )
    params, grads = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    with pytest.raises(ValueError, match=r"returned shape \(4,\) for a tensor of shape \(2,\)"):
        opt.update_(params, grads, opt.init(params), opt.hparams())


@pytest.mark.parametrize("values", [[4.0, 9.0], [4.0, 0.0], [0.0], [-1.0, 0.0, 4.0], []])
def test_the_square_root_has_right_derivatives_of_any_order_with_none_at_zero(values):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    known = x.detach()
    expected = [known.sqrt(), 0.5 * known**-0.5, -0.25 * known**-1.5, 0.375 * known**-2.5]
    derivative = ops.sqrt(x)
    for order, right in enumerate(expected):
        right = torch.where(known == 0, 0, right) if order else right
        torch.testing.assert_close(derivative.detach(), right, equal_nan=True)
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)


def test_where_all_is_positive_the_derivative_of_the_square_root_is_torchs_own():
    root = ops.sqrt(torch.ones(2, requires_grad=True))
    assert root.grad_fn.name() == "SqrtBackward0"
