"""Step lengths that satisfy the strong Wolfe conditions (Nocedal and Wright, section 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

DECREASE = 1e-4  # c1 of Nocedal and Wright: the fraction of the predicted decrease required
CURVATURE = 0.9  # c2: the fraction of the initial slope that may remain


class Point(NamedTuple):
    """The loss at one step length along the line.

    Attributes:
        t: the step length, a number or a 0-d tensor.
        value: the loss there, a number.
        slope: its derivative along the line, a 0-d tensor on the CPU.
        grad: its gradient, which the search does not use.
    """

    t: Any
    value: float
    slope: Tensor
    grad: Tensor


def strong_wolfe(
    evaluate: Callable[[Any], Point],
    start: Point,
    t: Any,
    *,
    scale: Tensor,
    tolerance_change: float,
    max_ls: int,
) -> Point:
    """A point of sufficient decrease and small slope, or the lowest found (algorithm 3.5).

    The conventions are those of minFunc and torch: an interval without an acceptable point is
    followed by one that is up to ten times as long.

    Args:
        evaluate: the point at a step length.
        start: the point at length 0.
        t: the first length to try.
        scale: the largest magnitude among the entries of the direction.
        tolerance_change: an interval across which no entry changes by this much is not refined.
        max_ls: how many lengths are tried after the first.
    """

    def too_high(point: Point) -> bool:
        return bool(point.value > start.value + DECREASE * point.t * start.slope)

    def flat(point: Point) -> bool:
        return bool(point.slope.abs() <= -CURVATURE * start.slope)

    def zoom(ends: list[Point], trials: int) -> Point:
        """Shrink an interval that contains an acceptable point (algorithm 3.6)."""
        low, stalled = _lower(ends), False
        for _ in range(trials):
            left, right = min(end.t for end in ends), max(end.t for end in ends)
            if left == right or (right - left) * scale < tolerance_change:  # scale may be inf
                break
            t, stalled = _trial(ends, left, right, stalled=stalled)
            point = evaluate(t)
            if too_high(point) or point.value >= ends[low].value:
                ends[1 - low] = point
                low = _lower(ends)
                continue
            if flat(point):
                return point
            if point.slope * (ends[1 - low].t - ends[low].t) >= 0:
                ends[1 - low] = ends[low]
            ends[low] = point
        return ends[low]

    if t == 0:
        return start
    previous, point = start, evaluate(t)
    for i in range(max_ls):
        if too_high(point) or (i > 1 and point.value >= previous.value):
            return zoom([previous, point], max_ls - i)
        if flat(point):
            return point
        if point.slope >= 0:
            return zoom([previous, point], max_ls - i)
        least, most = point.t + 0.01 * (point.t - previous.t), 10 * point.t
        t = cubic_minimizer(previous, point, least, most)
        previous, point = point, evaluate(t)
    ends = [start, point]
    return ends[_lower(ends)]


def _trial(ends: list[Point], left: Any, right: Any, *, stalled: bool) -> tuple[Any, bool]:
    """A length in an interval, and whether it is near an end, as it may be only once in a row."""
    t = cubic_minimizer(ends[0], ends[1], left, right)
    margin = 0.1 * (right - left)
    if min(right - t, t - left) >= margin:
        return t, False
    if left < t < right and not stalled:
        return t, True
    return right - margin if abs(t - right) < abs(t - left) else left + margin, False


def cubic_minimizer(a: Point, b: Point, least: Any, most: Any) -> Any:
    """The minimizer of the cubic through two points, within bounds (Nocedal and Wright, 3.59)."""
    if a.t > b.t:
        a, b = b, a
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    discriminant = d1 * d1 - a.slope * b.slope
    if not discriminant >= 0:
        return (least + most) / 2
    d2 = discriminant.sqrt()
    t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2))
    return min(max(t, least), most)


def _lower(ends: list[Point]) -> int:
    return 0 if ends[0].value <= ends[1].value else 1
