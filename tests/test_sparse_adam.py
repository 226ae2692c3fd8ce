"""SparseAdam: sparse gradients beside torch.optim.SparseAdam, their derivatives, and errors."""

import pytest
import torch
from torch.nn import functional as F

import diffopt

NUMBERS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
INDICES = [torch.tensor([[0, 3, 3]]), torch.tensor([[1, 0, 3]]), torch.tensor([[3, 2, 1]])]


def table(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, dtype=torch.float64, generator=generator)


def sparse(indices, values, like):
    return torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=True)


def gradients(params, seed=1):
    """Three uncoalesced gradients, with a zero among their values."""
    generator = torch.Generator().manual_seed(seed)
    for indices in INDICES:
        shape = (indices.shape[1], *params.shape[1:])
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        values[0, 0] = 0
        yield sparse(indices, values, params)


def steps(opt, params, hparams, grads):
    state = opt.init(params)
    for g in grads:
        params, state = opt.update(params, g, state, hparams)
    return params, state


def steps_of_torch(params, grads, beta1, beta2, **numbers):
    params = torch.nn.Parameter(params.clone())
    optimizer = torch.optim.SparseAdam([params], betas=(beta1, beta2), **numbers)
    for params.grad in grads:
        optimizer.step()
    return params.detach(), optimizer.state[params]


@pytest.mark.parametrize("maximize", [False, True])
def test_the_rule_equals_torchs(maximize):
    opt = diffopt.sparse_adam(maximize=maximize)
    params, state = steps(opt, table(), opt.hparams(**NUMBERS), gradients(table()))
    expected, theirs = steps_of_torch(table(), gradients(table()), maximize=maximize, **NUMBERS)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=0)
    assert state.step == theirs["step"] == 3
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(state, name), theirs[name], rtol=1e-12, atol=0)


def test_gradients_of_an_embedding_are_taken():
    words = torch.tensor([0, 3, 3, 1])
    embedding = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    (grad,) = torch.autograd.grad(embedding(words).pow(3).sum(), embedding.weight)
    opt = diffopt.sparse_adam()
    weight = embedding.weight.detach()
    params, _ = steps(opt, weight, opt.hparams(**NUMBERS), [grad, grad])
    expected, _ = steps_of_torch(weight, [grad, grad], **NUMBERS)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sparse_dim", [0, 1, 2])
def test_any_number_of_sparse_dimensions_is_taken(sparse_dim):
    params = torch.ones((2, 3)[: max(sparse_dim, 1)] if sparse_dim else (), dtype=torch.float64)
    dense = torch.arange(params.numel(), dtype=torch.float64).reshape(params.shape) + 1
    dense = torch.where(dense == 2, 0, dense)
    grads = [dense.to_sparse(sparse_dim) if sparse_dim else dense.to_sparse()] * 2
    opt = diffopt.sparse_adam()
    hp = opt.hparams(**NUMBERS)
    new, _ = steps(opt, params, hp, grads)
    expected, _ = steps_of_torch(params, grads, **NUMBERS)
    torch.testing.assert_close(new, expected, rtol=1e-12, atol=0)
    in_place, state = params.clone(), opt.init(params)
    for grad in grads:
        opt.update_(in_place, grad, state, hp)
    torch.testing.assert_close(in_place, expected, rtol=1e-12, atol=0)


def test_what_a_gradient_does_not_mention_stays_exactly_as_it_is():
    opt = diffopt.sparse_adam()
    first = next(gradients(table()))
    params, state = steps(opt, table(), opt.hparams(**NUMBERS), [first])
    row = torch.tensor([[2]]), torch.ones(1, 2, dtype=torch.float64)
    new_params, new_state = opt.update(params, sparse(*row, params), state, opt.hparams(**NUMBERS))
    for new, old in zip((new_params, *new_state[1:]), (params, *state[1:]), strict=True):
        assert torch.equal(new[[0, 1, 3, 4]], old[[0, 1, 3, 4]])
        assert not torch.equal(new[2], old[2])


def test_leaves_without_gradient_and_with_an_empty_one_are_the_same_tensors():
    opt = diffopt.sparse_adam()
    params = {"none": table(), "empty": table(), "some": table()}
    empty = sparse(torch.empty(1, 0, dtype=torch.long), torch.empty(0, 2).double(), table())
    grads = {"some": next(gradients(table())), "none": None, "empty": empty}
    state = opt.init(params)
    new_params, new_state = opt.update(params, grads, state, opt.hparams())
    for new, old in zip((new_params, *new_state[1:]), (params, *state[1:]), strict=True):
        assert new["none"] is old["none"]
        assert new["empty"] is old["empty"]
        assert not torch.equal(new["some"], old["some"])
    assert new_state.step == 1


def test_dictionaries_match_by_key():
    opt = diffopt.sparse_adam()
    params = {"a": table(), "b": table(5)}
    grads = {"a": next(gradients(table(), 2)), "b": next(gradients(table(), 3))}
    new, state = steps(opt, params, opt.hparams(**NUMBERS), [grads, grads])
    turned = opt.init({"b": params["b"], "a": params["a"]})
    other = params
    for _ in range(2):
        backwards = {"b": grads["b"], "a": grads["a"]}
        other, turned = opt.update(other, backwards, turned, opt.hparams(**NUMBERS))
    for key in params:
        assert torch.equal(new[key], other[key])
        assert torch.equal(state.exp_avg[key], turned.exp_avg[key])


def test_update_in_place_overwrites_what_is_mentioned():
    opt = diffopt.sparse_adam()
    hp = opt.hparams(**NUMBERS)
    params = {"a": table(), "b": table(5), "c": table()}
    grads = [{"a": g, "b": g, "c": None} for g in gradients(table())]
    expected = steps(opt, params, hp, grads)
    params = {key: value.clone() for key, value in params.items()}
    state, before = opt.init(params), dict(params)
    for g in grads:
        opt.update_(params, g, state, hp)
    torch.testing.assert_close((params, state), expected, rtol=0, atol=0)
    assert all(params[key] is before[key] for key in params)


def test_neither_arguments_nor_gradients_are_changed():
    opt = diffopt.sparse_adam()
    params = table()
    state, (grad, *_) = opt.init(params), gradients(params)
    copies = [x.clone() for x in (params, *state, grad._values(), grad._indices())]
    opt.update(params, grad, state, opt.hparams())
    assert all(map(torch.equal, copies, (params, *state, grad._values(), grad._indices())))
    assert not grad.is_coalesced()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_other_dtypes_are_updated_as_dense_ones_are(dtype):
    # A dense gradient as in `masked` that has no zero mentions everything.
    opt, masked = diffopt.sparse_adam(), diffopt.sparse_adam(masked=True)
    params, grad = table().to(dtype), table(7).to(dtype)
    if dtype.is_complex:
        grad = grad + 1j
    new, state = steps(opt, params, opt.hparams(**NUMBERS), [grad.to_sparse(1)] * 2)
    expected, theirs = steps(masked, params, opt.hparams(**NUMBERS), [grad] * 2)
    torch.testing.assert_close(new, expected, check_dtype=True)
    torch.testing.assert_close(state.exp_avg, theirs.exp_avg, check_dtype=True)


def test_hyperparameters_may_be_prefix_trees_and_per_weight():
    opt, masked = diffopt.sparse_adam(), diffopt.sparse_adam(masked=True)
    params = {"a": table(), "b": [table(5), table(6)]}
    generator = torch.Generator().manual_seed(3)
    rates = torch.rand(5, 2, dtype=torch.float64, generator=generator)
    dense = {"a": table(8), "b": [table(9), None]}
    dense["a"][1] = 0
    grads = {"a": dense["a"].to_sparse(1), "b": [dense["b"][0].to_sparse(2), None]}
    hp = opt.hparams(
        lr={"a": rates, "b": 0.1}, beta1={"a": 0.8, "b": [0.7, 0.9]}, beta2=rates[:1], eps=1e-3
    )
    new, state = steps(opt, params, hp, [grads, grads])
    expected, theirs = steps(masked, params, hp, [dense, dense])
    torch.testing.assert_close((new, state), (expected, theirs), rtol=1e-12, atol=0)


def as_function(of_values):
    """Params and state after three steps as a function of all that is differentiable."""
    opt = diffopt.sparse_adam()

    def function(params, m, v, lr, beta1, beta2, eps, *values):
        hp = opt.hparams(lr=lr, beta1=beta1, beta2=beta2, eps=eps)
        state = opt.init(params)._replace(exp_avg=m, exp_avg_sq=v)
        for indices, entries in zip(INDICES, values, strict=True):
            params, state = opt.update(params, of_values(indices, entries), state, hp)
        return params, *state[1:]

    numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.8, 0.9, 0.1)]
    values = [g._values().clone() for g in gradients(table())]
    inputs = [table(), table(3), table(4).square(), *numbers, *values]
    return function, [x.requires_grad_() for x in inputs]


def test_first_derivatives_equal_finite_differences():
    function, inputs = as_function(lambda i, v: torch.sparse_coo_tensor(i, v, (5, 2)))
    with torch.sparse.check_sparse_tensor_invariants():
        assert torch.autograd.gradcheck(function, inputs)


def test_second_derivatives_but_of_the_making_of_gradients_equal_finite_differences():
    constants = [g._values() for g in gradients(table())]
    function, inputs = as_function(lambda i, v: torch.sparse_coo_tensor(i, v, (5, 2)))

    def of_the_rest(*inputs):
        return function(*inputs, *constants)

    with torch.sparse.check_sparse_tensor_invariants():
        assert torch.autograd.gradgradcheck(of_the_rest, inputs[: -len(constants)])


def test_second_derivatives_by_a_sparse_leaf_equal_finite_differences():
    opt = diffopt.sparse_adam()
    indices, values = torch.tensor([[0, 3]]), table(2)[:2]
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    hp = opt.hparams(**{**NUMBERS, "lr": lr, "eps": 0.1})

    def slope(values, create_graph=False):
        """Of an objective, by the values of a sparse gradient."""
        grad = sparse(indices, values, table()).coalesce().requires_grad_()
        params, _ = steps(opt, table(), hp, [grad, grad])
        (found,) = torch.autograd.grad(params.pow(3).sum(), grad, create_graph=create_graph)
        return grad, found.coalesce().values()

    grad, first = slope(values, create_graph=True)
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    second, by_lr = torch.autograd.grad((weights * first).sum(), (grad, lr))
    direction = table(9)[:2]
    ahead, behind = (slope(values + h * direction)[1] for h in (1e-6, -1e-6))
    difference = (weights * (ahead - behind)).sum() / 2e-6
    torch.testing.assert_close(
        (second.coalesce().values() * direction).sum(), difference, rtol=1e-6, atol=0
    )
    assert by_lr != 0


def test_second_derivatives_that_torch_gets_wrong_raise():
    opt = diffopt.sparse_adam()
    values = next(gradients(table()))._values().requires_grad_()
    weight = table().requires_grad_()
    loss = F.embedding(torch.tensor([0, 3, 3]), weight, sparse=True).pow(3).sum()
    (of_embedding,) = torch.autograd.grad(loss, weight, create_graph=True)
    for grad, origin in ((sparse(INDICES[0], values, weight), values), (of_embedding, weight)):
        new, _ = opt.update(weight, grad, opt.init(weight), opt.hparams())
        with pytest.raises(RuntimeError, match=r"use sparse_adam\(masked=True\)"):
            torch.autograd.grad(new.pow(3).sum(), origin, create_graph=True)


def test_first_derivatives_of_torch_func_are_those_of_autograd():
    opt = diffopt.sparse_adam()
    values = next(gradients(table()))._values().clone()

    def objective(values, params):
        grad = torch.sparse_coo_tensor(INDICES[0], values, (5, 2), check_invariants=False)
        return opt.update(params, grad, opt.init(params), opt.hparams(**NUMBERS))[0].pow(3).sum()

    found = torch.func.grad(objective, argnums=(0, 1))(values, table())
    inputs = values.requires_grad_(), table().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(objective(*inputs), inputs))


def test_a_meta_gradient_through_the_gradient_of_an_embedding_is_that_of_a_dense_one():
    words = torch.tensor([0, 3, 3])

    def meta_gradient(opt, is_sparse):
        weight = table().requires_grad_()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        params, state = weight, opt.init(weight)
        for _ in range(2):
            loss = F.embedding(words, params, sparse=is_sparse).pow(3).sum()
            (grad,) = torch.autograd.grad(loss, params, create_graph=True)
            hp = opt.hparams(**{**NUMBERS, "lr": lr})
            params, state = opt.update(params, grad, state, hp)
        by_weight, by_lr = torch.autograd.grad(params.pow(2).sum(), (weight, lr))
        return by_weight.to_dense() if by_weight.is_sparse else by_weight, by_lr

    mine = meta_gradient(diffopt.sparse_adam(), is_sparse=True)
    expected = meta_gradient(diffopt.sparse_adam(masked=True), is_sparse=False)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_derivatives_are_finite_where_a_gradient_holds_zeros():
    opt = diffopt.sparse_adam()
    params = table().requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    grad = sparse(torch.tensor([[2]]), values, params)
    new, _ = steps(opt, params, opt.hparams(lr=lr), [grad, grad])
    found = torch.autograd.grad(new.square().sum(), (params, lr, values))
    assert all(f.isfinite().all() for f in found)


def test_wrong_gradients_are_refused_and_change_nothing():
    opt = diffopt.sparse_adam()
    params = {"a": table(), "b": [table()]}
    good = next(gradients(table()))
    state = opt.init(params)
    for grad, error, message in (
        (table(), ValueError, r"grads\['b'\]\[0\] has layout torch.strided, but must be sparse"),
        (table(), ValueError, r"sparse_adam\(masked=True\)"),
        (good.float(), ValueError, r"grads\['b'\]\[0\] has dtype torch.float32, but params\['b'\]"),
        (sparse(INDICES[0], torch.ones(3), torch.ones(6)), ValueError, r"shape \(6,\)"),
        (good.to("meta"), ValueError, "device meta"),
        (1.5, TypeError, r"grads\['b'\]\[0\] is 1.5"),
    ):
        grads = {"a": good, "b": [grad]}
        for call in (opt.update, opt.update_):
            with pytest.raises(error, match=message):
                call(params, grads, state, opt.hparams())
    with pytest.raises(ValueError, match=r"grads\['b'\] is missing"):
        opt.update_(params, {"a": good}, state, opt.hparams())
    with pytest.raises(TypeError, match="state has type tuple"):
        opt.update_(params, {"a": good, "b": [good]}, tuple(state), opt.hparams())
    with pytest.raises(ValueError, match=r"hparams.lr.* must be a prefix tree of params"):
        opt.update_(params, {"a": good, "b": [good]}, state, opt.hparams(lr={"c": 0.1}))
    asking = {"a": good.clone().requires_grad_(), "b": [good]}
    with pytest.raises(ValueError, match="requires a gradient"):
        opt.update_(params, asking, state, opt.hparams())
    assert torch.equal(params["a"], table())
    assert torch.equal(state.exp_avg["a"], torch.zeros_like(table()))
    assert state.step == 0
