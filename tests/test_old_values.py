"""What keeps an old value, as the param before this step, keeps it in place too."""

from typing import Any, NamedTuple

import pytest
import torch

import diffopt
from diffopt.rules import Hyperparameter, hparams, leafwise, number, zeros_like

t = diffopt.transforms
START = {"a": torch.linspace(-1, 1, 9).view(3, 3), "b": torch.linspace(1, 2, 3)}


class Kept(NamedTuple):
    step: Any
    m: Any
    n: Any


@hparams
class Rate:
    lr: Hyperparameter = number(default=0.1, ge=0)


def begin(p: Any, step: Any):
    return Kept(step, zeros_like(p), zeros_like(p))


RULES = {
    "param": lambda p, g, s, hp, c: (p - hp.lr * g + 0.5 * (p - s.m), Kept(s.step, p, s.m)),
    "buffer": lambda p, g, s, hp, c: (p - hp.lr * (s.n + g), Kept(s.step, s.n + 1, s.m)),
    "exchanged": lambda p, g, s, hp, c: (s.m - hp.lr * g, Kept(s.step, p, g)),
    "new param": lambda p, g, s, hp, c: (p - hp.lr * g, Kept(s.step, p - s.m, s.m)),
    "twice": lambda p, g, s, hp, c: (lambda q: (q, Kept(s.step, q, q)))(p - hp.lr * g + s.m),
    "view": lambda p, g, s, hp, c: (p - hp.lr * (g + s.m), Kept(s.step, p[...], s.m.detach())),
    "transpose": lambda p, g, s, hp, c: (
        (p - hp.lr * g, Kept(s.step, p.flip(0), s.m.mT)) if p.dim() == 2 else (p, s)
    ),
}


class KeepsParams(t.Wrapper):
    def init(self, params):
        return {name: torch.zeros_like(p) for name, p in params.items()}, self.optimizer.init(
            params
        )

    def update(self, params, grads, state, hparams):
        old, inner = state
        new, inner = self.optimizer.update(params, grads, inner, hparams)
        return {k: p + 0.5 * (params[k] - old[k]) for k, p in new.items()}, (dict(params), inner)


class SeesParams(t.Transformation):
    hparams = tuple

    def init(self, params):
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def apply(self, grads, params, state, hparams):
        return {k: g + 0.5 * (params[k] - state[k]) for k, g in grads.items()}, dict(params)


COMPOSITIONS = {
    "wrapper": lambda: KeepsParams(diffopt.sgd(momentum=True)),
    "transformation": lambda: t.chain(SeesParams(), diffopt.adam()),
    "both": lambda: t.accumulate(t.chain(SeesParams(), KeepsParams(diffopt.sgd())), 1),
}


def gradients(step):
    return {name: torch.cos(p + step) for name, p in START.items()}


def by_hand(rule):
    hp, params = Rate(lr=0.05), {}
    for name, start in START.items():
        p, s = start.clone(), begin(start, 0)
        for step in range(3):
            p, s = rule(p, gradients(step)[name], s._replace(step=step + 1), hp, None)
            p, s = p.clone(), Kept(s.step, s.m.clone(), s.n.clone())
        params[name] = p
    return params


def in_place(opt):
    params = {name: p.clone() for name, p in START.items()}
    state, hp = opt.init(params), opt.hparams(lr=0.05)
    for step in range(3):
        opt.update_(params, gradients(step), state, hp)
    return params


def out_of_place(opt):
    params, state, hp = START, opt.init(START), opt.hparams(lr=0.05)
    for step in range(3):
        params, state = opt.update(params, gradients(step), state, hp)
    return params


def both_by_turns(opt):
    params, state, hp = START, opt.init(START), opt.hparams(lr=0.05)
    params, state = opt.update(params, gradients(0), state, hp)
    opt.update_(params, gradients(1), state, hp)
    return opt.update(params, gradients(2), state, hp)[0]


def by_class(opt):
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    stateful = diffopt.optim.from_pure(opt, params, lr=0.05)
    for step in range(3):
        for name, grad in gradients(step).items():
            params[name].grad = grad
        stateful.step()
    return diffopt.detach(params)


CASES = [
    (name, execution, elementwise)
    for name in RULES
    for execution in ("auto", "foreach")
    for elementwise in (False, True)
    if name not in ("view", "transpose") or (execution == "auto" and not elementwise)
]


@pytest.mark.parametrize(("name", "execution", "elementwise"), CASES)
def test_old_values_in_the_state_of_a_rule_are_kept(name, execution, elementwise):
    opt = leafwise(Kept, Rate, begin, RULES[name], execution=execution, elementwise=elementwise)
    before = {k: p.clone() for k, p in START.items()}
    expected = by_hand(RULES[name])
    with torch.no_grad():
        for run in (out_of_place, in_place, both_by_turns, by_class):
            torch.testing.assert_close(run(opt), expected, msg=run.__name__)
    torch.testing.assert_close(START, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_old_values_in_the_state_of_a_composition_are_kept(name):
    opt = COMPOSITIONS[name]()
    expected = out_of_place(opt)
    for run in (in_place, by_class):
        torch.testing.assert_close(run(opt), expected, msg=run.__name__)


def test_old_values_are_kept_in_a_compiled_update():
    opt = KeepsParams(leafwise(Kept, Rate, begin, RULES["exchanged"]))
    params = {name: p.clone() for name, p in START.items()}
    state, hp = opt.init(params), opt.hparams(lr=0.05)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step_(params, grads, state):
        opt.update_(params, grads, state, hp)

    for step in range(3):
        step_(params, gradients(step), state)
    torch.testing.assert_close(params, out_of_place(opt))
