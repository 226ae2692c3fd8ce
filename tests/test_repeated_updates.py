"""`update_` remembers which tensors have passed its checks, and sees all that has changed since."""

import dataclasses
import weakref

import pytest
import torch

import diffopt
from diffopt._rule import leafwise, prints

N = 10


class Run:
    """The arguments of `update_`, which has taken three steps."""

    def __init__(self, name, kind=list):
        generator = torch.Generator().manual_seed(0)
        draws = [[torch.randn(2, 3, generator=generator) for _ in range(N)] for _ in range(2)]
        names = range(N) if kind is dict else None
        self.params, self.grads = (dict(zip(names, x, strict=True)) if names else x for x in draws)
        self.opt = getattr(diffopt, name)()
        self.state = self.opt.init(self.params)
        self.hparams = self.opt.hparams(lr=0.1)
        for _ in range(3):
            self.step()

    def step(self):
        self.opt.update_(self.params, self.grads, self.state, self.hparams)

    def field(self):
        return next(x for x in self.state[:0:-1] if x != ())


def data(run, i, value):
    run.params[i].data = value


CHANGES = {
    "nothing": lambda r: None,
    "numbers": lambda r: setattr(r, "hparams", r.opt.hparams(lr=0.3)),
    "a rate in a tensor": lambda r: setattr(r, "hparams", r.opt.hparams(lr=torch.tensor(0.3))),
    "rates of the parts": lambda r: setattr(r, "hparams", r.opt.hparams(lr=[0.1] * 9 + [0.2])),
    "a missing gradient": lambda r: r.grads.__setitem__(3, None),
    "a gradient of another shape": lambda r: r.grads.__setitem__(3, torch.zeros(3, 2)),
    "a gradient that requires one": lambda r: r.grads[3].requires_grad_(),
    "a gradient that is a list": lambda r: r.grads.__setitem__(3, [r.grads[3]]),
    "a gradient of another dtype": lambda r: r.grads.__setitem__(3, torch.zeros(2, 3).double()),
    "gradients of other strides": lambda r: r.grads.__setitem__(3, torch.ones(3, 2).t()),
    "a gradient that is not a tensor": lambda r: r.grads.__setitem__(3, 1.0),
    "a sparse gradient": lambda r: r.grads.__setitem__(3, torch.ones(2, 3).to_sparse()),
    "a gradient in a parameter": lambda r: r.grads.__setitem__(3, r.params[2]),
    "a gradient that is its parameter": lambda r: r.grads.__setitem__(3, r.params[3]),
    "a gradient in the state": lambda r: r.grads.__setitem__(3, r.field()[4]),
    "too few gradients": lambda r: r.grads.pop(),
    "a parameter of another shape": lambda r: data(r, 3, torch.ones(3, 2)),
    "a parameter of another dtype": lambda r: data(r, 3, torch.ones(2, 3).double()),
    "a parameter elsewhere": lambda r: data(r, 3, torch.ones(2, 3)),
    "a parameter in another": lambda r: data(r, 3, r.params[2].data),
    "a parameter twice": lambda r: r.params.__setitem__(3, r.params[2]),
    "parameters that require gradients": lambda r: [p.requires_grad_() for p in r.params],
    "other objects": lambda r: setattr(r, "params", [p.detach() for p in r.params]),
    "a parameter that is expanded": lambda r: data(r, 3, torch.ones(3).expand(2, 3)),
    "a buffer in a parameter": lambda r: r.field().__setitem__(3, r.params[2]),
    "a buffer of another dtype": lambda r: r.field().__setitem__(3, torch.ones(2, 3).bfloat16()),
    "a buffer of integers": lambda r: r.field().__setitem__(3, torch.ones(2, 3).long()),
    "a coarse count": lambda r: setattr(r, "state", r.state._replace(step=torch.ones(()).half())),
    "one number of the state": lambda r: getattr(r.state, "mu_product", r.params)[3].mul_(0.5),
    "a count of two": lambda r: setattr(r, "state", r.state._replace(step=torch.ones(2))),
    "another state": lambda r: setattr(r, "state", tuple(r.state)),
    "a state without a field": lambda r: setattr(r, "state", r.state._replace(**absent(r))),
    "a buffer elsewhere": lambda r: r.field().__setitem__(3, torch.ones(2, 3)),
    "buffers in one vector": lambda r: r.field().__setitem__(slice(N), vector(N)),
    "others": lambda r: setattr(r, "params", [torch.ones(2, 3) for _ in range(N)]),
}


def vector(n):
    return torch.ones(n, 2, 3).unbind()


def absent(run):
    return {run.opt.State._fields[-1 if run.state[-1] != () else -2]: ()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd", "nadam", "adafactor"])
def test_what_has_passed_the_checks_is_checked_again_where_it_has_changed(name, change):
    ends = []
    for forgetful in (False, True):
        run = Run(name)
        assert any(prints._PASSED.values())
        CHANGES[change](run)
        if forgetful:
            prints._PASSED.clear()
        try:
            run.step()
        except Exception as error:
            ends.append((type(error), str(error)))
        else:
            ends.append((run.params, run.state))
    if isinstance(ends[0][0], type) or isinstance(ends[1][0], type):
        assert ends[0] == ends[1]
    else:
        torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_small_trees_are_remembered_too(n):
    prints._PASSED.clear()
    opt, params = diffopt.adam(), [torch.ones(2) for _ in range(n)]
    state, hp = opt.init(params), opt.hparams(lr=0.1)
    for _ in range(3):
        opt.update_(params, [torch.ones(2) for _ in range(n)], state, hp)
    assert any(prints._PASSED.values())
    with pytest.raises(ValueError, match="shape"):
        opt.update_(params, [torch.ones(3) for _ in range(n)], state, hp)


def test_a_parameter_at_two_distant_paths_is_refused():
    params, grads = ([torch.ones(2) for _ in range(250)] for _ in range(2))
    opt = diffopt.sgd()
    state, hparams = opt.init(params), opt.hparams(lr=0.1)
    for _ in range(3):
        opt.update_(params, grads, state, hparams)
    params[200] = params[50]
    with pytest.raises(ValueError, match=r"params\[200\] and params\[50\] are the same tensor"):
        opt.update_(params, grads, state, hparams)


def test_a_gradient_that_requires_one_is_taken_only_where_none_is_recorded():
    run = Run("adam")
    for grad in run.grads:
        grad.requires_grad_()
    for _ in range(3):
        with torch.no_grad():
            run.step()
        with pytest.raises(ValueError, match=r"grads\[0\] requires a gradient"):
            run.step()


def replaced(tensors):
    tensors[4] = tensors[4].clone()


def given_a_storage(tensors):
    tensors[0].data = torch.from_numpy(tensors[0].numpy())


@pytest.mark.parametrize("change", [replaced, given_a_storage])
@pytest.mark.parametrize("name", ["rmsprop", "nadam"])
def test_buffers_that_were_one_vector_are_updated_where_they_are_now(name, change):
    """How tensors are concatenated is remembered as well."""
    run, twin = Run(name), Run(name)
    for r in (run, twin):
        r.field()[:] = vector(N)
    twin.opt = dataclasses.replace(twin.opt, execution="leaf")
    for t in range(6):
        for r in (run, twin):
            if t == 3:
                change(r.field())
            r.step()
    torch.testing.assert_close((run.params, run.state), (twin.params, twin.state))


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("name", ["adam", "nadam", "asgd", "muon", "rprop"])
def test_repeated_updates_equal_those_of_the_rule(name, kind):
    run, twin = Run(name, kind), Run(name, kind)
    twin.opt = dataclasses.replace(twin.opt, execution="leaf")
    for r in (run, twin):
        for _ in range(3):
            r.step()
    torch.testing.assert_close((run.params, run.state), (twin.params, twin.state))


def test_buffers_of_different_kinds_are_made_one_by_one():
    kinds = [torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(3, 2).t()]
    params = [x.clone() for x in kinds * 8]
    state = diffopt.adam().init(params)
    assert [x.stride() for x in state.exp_avg] == [p.stride() for p in params]
    assert [x.dtype for x in state.exp_avg] == [p.dtype for p in params]


def test_checks_are_not_repeated(monkeypatch):
    run = Run("adam")
    monkeypatch.setattr(leafwise, "gather", lambda *_: pytest.fail("all is checked again"))
    run.step()
    run.hparams = run.opt.hparams(lr=0.2)
    run.step()


def test_an_inference_tensor_is_refused_where_it_cannot_be_written():
    with torch.inference_mode():
        run = Run("adam")
        run.step()
    with pytest.raises(ValueError, match=r"params\[0\] is an inference tensor"):
        run.step()


def test_what_has_passed_is_not_kept_alive():
    run = Run("adam")
    seen = [weakref.ref(x) for x in (run.params[0], run.grads[0], run.field()[0])]
    del run
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("make", [diffopt.sgd, diffopt.adam])
def test_the_graph_of_a_loop_has_no_more_nodes_than_that_of_the_steps_themselves(make):
    """One alias for each of the initial params, which may depend on one another, and no more."""
    opt, start = make(), torch.tensor([1.0, 2.0], requires_grad=True)
    hp = opt.hparams(lr=0.1)

    def nodes(result, name):
        found, left = set(), [result.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in found:
                found.add(node)
                left += [child for child, _ in node.next_functions]
        return sum(node.name() == name for node in found)

    sol = diffopt.minimize(lambda w: (w**3).sum(), start, optimizer=opt, hparams=hp, steps=4)
    assert nodes(sol.params, "ViewBackward0") == 1
    assert nodes(sol.params, "SqrtBackward0") == (4 if make is diffopt.adam else 0)


def test_gradients_are_partial_in_every_step_where_params_and_arguments_depend_on_each_other():
    opt = diffopt.sgd()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def loss(params, scale):
        return (params["a"] ** 2 * params["b"] * scale).sum()

    def outcome(start, loop):
        params = {"a": start, "b": 2 * start}
        if loop:
            hp = opt.hparams(lr=lr)
            arguments = loss, params, start**2
            return diffopt.minimize(*arguments, optimizer=opt, hparams=hp, steps=3).params
        for _ in range(3):
            a, b = params["a"], params["b"]
            scale = start**2
            params = {"a": a - lr * 2 * a * b * scale, "b": b - lr * a**2 * scale}
        return params

    start = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    found = []
    for loop in (True, False):
        end = outcome(start, loop)
        first = torch.autograd.grad((end["a"] * end["b"]).sum(), (start, lr), create_graph=True)
        found.append((*first, *torch.autograd.grad(first[0].sum() + first[1], (start, lr))))
    torch.testing.assert_close(*found)
