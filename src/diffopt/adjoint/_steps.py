"""Steps taken one after another, where what is the same for all of them is done once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from diffopt import _modes, _tree
from diffopt._diff.compiled import CompiledStep
from diffopt._diff.gradient import leaf_gradients
from diffopt._diff.lacking import Explained
from diffopt._rule.repeated import Repeated
from diffopt._tree import Tree
from diffopt.adjoint._base import GradientStep, Step, all_done, within


class Steps:
    """A loop: the carry after the steps that have been taken.

    Between steps of `minimize` the carry is kept as lists, if no transform of torch.func is active
    and the optimizer can update them.

    Attributes:
        ended: whether the last step has changed nothing, in any sample, because of `tol`.
    """

    def __init__(self, step: Step, carry: Tree, args: Tree) -> None:
        self._step, self._carry, self._args, self.ended = step, carry, args, False
        self._updates: Repeated | None = None
        self._gradient = _repeatable(step)

    def carry(self) -> Tree:
        """The carry now."""
        if self._updates is None:
            return self._carry
        return *self._updates.trees(), self._carry[2]

    def take(self, x: Any) -> Any:
        """Take a step; returns its output."""
        if self._gradient is not None and _plain(self._gradient):
            return self._take(self._gradient, x)
        before = self._settled()
        self._carry, output = self._step(before, self._args, x)
        if isinstance(self._step, GradientStep) and self._step.tol is not None:
            self.ended = all_done(output)
            self._carry = before if self.ended else self._carry
        return output

    def _settled(self) -> Tree:
        self._carry, self._updates = self.carry(), None
        return self._carry

    def _take(self, step: GradientStep, x: Any) -> Any:
        (hparams, inputs), (own, batch) = self._args, x
        hparams = hparams if own is None else own
        if self._updates is None:
            params, state, buffers = self._carry
            self._updates = step.optimizer.repeated(params, state, hparams)
            if self._updates is None:
                self._gradient = None
                return self.take(x)
            self._carry = None, None, buffers
        updates = self._updates
        value, (buffers, aux), grads = _gradients(step, updates, (self._carry[2], inputs, batch))
        done = None if step.tol is None else within(grads, step.tol)
        self.ended = done is not None and bool(done)
        if self.ended:
            return value, aux, done
        self._carry = None, None, buffers
        if not updates.update(grads, hparams):
            params, state, _ = self._settled()
            grads = _tree.unflatten(grads, updates.spec)
            params, state = step.optimizer.update(params, grads, state, hparams)
            self._carry, self._gradient = (params, state, buffers), None
        return value, aux, done


def _gradients(step: GradientStep, updates: Repeated, inputs: Tree) -> tuple[Any, ...]:
    """The loss, its buffers and auxiliary outputs, and the gradients of the params' leaves."""
    create_graph = step.second_order and torch.is_grad_enabled()
    leaves, spec = updates.params, updates.spec
    with Explained():
        results = leaf_gradients(
            step.objective, leaves, spec, inputs, create_graph, apart=updates.apart
        )
    return results if step.second_order else _tree.detach(results)


def one_by_one(step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
    """The last carry and the outputs of the steps, taken one after another.

    The loop ends with the first step that changes nothing because of `tol`.
    """
    steps = Steps(step, carry, args)
    outputs: list[Any] = []
    for x in xs:
        outputs.append(steps.take(x))
        if steps.ended:
            break
    return steps.carry(), outputs


def taken(
    step: Step,
    carry: Tree,
    args: Tree,
    xs: Iterable[Any],
    eager: Callable[[Tree, Tree, Iterable[Any]], tuple[Tree, list[Any]]] | None = None,
) -> tuple[Tree, list[Any]]:
    """The last carry and the outputs of the steps.

    Compiled steps are run together if nothing else runs in between: no callback, no code of an
    iterator. Others are run by `eager`, which is `one_by_one` of the step by default.
    """
    eager = functools.partial(eager or functools.partial(one_by_one, step), carry, args, xs)
    kinds = GradientStep, CompiledStep
    if not isinstance(step, kinds) or type(step) not in kinds:  # a subclass has code of its own
        return eager()
    if step.compiler is None or not isinstance(xs, list) or len(xs) < 2:
        return eager()
    ends = isinstance(step, GradientStep) and step.tol is not None
    return step.compiler.loop(step.task(carry, args, xs[0]), step.elements(carry, xs), eager, ends)


def _repeatable(step: Step) -> GradientStep | None:
    """The step, if it is one of `minimize` as it is."""
    if not isinstance(step, GradientStep) or type(step) is not GradientStep or _modes.compiling():
        return None
    return None if step.compiler is not None or isinstance(step.used, list) else step


def _plain(step: GradientStep) -> bool:
    """Whether autograd takes the gradient of the loss."""
    forward = step.hvp == "forward-over-reverse" and torch.is_grad_enabled()
    return not (forward or _modes.observed() or _modes.forward_differentiated())
