"""L-BFGS: the pure rule, its line search, and the class beside torch.optim.LBFGS."""

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import diffopt
from diffopt.optim.lbfgs import LBFGS
from diffopt.rules._line_search import CURVATURE, DECREASE, Point, strong_wolfe

CURVATURES = torch.linspace(1, 20, 6, dtype=torch.float64)


def flat(params):
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    return torch.cat([p.reshape(-1) for p in parts])


def rosenbrock(params):
    x = flat(params)
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(params):
    x = flat(params)
    return 0.5 * (CURVATURES * (x - 1) ** 2).sum()


def logistic(params):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = (torch.rand(40, generator=generator) > 0.5).double()
    x = flat(params)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ x, labels)
    return loss + 1e-3 * (x * x).sum()


LOSSES = [rosenbrock, quadratic, logistic]


def start():
    return [
        torch.linspace(-1.2, 1, 4, dtype=torch.float64).reshape(2, 2),
        torch.tensor([0.5, 0.3], dtype=torch.float64),
    ]


def pure_steps(loss, params, steps, lr=1.0, history_size=5, search=False):
    opt = diffopt.lbfgs(history_size=history_size)
    state = opt.init(params)
    for _ in range(steps):
        arguments = (params, grad(loss)(params), state, opt.hparams(lr=lr))
        params, state = opt.search(loss, *arguments) if search else opt.update(*arguments)
    return params, state


def class_steps(cls, loss, params, steps, **options):
    """Params after each step, and the optimizer."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = cls(params, **options)
    closure = closure_of(optimizer, loss, params)
    path = []
    for _ in range(steps):
        optimizer.step(closure)
        path.append([p.detach().clone() for p in params])
    return path, optimizer


def closure_of(optimizer, loss, params):
    def closure():
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    return closure


def assert_same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


# The pure rule


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("search", "lr"), [(None, 0.5), ("strong_wolfe", 7.0), ("strong_wolfe", 0.01)]
)
def test_the_rule_follows_torch(loss, search, lr):
    options = {"max_iter": 4, "max_eval": 99, "history_size": 2, "line_search_fn": search}
    (theirs,), optimizer = class_steps(torch.optim.LBFGS, loss, start(), 1, lr=lr, **options)
    mine, _ = pure_steps(loss, start(), 4, lr, history_size=2, search=bool(search))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    (state,) = optimizer.state_dict()["state"].values()
    assert state["n_iter"] == 4
    assert not search or state["func_evals"] > 6  # some first length would not do


@pytest.mark.parametrize("loss", LOSSES)
def test_the_rule_finds_the_minimum(loss):
    params, _ = pure_steps(loss, start(), 100, search=True)
    assert all(g.abs().max() < 1e-6 for g in grad(loss)(params))


def test_on_a_quadratic_the_rule_ends_in_as_many_steps_as_there_are_curvatures():
    # With exact line searches L-BFGS is the method of conjugate gradients.
    opt = diffopt.lbfgs(history_size=6)
    params = torch.zeros(6, dtype=torch.float64)
    state = opt.init(params)
    for step in range(6):
        g = CURVATURES * (params - 1)
        moved, _ = opt.update(params, g, state, opt.hparams(lr=1.0))
        d = moved - params
        exact = float(-g.dot(d) / (CURVATURES * d * d).sum())
        params, state = opt.update(params, g, state, opt.hparams(lr=exact))
        assert step == 5 or (params - 1).abs().max() > 1e-3
    torch.testing.assert_close(params, torch.ones_like(params), rtol=1e-9, atol=0)


def four_steps(x, lr, scale):
    """Params after four steps on a convex loss: there are more pairs than are remembered."""

    def loss(p):
        return (0.5 * scale * (p["w"] - 1) ** 2 + 0.1 * p["w"] ** 4).sum()

    opt = diffopt.lbfgs(history_size=2)
    params = {"w": x}
    state = opt.init(params)
    for _ in range(4):
        params, state = opt.update(params, grad(loss)(params), state, opt.hparams(lr=lr))
    return params["w"]


def test_derivatives_of_a_run_with_remembered_pairs_equal_finite_differences():
    x = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = (x, lr, scale)
    assert torch.autograd.gradcheck(four_steps, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(four_steps, inputs)
    values = tuple(v.detach() for v in inputs)
    torch.testing.assert_close(jacfwd(four_steps)(*values), jacrev(four_steps)(*values))


def test_batched_runs_equal_a_loop():
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lr = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def outer(x, lr):
        return four_steps(x, lr, scale).square().sum()

    for function in (outer, grad(outer, argnums=(0, 1)), hessian(outer)):
        batched = vmap(function)(x, lr)
        looped = [function(x[i], lr[i]) for i in range(3)]
        expected = torch.utils._pytree.tree_map(lambda *rows: torch.stack(rows), *looped)
        torch.testing.assert_close(batched, expected)


def remembered(state):
    return (state.ro != 0).sum()


def test_a_pair_of_little_or_negative_curvature_is_not_remembered():
    opt = diffopt.lbfgs(history_size=4)
    params = torch.zeros(2, dtype=torch.float64)
    state = opt.init(params)
    for g, pairs in (
        (torch.tensor([1.0, 1.0]), 0),
        (torch.tensor([2.0, 2.0]), 0),  # y.s < 0: the steps go the other way
        (torch.tensor([2.0, 2.0]), 0),  # y = 0
        (torch.tensor([1.0, 1.0]), 1),
    ):
        params, state = opt.update(params, g.double(), state, opt.hparams())
        assert remembered(state) == pairs
    assert state.step == 4


def test_the_oldest_pair_is_forgotten():
    _, state = pure_steps(quadratic, start(), 3, lr=0.5, history_size=2)
    _, later = pure_steps(quadratic, start(), 4, lr=0.5, history_size=2)
    assert remembered(state) == remembered(later) == 2
    assert_same(later.old_dirs[0], state.old_dirs[1])
    assert_same(later.old_stps[0], state.old_stps[1])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_derivatives_are_finite_where_all_gradients_are_zero(first):
    opt = diffopt.lbfgs(history_size=2)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    params, state = x, opt.init(x)
    for step in range(3):
        g = scale * params + (first if step == 0 else 0.0)
        g = g if step == 0 else g * 0
        params, state = opt.update(params, g, state, opt.hparams(lr=lr))
    with torch.autograd.detect_anomaly(check_nan=True):
        total = (params + 1).square().sum() + state.ro.sum() + state.H_diag
        firsts = torch.autograd.grad(total, (x, lr, scale), create_graph=True)
        seconds = torch.autograd.grad(sum(f.sum() for f in firsts), (x, lr, scale))
    assert all(torch.isfinite(d).all() for d in (*firsts, *seconds))


def test_a_leaf_without_gradient_stands_still_and_the_rest_move_as_alone():
    opt = diffopt.lbfgs(history_size=3)
    alone = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    fixed = torch.tensor([3.0 + 1j], dtype=torch.complex128)
    both = {**alone, "b": fixed}
    state, state_of_both = opt.init(alone), opt.init(both)
    for _ in range(4):
        g = {"a": CURVATURES[:2] * alone["a"]}
        alone, state = opt.update(alone, g, state, opt.hparams(lr=0.5))
        both, state_of_both = opt.update(both, {**g, "b": None}, state_of_both, opt.hparams(lr=0.5))
    assert both["b"] is fixed
    assert_same(both["a"], alone["a"])


def test_a_leaf_that_pauses_keeps_its_last_gradient_and_step():
    opt = diffopt.lbfgs(history_size=3)
    params = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    state = opt.init(params)
    for _ in range(3):
        gradients = [2 * params[0], params[1]]
        params, state = opt.update(params, gradients, state, opt.hparams(lr=0.5))
    moved, paused = opt.update(params, [2 * params[0], None], state, opt.hparams())
    assert moved[1] is params[1]
    assert not torch.equal(moved[0], params[0])
    assert paused.prev_flat_grad[2] == state.prev_flat_grad[2]
    assert paused.prev_flat_step[2] == state.prev_flat_step[2] != 0
    assert paused.old_dirs[-1, 2] == paused.old_stps[-1, 2] == 0


@pytest.mark.parametrize("recorded", [False, True])
def test_a_loop_takes_the_steps_that_update_takes_one_by_one(recorded):
    opt, rates = diffopt.lbfgs(history_size=2), [1.0, 0.5, 1.0, 0.7, 1.0, 1.0]
    first = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=recorded)
    start = {"x": first, "late": torch.ones((), dtype=torch.float32)}

    def loss(params, late):
        value = (1 - params["x"]).square().sum() + params["x"].prod().square()
        return value + (params["late"] * params["x"].sum()).square() if late else value

    batches = [t not in (2, 3) for t in range(6)]  # `late` has no gradient there
    sol = diffopt.minimize(
        loss, start, optimizer=opt, hparams=lambda t: opt.hparams(lr=rates[t]), batches=batches
    )
    params, state = start, opt.init(start)
    for rate, late in zip(rates, batches, strict=True):
        grads = grad(lambda p: loss(p, late))(params)  # noqa: B023 (called at once)
        grads = grads if late else {**grads, "late": None}
        params, state = opt.update(params, grads, state, opt.hparams(lr=rate))
    torch.testing.assert_close((sol.params, sol.state), (params, state))
    if recorded:
        ends = (sol.params["x"].sum(), params["x"].sum())
        torch.testing.assert_close(*(torch.autograd.grad(end, first) for end in ends))


def test_a_loop_checks_params_and_state_once(monkeypatch):
    calls = []
    check = diffopt.lbfgs._check_state
    monkeypatch.setattr(
        diffopt.lbfgs, "_check_state", lambda *given: (calls.append(1), check(*given))
    )
    opt = diffopt.lbfgs(history_size=2)
    diffopt.minimize(
        rosenbrock, start(), optimizer=opt, hparams=opt.hparams(), steps=5, adjoint=None
    )
    assert len(calls) == 1


def test_leaves_of_several_dtypes_move_as_in_the_widest():
    wide = [torch.linspace(-1, 1, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    mixed = [wide[0], wide[1].bfloat16()]
    opt = diffopt.lbfgs(history_size=3)
    new, _ = opt.update(mixed, mixed, opt.init(mixed), opt.hparams())
    expected, _ = opt.update(wide, wide, opt.init(wide), opt.hparams())
    assert new[1].dtype == torch.bfloat16
    assert_same(new[0], expected[0])
    torch.testing.assert_close(new[1], expected[1].bfloat16())


def test_a_state_loads_with_weights_only_and_goes_on():
    opt = diffopt.lbfgs(history_size=3)
    params, state = pure_steps(quadratic, start(), 3, lr=0.5, history_size=3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    g = grad(quadratic)(params)
    a, b = (opt.update(params, g, s, opt.hparams())[0] for s in (state, loaded))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("history_size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_a_wrong_history_size_is_refused(history_size, error):
    with pytest.raises(error, match=f"history_size is {history_size}"):
        diffopt.lbfgs(history_size=history_size)


def test_wrong_states_and_learning_rates_are_refused():
    opt = diffopt.lbfgs(history_size=2)
    params = {"w": torch.ones(3)}
    state, hp = opt.init(params), opt.hparams()
    other = diffopt.lbfgs(history_size=3).init(params)
    for arguments, error, message in (
        ((tuple(state), hp), TypeError, "state has type tuple"),
        ((other, hp), ValueError, r"state.old_dirs has shape \(3, 3\), but \(2, 3\)"),
        ((opt.init({"w": torch.ones(4)}), hp), ValueError, "state.old_dirs"),
        ((state._replace(ro=None), hp), TypeError, "state.ro is None"),
        ((state._replace(ro=state.ro.to("meta")), hp), ValueError, "state.ro has device meta"),
        ((state, {"lr": 1.0}), TypeError, "hparams has type dict"),
        ((state, opt.hparams(lr={"w": 1.0})), ValueError, "one lr for all params"),
        ((state, opt.hparams(lr=torch.ones(3))), ValueError, r"hparams.lr has shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            opt.update(params, params, *arguments)
    far = {"a": torch.ones(2), "b": torch.ones(2, device="meta")}
    with pytest.raises(ValueError, match=r"params\['b'\] has device meta"):
        opt.init(far)


# The line search


def along(function):
    """`evaluate` and the start of a search, for a function of one number."""
    points = []

    def evaluate(t):
        x = torch.tensor(float(t), dtype=torch.float64, requires_grad=True)
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        value = value.detach()
        points.append(Point(t, value.item(), slope, x))
        return points[-1]

    return evaluate, evaluate(0), points


@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize(
    "function",
    [
        lambda t: (t - 3) ** 2,
        lambda t: -t / (t * t + 2),  # the tests of Moré and Thuente 1994
        lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
        lambda t: torch.exp(-t) + 0.1 * t,
    ],
)
def test_a_search_ends_at_a_point_of_decrease_and_small_slope(function, t):
    evaluate, first, points = along(function)
    found = strong_wolfe(evaluate, first, t, scale=torch.ones(()), tolerance_change=1e-9, max_ls=50)
    assert found.value <= first.value + DECREASE * found.t * first.slope
    assert found.slope.abs() <= CURVATURE * first.slope.abs()
    assert found in points


@pytest.mark.parametrize(
    "function", [lambda t: -t, lambda t: -(t**3) - t, lambda t: t.exp() - 2 * t]
)
@pytest.mark.parametrize("max_ls", [0, 1, 3])
def test_a_search_that_runs_out_of_trials_returns_the_lower_end(function, max_ls):
    evaluate, first, points = along(function)
    found = strong_wolfe(
        evaluate, first, 10.0, scale=torch.ones(()), tolerance_change=1e-9, max_ls=max_ls
    )
    assert len(points) <= max_ls + 2
    assert found.value <= first.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_search_among_values_that_are_not_finite_ends(value):
    def evaluate(t):
        return Point(t, value, torch.tensor(value), None)

    first = Point(0, 1.0, torch.tensor(-1.0), None)
    for scale in (1.0, math.inf):  # a direction in half precision may overflow
        scale = torch.tensor(scale)
        strong_wolfe(evaluate, first, 1.0, scale=scale, tolerance_change=1e-9, max_ls=80)


@pytest.fixture
def found(monkeypatch):
    """Points that line searches found; once `found.frozen` is set, the last is found again."""

    class Found(list):
        frozen = False

    points = Found()

    def search(*args, **kwargs):
        if not points.frozen:
            points.append(strong_wolfe(*args, **kwargs))
        return points[-1]

    monkeypatch.setattr(sys.modules["diffopt.rules.lbfgs"], "strong_wolfe", search)
    return points


def test_a_searched_step_has_the_derivatives_of_a_step_of_that_length(found):
    opt = diffopt.lbfgs(history_size=3)
    params, state = pure_steps(rosenbrock, start(), 5, search=True, history_size=3)

    def step(first, second, *fields):
        params = [first, second]
        end, new = opt.search(
            rosenbrock, params, grad(rosenbrock)(params), state._make([state.step, *fields]), hp
        )
        return (*end, *new[1:])

    hp = opt.hparams()
    inputs = tuple(x.detach().clone().requires_grad_() for x in (*params, *state[1:]))
    directions = [torch.randn_like(x) for x in step(*inputs)]
    searched = torch.autograd.grad(step(*inputs), inputs, directions)
    of_func = torch.func.vjp(step, *(x.detach() for x in inputs))[1](tuple(directions))
    found.frozen = True
    frozen = torch.autograd.grad(step(*inputs), inputs, directions)
    assert_same(searched, frozen)
    assert_same(of_func, frozen)
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


def test_the_first_length_tried_has_no_derivative():
    opt = diffopt.lbfgs()
    params = start()
    lr = torch.tensor(0.5, requires_grad=True)
    gradients = grad(rosenbrock)(params)
    new, state = opt.search(rosenbrock, params, gradients, opt.init(params), opt.hparams(lr=lr))
    assert not any(x.requires_grad for x in (*new, *state))


def test_a_search_leaves_leaves_without_gradient_alone():
    opt = diffopt.lbfgs()
    params = start()
    gradients = [None, grad(rosenbrock)(params)[1]]
    new, _ = opt.search(rosenbrock, params, gradients, opt.init(params), opt.hparams())
    assert new[0] is params[0]
    assert rosenbrock(new) < rosenbrock(params)


def test_a_search_of_a_loss_without_params_is_refused():
    opt = diffopt.lbfgs()
    params = start()
    with pytest.raises(ValueError, match="loss does not depend on params"):
        opt.search(lambda _: torch.ones(()), params, params, opt.init(params), opt.hparams())


# The class

CONFIGURATIONS = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.3)},
    {"lr": torch.tensor([0.3], dtype=torch.float64)},
    {"max_iter": 1},
    {"max_iter": 3, "max_eval": 2},
    {"history_size": 1},
    {"history_size": 2, "lr": 0.1},
    {"tolerance_grad": 1.0},
    {"tolerance_change": 1e-2},
    {"max_iter": 0},
]
LINE_SEARCHES = [None, "strong_wolfe"]
each_configuration = pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
each_search = pytest.mark.parametrize("search", LINE_SEARCHES)
each_loss = pytest.mark.parametrize("loss", LOSSES)


def state_of(optimizer):
    """Numbers of any type as tensors; lists as they are."""

    def number(leaf):
        return leaf if leaf is None else torch.as_tensor(leaf, dtype=torch.float64)

    tree = optimizer.state_dict()["state"]
    return torch.utils._pytree.tree_map(number, copy.deepcopy(tree))


@each_configuration
@each_search
@each_loss
def test_the_class_equals_torchs(loss, search, options):
    options = {**options, "line_search_fn": search}
    mine, theirs = (
        class_steps(cls, loss, start(), 5, **options) for cls in (LBFGS, torch.optim.LBFGS)
    )
    assert_same(mine[0], theirs[0])
    assert_same(state_of(mine[1]), state_of(theirs[1]))


@each_search
@each_loss
@pytest.mark.parametrize("classes", [(LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS)])
def test_a_checkpoint_moves_either_way_in_the_middle_of_a_run(classes, loss, search):
    options = {"line_search_fn": search, "max_iter": 3, "history_size": 4}
    before, after = classes
    path, _ = class_steps(before, loss, start(), 5, **options)
    first, optimizer = class_steps(before, loss, start(), 2, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(p.clone()) for p in first[-1]]
    other = after(params, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for expected in path[2:]:
        other.step(closure_of(other, loss, params))
        assert_same([p.detach() for p in params], expected)


def test_the_state_has_torchs_keys():
    _, optimizer = class_steps(LBFGS, rosenbrock, start(), 1)
    (state,) = optimizer.state_dict()["state"].values()
    assert set(state) == {
        *("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"),
        *("al", "func_evals", "n_iter"),
    }


@each_search
def test_complex_parameters_follow_torch(search):
    parts = [
        torch.tensor([1 + 2j, -0.5 + 0.1j], dtype=torch.complex128),
        torch.tensor([0.5, 0.3], dtype=torch.float64),
    ]
    mine, theirs = (
        class_steps(cls, rosenbrock, parts, 4, line_search_fn=search, lr=0.1)[0]
        for cls in (LBFGS, torch.optim.LBFGS)
    )
    assert_same(mine, theirs)


@each_search
def test_sparse_and_missing_gradients_follow_torch(search):
    def run(cls):
        table = torch.nn.Parameter(start()[0])
        idle = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))
        optimizer = cls([idle, table], line_search_fn=search, lr=0.1)

        def loss(_):
            rows = torch.nn.functional.embedding(torch.tensor([0, 1, 1]), table, sparse=True)
            return rosenbrock([rows])

        for _ in range(4):
            optimizer.step(closure_of(optimizer, loss, None))
        assert table.grad.is_sparse
        return idle.detach(), table.detach()

    assert_same(run(LBFGS), run(torch.optim.LBFGS))


def test_gradients_of_other_memory_formats_are_taken():
    images = torch.rand(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    p = torch.nn.Parameter(images)
    optimizer = LBFGS([p])
    optimizer.step(closure_of(optimizer, lambda ps: (ps[0] - 1).square().sum(), [p]))
    torch.testing.assert_close(p.detach(), torch.ones_like(p))


def test_the_closure_may_return_a_number_and_runs_with_autograd():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = LBFGS([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert p.detach().abs().max() < 1e-6


@each_search
def test_a_closure_that_raises_leaves_an_optimizer_that_goes_on(search):
    params = [torch.nn.Parameter(p) for p in start()]
    optimizer = LBFGS(params, line_search_fn=search, max_iter=10, max_eval=100)
    closure, calls = closure_of(optimizer, quadratic, params), []

    def interrupted():
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    for _ in range(5):
        optimizer.step(closure)
    assert quadratic(params) < 1e-9


def test_a_copy_and_a_pickle_go_on():
    # Those of torch.optim.LBFGS have lost their parameters.
    _, optimizer = class_steps(LBFGS, quadratic, start(), 1, max_iter=3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        params = other.param_groups[0]["params"]
        before = quadratic(params)
        other.step(closure_of(other, quadratic, params))
        assert quadratic(params) < before


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": torch.ones(2)}])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        LBFGS([torch.zeros(1)], **options)


def test_groups_and_other_line_searches_are_refused():
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameter groups"):
        LBFGS([{"params": [p]}, {"params": [q]}])
    optimizer = LBFGS([p], line_search_fn="armijo")
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.step(lambda: 0.0)
    optimizer = LBFGS([p])
    optimizer.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="one parameter group, but there are 2"):
        optimizer.step(lambda: 0.0)


def test_without_parameters_a_step_returns_the_loss():
    loss = torch.tensor(2.0)
    assert LBFGS([{"params": []}]).step(lambda: loss) is loss


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_ascent_is_descent_of_the_negative(search):
    """torch 2.14 puts `maximize` into the group, as an older torch finds it in a checkpoint."""

    def run(sign, maximize):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        optimizer = LBFGS([p], lr=0.5, max_iter=6, line_search_fn=search)
        optimizer.param_groups[0]["maximize"] = maximize

        def closure():
            optimizer.zero_grad()
            loss = sign * ((p - 1) ** 4).sum()
            loss.backward()
            return loss

        return optimizer.step(closure), p.detach()

    torch.testing.assert_close(
        run(-1, True), tuple(-x if x.dim() == 0 else x for x in run(1, False))
    )


@pytest.mark.parametrize("library", [torch.optim, diffopt.optim])
def test_ascent_has_no_pure_form(library):
    optimizer = library.LBFGS([torch.nn.Parameter(torch.ones(1))])
    optimizer.param_groups[0]["maximize"] = True  # as torch >= 2.14 has it
    with pytest.raises(ValueError, match="minimize the negated loss"):
        diffopt.optim.to_pure(optimizer)


def test_a_smaller_history_keeps_the_last_pairs_in_the_pure_form():
    _, optimizer = class_steps(LBFGS, quadratic, start(), 6, max_iter=1, history_size=5)
    whole = diffopt.optim.to_pure(optimizer).state
    optimizer.param_groups[0]["history_size"] = 2
    state = diffopt.optim.to_pure(optimizer).state
    for name in ("old_dirs", "old_stps", "ro"):
        torch.testing.assert_close(getattr(state, name), getattr(whole, name)[-2:])
