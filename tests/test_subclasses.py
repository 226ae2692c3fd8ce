"""A subclass of an optimizer that overrides one method does so in every way of taking a step."""

import functools
from typing import Any

import pytest
import torch

import diffopt

t = diffopt.transforms
START = {"a": torch.linspace(-1, 1, 70_000), "b": torch.ones(3)}  # one in pieces, one whole


class Bounded:
    """Steps by the hyperbolic tangent of the gradient."""

    def rule(self, p: Any, g: Any, s: Any, hp: Any, c: Any):
        return p - torch.tanh(hp.lr * g), s


class Normed(diffopt.sgd):
    """Steps of the length of the learning rate: elements of a tensor are not apart."""

    def rule(self, p: Any, g: Any, s: Any, hp: Any, c: Any):
        return p - hp.lr * g / g.norm(), s


class Bent(diffopt.adam):
    """Overrides what the rule calls."""

    def scalars(self, t: Any, hp: Any):
        return (-0.5, *super().scalars(t, hp)[1:])


def bent(self: Any, t: Any, hp: Any):
    return (-0.5, *diffopt.adam.scalars(self, t, hp)[1:])


def bounded(p: Any, g: Any, s: Any, hp: Any, c: Any):
    return p - torch.tanh(hp.lr * g), s


SUBCLASSES = {
    "rule": type("BoundedSGD", (diffopt.sgd,), {"rule": Bounded.rule}),
    "mixture": type("MixedAdam", (Bounded, diffopt.adam), {}),
    "norm": Normed,
    "of a subclass": type("Again", (Normed,), {}),
    "scalars": Bent,
    "cached": type("Cached", (diffopt.adam,), {"scalars": functools.lru_cache(bent)}),
    "static": type("Static", (diffopt.sgd,), {"rule": staticmethod(bounded)}),
    "adagrad": type("BoundedAdagrad", (diffopt.adagrad,), {"rule": Bounded.rule}),
    "muon": type("PlainMuon", (diffopt.muon,), {"rule": Bounded.rule}),
}


def trained(params):
    return {name: p.clone().requires_grad_() for name, p in params.items()}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_what_a_subclass_overrides_holds_in_every_way(name):
    start = {"a": torch.ones(260, 270)} if name == "muon" else START
    opt, grads = SUBCLASSES[name](), {k: p.cos() for k, p in start.items()}
    hp, state = opt.hparams(lr=0.1), opt.init(start)
    expected = type(opt)(execution="leaf").update(start, grads, state, hp)[0]

    with torch.no_grad():
        torch.testing.assert_close(opt.update(start, grads, state, hp)[0], expected)
    params = {k: p.clone() for k, p in start.items()}
    opt.update_(params, grads, opt.init(params), hp)
    torch.testing.assert_close(params, expected)

    params = trained(start)
    stateful = diffopt.optim.from_pure(opt, params.values(), lr=0.1)
    for k, p in params.items():
        p.grad = grads[k]
    stateful.step()
    torch.testing.assert_close(params, expected)

    params = trained(start)
    sol = diffopt.minimize(
        lambda p: sum(x.sin().sum() for x in p.values()), params, optimizer=opt, hparams=hp, steps=1
    )
    torch.testing.assert_close(sol.params, expected)


def doubled(self, params, grads, state, hparams):
    new, state = super(type(self), self).update(params, grads, state, hparams)
    return {name: 2 * p for name, p in new.items()}, state


DOUBLED = {
    "rule": lambda: type("Doubled", (diffopt.sgd,), {"update": doubled})(),
    "transform": lambda: type("Doubled", (t.ema,), {"update": doubled})(diffopt.sgd()),
    "within": lambda: t.precision(DOUBLED["rule"](), state_dtype=None),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_steps_in_place_are_those_of_an_update_that_is_overridden(name):
    opt, start = DOUBLED[name](), {"a": torch.ones(3)}
    hp = opt.hparams(lr=0.5)
    params, _ = opt.update(start, start, opt.init(start), hp)
    torch.testing.assert_close(params, {"a": torch.ones(3)})
    given = {"a": torch.ones(3)}
    opt.update_(given, start, opt.init(start), hp)
    torch.testing.assert_close(given, params)
    trained_ = trained(start)
    stateful = diffopt.optim.from_pure(opt, trained_, lr=0.5)
    trained_["a"].grad = torch.ones(3)
    stateful.step()
    torch.testing.assert_close(trained_, params)
    sol = diffopt.minimize(
        lambda p: p["a"].sum(), trained(start), optimizer=opt, hparams=hp, steps=1
    )
    torch.testing.assert_close(sol.params, params)


def test_steps_in_place_may_come_from_a_mixture():
    taken = []

    class Noted:
        def prepare_(self, *args: Any) -> Any:
            taken.append(True)
            return super().prepare_(*args)

    opt, p = type("NotedEMA", (Noted, t.ema), {})(diffopt.sgd()), torch.ones(3)
    opt.update_(p, p.clone(), opt.init(p), opt.hparams(lr=0.5))
    assert taken == [True]


class Halving:
    """A mixture for torch.optim classes."""

    def step(self, closure: Any = None):
        result = super().step(closure)
        for group in self.param_groups:
            torch._foreach_mul_([p.data for p in group["params"]], 0.5)
        return result


@pytest.mark.parametrize("name", ["SGD", "Adam", "SparseAdam", "LBFGS", "from_pure", "chain"])
def test_a_step_that_is_overridden_is_refused_where_it_would_not_be_called(name):
    net = torch.nn.Linear(2, 1, bias=False)
    pure = {"from_pure": diffopt.adam(), "chain": t.chain(diffopt.adam())}.get(name)
    if pure is None:
        optimizer = type("Own", (Halving, getattr(diffopt.optim, name)), {})(net.parameters())
    else:
        optimizer = diffopt.optim.from_pure(pure, net.parameters())
        optimizer.__class__ = type("Own", (Halving, type(optimizer)), {})
    for convert in (diffopt.optim.to_pure, lambda o: diffopt.innerloop(net, o).__enter__()):
        with pytest.raises(TypeError, match="Own"):
            convert(optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Muon"])
def test_a_subclass_that_keeps_the_step_goes_on_as_its_class(name):
    net = torch.nn.Linear(2, 1, bias=False)
    base = getattr(diffopt.optim, name)
    own = type("Own", (base,), {"zero_grad": lambda self: base.zero_grad(self)})(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    own.step()
    expected = diffopt.optim.to_pure(base(net.parameters())).optimizer
    assert diffopt.optim.to_pure(own).optimizer == expected
