"""Schedules against torch's schedulers, finite differences and themselves run in other ways."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck
from torch.optim import lr_scheduler

import diffopt
from diffopt import schedules
from diffopt.schedules import cosine, exponential, joined, linear, piecewise, warmup

LR, STEPS = 0.3, 14
EPOCHS = pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")


class Case(NamedTuple):
    """A schedule of numbers, of which `places` move kinks; and steps: generic ones and kinks."""

    make: Callable[..., schedules.Schedule]
    numbers: dict[str, float]
    generic: list[float]
    kinks: list[float] = []  # noqa: RUF012
    places: tuple[str, ...] = ()


def two_levels(low, high, at):
    return piecewise([low, high], [at])


def warmup_cosine(peak, warm, steps, final):
    return joined([warmup(peak, warm), cosine(peak, steps, final)], [warm])


def cycle(**kwargs):
    return lambda **numbers: schedules.one_cycle(**numbers, **kwargs)


LINE = {"init": 0.1, "final": 0.7, "steps": 5.0}
CYCLE = {"peak": 0.3, "steps": 10.0, "pct_start": 0.3, "div_factor": 5.0, "final_div_factor": 20.0}
CYCLE_PLACES = "steps", "pct_start"
CASES = {
    "constant": Case(schedules.constant, {"value": 0.3}, [0, 4]),
    "linear": Case(linear, LINE, [1, 3.5, 9], [0, 5], ("steps",)),
    "warmup": Case(warmup, {"peak": 0.3, "steps": 4.0}, [1, 3.5, 9], [0, 4], ("steps",)),
    "polynomial": Case(
        schedules.polynomial, {**LINE, "power": 2.5}, [0.5, 3, 9], [0, 5], ("steps",)
    ),
    "root": Case(schedules.polynomial, {**LINE, "power": 0.5}, [0.5, 3, 9], [0, 5], ("steps",)),
    "cosine": Case(cosine, LINE, [1, 3.5, 9], [0, 5], ("steps",)),
    "exponential": Case(exponential, {"init": 0.3, "gamma": 0.9}, [0, 1, 2, 7]),
    "step": Case(
        schedules.step,
        {"init": 0.3, "gamma": 0.4, "every": 3.0},
        [1, 4, 7.5],
        [0, 3, 6],
        ("every",),
    ),
    "piecewise": Case(two_levels, {"low": 0.1, "high": 0.3, "at": 4.0}, [1, 6], [0, 4], ("at",)),
    "joined": Case(
        warmup_cosine,
        {"peak": 0.3, "warm": 3.0, "steps": 6.0, "final": 0.1},
        [1, 2.5, 4, 11],
        [0, 3, 9],
        ("warm", "steps"),
    ),
    "one_cycle": Case(cycle(), CYCLE, [1, 1.5, 3, 6, 12], [0, 2, 9], CYCLE_PLACES),
    "one_cycle three": Case(
        cycle(three_phase=True, anneal="linear"), CYCLE, [1, 3, 6, 12], [0, 2, 4, 9], CYCLE_PLACES
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def double(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Values


def torch_values(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int
) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)
    scheduler = make(optimizer)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        values.append(optimizer.param_groups[0]["lr"])
    return values


def assert_equal(schedule: schedules.Schedule, expected: list[float]) -> None:
    for step in (range(len(expected)), map(float, range(len(expected)))):
        assert [schedule(t) for t in step] == pytest.approx(expected, rel=1e-12, abs=1e-17)
    for dtype in (torch.float64, torch.int64):
        steps = torch.arange(len(expected), dtype=dtype)
        for values in (schedule(steps), torch.stack([schedule(t) for t in steps])):
            torch.testing.assert_close(values, double(expected), rtol=1e-12, atol=1e-17)


PARITY = {
    "ConstantLR": (
        piecewise([LR / 4, LR], [3]),
        lambda o: lr_scheduler.ConstantLR(o, factor=1 / 4, total_iters=3),
    ),
    "LinearLR": (
        linear(LR / 4, LR / 2, 6),
        lambda o: lr_scheduler.LinearLR(o, 0.25, 0.5, total_iters=6),
    ),
    "LinearLR as warm-up": (
        warmup(LR, 5, init=LR / 100),
        lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, total_iters=5),
    ),
    "ExponentialLR": (exponential(LR, 0.8), lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
    "StepLR": (schedules.step(LR, 0.5, 3), lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
    "MultiStepLR": (
        piecewise([LR, LR * 0.1, LR * 0.1**2], [3, 8]),
        lambda o: lr_scheduler.MultiStepLR(o, [3, 8], 0.1),
    ),
    "PolynomialLR": (
        schedules.polynomial(LR, 9, power=1.7),
        lambda o: lr_scheduler.PolynomialLR(o, 9, power=1.7),
    ),
    "SequentialLR": (
        joined([warmup(LR, 4, LR / 8), exponential(LR, 0.9), linear(LR, LR / 2, 3)], [4, 9]),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=4),
                lr_scheduler.ExponentialLR(o, 0.9),
                lr_scheduler.LinearLR(o, 1.0, 0.5, total_iters=3),
            ],
            [4, 9],
        ),
    ),
}


@EPOCHS
@pytest.mark.parametrize(("ours", "theirs"), PARITY.values(), ids=PARITY)
def test_equal_to_torch(ours, theirs):
    assert_equal(ours, torch_values(theirs, STEPS))


@pytest.mark.parametrize("final", [0.0, 0.02])
def test_cosine_equals_torch_through_its_length_and_stays(final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=final)
    expected = []
    for scheduler.last_epoch in range(10):
        expected += scheduler._get_closed_form_lr()  # going step by step, it loses digits
    assert_equal(cosine(LR, 9, final), [*expected, final, final])


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.0, 0.05, 0.25, 0.3, 0.5, 0.8, 1.0])
def test_one_cycle_equals_torch_through_its_length_and_stays(pct_start, anneal, three_phase):
    numbers = {"pct_start": pct_start, "div_factor": 10.0, "final_div_factor": 1e3}
    expected = torch_values(
        lambda o: lr_scheduler.OneCycleLR(
            o, LR, 11, anneal_strategy=anneal, three_phase=three_phase, **numbers
        ),
        11,
    )
    ours = schedules.one_cycle(LR, 11, anneal=anneal, three_phase=three_phase, **numbers)
    assert_equal(ours, expected)
    assert ours(13) == ours(11) == ours(10)


def test_each_part_of_joined_counts_from_its_own_boundary():
    schedule = joined([lambda t: t, lambda t: 10 + t, lambda t: 20 + t], [2, 5])
    assert [schedule(t) for t in range(7)] == [0, 1, 10, 11, 12, 20, 21]
    assert schedule(torch.arange(7)).tolist() == [0, 1, 10, 11, 12, 20, 21]


def test_a_part_of_joined_may_return_a_plain_number():
    values = joined([lambda _: 0.1, lambda _: 0.2], [1])(torch.arange(2))
    torch.testing.assert_close(values, double([0.1, 0.2]))


def test_one_learned_value_for_each_row_of_a_tensor():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    value = piecewise(values, [2, 4])(torch.tensor(3))
    assert value == 2
    assert torch.autograd.grad(value, values)[0].tolist() == [0, 1, 0]


# Numbers and tensors, dtypes


@EVERY
def test_floats_and_tensors_agree(case):
    tensors = {name: double(number) for name, number in case.numbers.items()}
    plain, learned = case.make(**case.numbers), case.make(**tensors)
    for step in case.generic + case.kinks:
        value = plain(step)
        assert type(value) is float
        for other in (plain(double(step)), learned(step), learned(double(step))):
            torch.testing.assert_close(other, double(value), rtol=1e-14, atol=1e-17)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_count_in_float64(case, dtype):
    for name, number in case.numbers.items():
        schedule = case.make(**{**case.numbers, name: torch.tensor(number, dtype=dtype)})
        for step in (2, 2.0, torch.tensor(2), torch.tensor(2, dtype=dtype)):
            assert schedule(step).dtype == torch.float64
            assert schedule(step).shape == ()


@EVERY
def test_pure(case):
    numbers = {name: double(number) for name, number in case.numbers.items()}
    step, before = double(3.0), {name: number.clone() for name, number in numbers.items()}
    schedule = case.make(**numbers)
    assert schedule(step) == schedule(step)
    assert step == 3
    assert numbers == before
    assert all(schedule(step) is not number for number in numbers.values())


def test_a_rate_for_each_weight():
    init = double([0.1, 0.2])
    expected = [cosine(rate, 5)(2) for rate in (0.1, 0.2)]
    torch.testing.assert_close(cosine(init, 5)(double(2.0)), double(expected))


# Derivatives


def of_numbers(case, step, *fixed):
    """The value at a step as a function of the numbers that are not fixed, and these."""
    names = [name for name in case.numbers if name not in fixed]
    inputs = [double(case.numbers[name]).requires_grad_() for name in names]

    def value(*given):
        return case.make(**{**case.numbers, **dict(zip(names, given, strict=True))})(step)

    return value, inputs


def check_derivatives(value, inputs):
    assert gradcheck(value, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(value, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@EVERY
def test_derivatives_in_every_number(case):
    for step in case.generic:
        check_derivatives(*of_numbers(case, double(step)))
    check_derivatives(*of_numbers(case, case.generic[0]))


@EVERY
def test_derivatives_at_kinks(case):
    for step in case.kinks:
        check_derivatives(*of_numbers(case, double(step), *case.places))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@EVERY
def test_derivatives_are_finite_at_kinks(case):
    for step in case.kinks:
        value, inputs = of_numbers(case, double(step))
        with torch.autograd.detect_anomaly():
            first = torch.autograd.grad(value(*inputs), inputs, create_graph=True)
            second = [
                torch.autograd.grad(d, inputs, retain_graph=True, allow_unused=True)
                for d in first
                if d.requires_grad
            ]
        numbers = tuple(number.detach() for number in inputs)
        forward = torch.func.jacfwd(value, tuple(range(len(numbers))))(*numbers)
        for d in (*first, *forward, *(d for row in second for d in row if d is not None)):
            assert d.isfinite()
        torch.testing.assert_close(forward, first)


@EVERY
def test_hessians_by_torch_func(case):
    value, inputs = of_numbers(case, double(case.generic[0]))
    vector = torch.stack([number.detach() for number in inputs])

    def of_vector(numbers):
        return value(*numbers)

    forward = torch.func.hessian(of_vector)(vector)
    reverse = torch.func.jacrev(torch.func.jacrev(of_vector))(vector)
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(forward, torch.autograd.functional.hessian(of_vector, vector))


@pytest.mark.parametrize("step", range(4))
def test_a_factor_of_0_is_differentiable(step):
    gamma = double(0.0).requires_grad_()
    (first,) = torch.autograd.grad(exponential(1.0, gamma)(double(step)), gamma, create_graph=True)
    (second,) = torch.autograd.grad(first, gamma)
    assert (first.item(), second.item()) == (float(step == 1), 2.0 * (step == 2))


@pytest.mark.parametrize(("step", "derivative"), [(1, 1), (4, 0), (6, 1), (60, 0)])
def test_a_part_that_would_overflow_elsewhere_leaves_the_derivative_alone(step, derivative):
    gamma = double(1e30).requires_grad_()
    grows, rests = exponential(1.0, gamma), schedules.constant(1.0)
    value = joined([grows, rests, grows, rests], [2, 5, 7])(double(step))
    assert torch.autograd.grad(value, gamma)[0] == derivative


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("pct_start", [0.0, 0.1, 0.5, 1.0])
def test_phases_without_length_leave_derivatives_finite(pct_start, three_phase):
    numbers = {"steps": double(10.0), "pct_start": double(pct_start)}
    for step in range(12):

        def value(steps, pct_start, step=step):
            schedule = schedules.one_cycle(LR, steps, pct_start=pct_start, three_phase=three_phase)
            return schedule(double(step))

        for derive in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            derivatives = derive(value, (0, 1))(*numbers.values())
            assert all(d.isfinite() for d in torch.utils._pytree.tree_leaves(derivatives))


# Transforms


@EVERY
def test_vmap_over_steps_equals_a_loop(case):
    steps = torch.arange(STEPS, dtype=torch.float64)
    schedule = case.make(**case.numbers)
    expected = torch.stack([schedule(step) for step in steps])
    torch.testing.assert_close(torch.vmap(schedule)(steps), expected, rtol=0, atol=0)
    torch.testing.assert_close(schedule(steps), expected, rtol=0, atol=0)


@EVERY
def test_vmap_over_numbers_equals_a_loop(case):
    numbers = double([list(case.numbers.values())]) * double([[1.0], [1.1], [1.2]])

    def gradient(row):
        def value(row):
            return case.make(**dict(zip(case.numbers, row, strict=True)))(double(2.0))

        return torch.func.grad(value)(row)

    expected = torch.stack([gradient(row) for row in numbers])
    torch.testing.assert_close(torch.vmap(gradient)(numbers), expected)


@EVERY
def test_compiles_in_one_graph(case):
    def value_and_derivative(step, numbers):
        return torch.func.grad_and_value(lambda numbers: case.make(**numbers)(step))(numbers)

    compiled = torch.compile(value_and_derivative, backend="aot_eager", fullgraph=True)
    fixed = torch.compile(case.make(**case.numbers), backend="aot_eager", fullgraph=True)
    numbers = {name: double(number) for name, number in case.numbers.items()}
    for step in (1, 8):
        expected = value_and_derivative(double(step), numbers)
        torch.testing.assert_close(compiled(double(step), numbers), expected)
        torch.testing.assert_close(fixed(double(step)), expected[1])
    torch.compiler.reset()


# A learned schedule


@pytest.mark.parametrize("opt", [diffopt.sgd(), diffopt.adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", ["cosine", "joined", "one_cycle", "exponential", "piecewise"])
def test_meta_gradient_of_a_learned_schedule(opt, name):
    case, target = CASES[name], double([0.3, -0.2])

    def meta_loss(*numbers):
        schedule = case.make(**dict(zip(case.numbers, numbers, strict=True)))
        params = double([1.0, -2.0])
        state = opt.init(params)
        for _ in range(5):
            error = params - target
            grads = error + 0.4 * error**3
            hparams = opt.hparams(lr=0.3 * schedule(state.step))
            params, state = opt.update(params, grads, state, hparams)
        return (params - target).square().sum()

    # off the kinks, which finite differences would straddle
    numbers = [double(number * 1.03).requires_grad_() for number in case.numbers.values()]
    closely = {"fast_mode": True, "rtol": 1e-5, "atol": 1e-7}
    assert gradcheck(meta_loss, numbers, check_forward_ad=True, **closely)
    assert gradgradcheck(meta_loss, numbers, **closely)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: linear(0.1, 0.2, 0), ValueError, "steps is 0, but must be > 0"),
        (lambda: linear("a", 0.2, 5), TypeError, "init is 'a' of type str, not a number"),
        (lambda: schedules.constant(True), TypeError, "value is True of type bool, not a number"),
        (lambda: warmup(None, 5), TypeError, "peak is None, not a number"),
        (lambda: warmup(0.1, -3), ValueError, "steps is -3, but must be > 0"),
        (lambda: cosine(0.1, -2.5), ValueError, "steps is -2.5, but must be > 0"),
        (lambda: schedules.polynomial(0.1, 5, 0), ValueError, "power is 0, but must be > 0"),
        (lambda: exponential(0.1, -0.5), ValueError, "gamma is -0.5, but must be >= 0"),
        (lambda: schedules.step(0.1, 0.5, 0), ValueError, "every is 0, but must be > 0"),
        (
            lambda: schedules.one_cycle(0.1, 5, pct_start=1.5),
            ValueError,
            "pct_start is 1.5, but must be >= 0 and <= 1",
        ),
        (lambda: schedules.one_cycle(1, 5, div_factor=0), ValueError, "div_factor is 0, but"),
        (
            lambda: schedules.one_cycle(1, 5, final_div_factor=0),
            ValueError,
            "final_div_factor is 0",
        ),
        (
            lambda: schedules.one_cycle(1, 5, anneal="sin"),
            ValueError,
            "anneal is 'sin', but must be 'cos' or 'linear'",
        ),
        (
            lambda: schedules.one_cycle(1, 5, three_phase=1),
            TypeError,
            "three_phase is 1, not a bool",
        ),
        (
            lambda: piecewise([0.1, "a"], [3]),
            TypeError,
            "values[1] is 'a' of type str, not a number",
        ),
        (
            lambda: piecewise([0.1, 0.2], [3, 4]),
            ValueError,
            "values has length 2, but must have one",
        ),
        (lambda: joined([], []), ValueError, "schedules has length 0, but must have one more"),
        (
            lambda: joined([linear(1, 0, 2), 0.2], [3]),
            TypeError,
            "schedules[1] is 0.2 of type float, not a function of the step",
        ),
        (
            lambda: piecewise([1, 2, 3], [4, 4]),
            ValueError,
            "boundaries must increase, but [0] is 4.0 and [1] is 4.0",
        ),
        (lambda: piecewise([1, 2], [-1]), ValueError, "boundaries[0] is -1, but must be >= 0"),
        (lambda: piecewise(0.1, [2]), TypeError, "values is 0.1 of type float, not a list"),
        (lambda: piecewise(double(1.0), [2]), TypeError, "values is a tensor of shape (), not a"),
        (lambda: piecewise([1, 2], 2), TypeError, "boundaries is 2 of type int, not a list"),
        (lambda: joined(None, [2]), TypeError, "schedules is None, not a list"),
        (lambda: cosine(float("nan"), 2), ValueError, "init is nan, but must be a number"),
        (lambda: cosine(10**400, 2), ValueError, "init is an integer too large for a float"),
        (lambda: cosine(0.1, torch.tensor(True)), TypeError, "steps has dtype torch.bool, but"),
    ],
)
def test_errors_name_the_argument_and_its_value(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_tensors_are_not_inspected():
    assert linear(0.1, 0.2, double(-1.0))(double(3.0)) == 0.2
    assert linear(0.1, 0.2, double(0.0))(double(0.0)) == 0.2


# Values


@EVERY
def test_schedules_are_values(case):
    schedule, same = case.make(**case.numbers), case.make(**case.numbers)
    other = case.make(**{**case.numbers, next(iter(case.numbers)): 0.25})
    assert schedule == same
    assert hash(schedule) == hash(same)
    assert schedule != other
    assert {schedule: 1}[same] == 1
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert twin(2) == schedule(2)
    text = repr(schedule)
    assert "\n" not in text
    assert "0x" not in text


def test_the_repr_of_a_schedule_names_its_arguments():
    assert repr(cosine(0.1, 100)) == "Cosine(init=0.1, steps=100.0, final=0.0)"
    learned = linear(torch.zeros(50, 3), 0.1, 5)
    assert repr(learned) == "Linear(init=<tensor of shape (50, 3)>, final=0.1, steps=5.0)"
    assert repr(joined([exponential(1, 0.5), len], [2])) == (
        "Joined(schedules=(Exponential(init=1.0, gamma=0.5), len), boundaries=(2.0,))"
    )


@pytest.mark.parametrize("values", [double(0.3), double([0.3, 0.1]), torch.zeros(2)], ids=str)
def test_a_tensor_in_a_schedule_is_equal_to_itself_only(values):
    for make in (
        lambda x: cosine(x, 5),
        lambda x: joined([schedules.constant(x), exponential(x, 0.5)], [3]),
        lambda x: piecewise([x, 1.0], [3]),
    ):
        schedule = make(values)
        assert schedule == make(values)
        assert hash(schedule) == hash(make(values))
        assert schedule != make(values.clone())
        assert schedule != make(0.3)
        assert schedule != copy.deepcopy(schedule)


def test_a_schedule_follows_its_parameter_through_training():
    rate = torch.nn.Parameter(torch.tensor(0.5))
    lr = schedules.constant(rate)
    assert lr.value is rate
    for expected in (0.5, 0.4):
        value = lr(0)
        torch.testing.assert_close(value.item(), expected)
        value.backward()
        with torch.no_grad():
            rate -= 0.1 * rate.grad
        rate.grad = None
    twin = copy.deepcopy(lr)
    torch.testing.assert_close(twin(0), lr(0))


def test_equal_schedules_are_one_constant_for_torch_compile():
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def value(schedule, step):
        return schedule(step)

    for _ in range(2):
        schedule = joined([warmup(1.0, 3), cosine(1.0, 5)], [3])
        torch.testing.assert_close(value(schedule, double(4.0)), schedule(double(4.0)))
    assert counter.frame_count == 1
    torch.compiler.reset()
