"""Every exact adjoint against Unrolled, at first and second order, under all transforms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import diffopt
from diffopt._diff import functions
from diffopt.adjoint import (
    Checkpointed,
    FirstOrder,
    ForwardMode,
    Implicit,
    Truncated,
    Unrolled,
    unroll,
)

FORWARD = Checkpointed(hvp="forward-over-reverse")
CHECKPOINTED = [
    Checkpointed(),
    Checkpointed(levels=3),
    Checkpointed(segments=2),
    FORWARD,
    Checkpointed(levels=2, hvp="forward-over-reverse"),
]
STEPS = 5
BATCHES = list(torch.linspace(-1, 1, 3 * STEPS, dtype=torch.float64).reshape(STEPS, 3))
INPUTS = {
    "a": torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64),
    "c": torch.tensor([0.5, 0.2, -0.7], dtype=torch.float64),
    "shift": torch.tensor([0.1, 0.4, -0.3, 0.9], dtype=torch.float64),
    "lr": torch.tensor(0.05, dtype=torch.float64),
    "beta1": torch.tensor(0.8, dtype=torch.float64),
    "batch": torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64),
    "exp_avg": torch.tensor([0.01, 0.02, -0.01, 0.03], dtype=torch.float64),
}
NAMES = tuple(INPUTS)
EVERY = tuple(range(len(INPUTS)))


def loss(w, shift, x):
    quartic = ((w["a"] - shift) ** 4).sum() + (w["a"][:-1] * w["a"][1:] ** 2).sum()
    return 0.1 * quartic + torch.sin(w["c"] * x).sum() + w["a"][0] * w["c"][1]


def outcome(adjoint, a, c, shift, lr, beta1, batch, exp_avg):
    """A number that depends on all of a solution."""
    opt = diffopt.adam()
    params = {"a": a, "c": c}
    state = opt.init(params)
    state = state._replace(exp_avg={"a": exp_avg, "c": state.exp_avg["c"]})
    sol = diffopt.minimize(
        loss, params, shift, optimizer=opt, hparams=opt.hparams(lr=lr, beta1=beta1),
        batches=[batch, *BATCHES[1:]], state=state, adjoint=adjoint,
    )  # fmt: skip
    end = (sol.params["a"] ** 2).sum() + sol.params["c"].sin().sum()
    return end + (sol.losses**2).sum() + sol.state.exp_avg_sq["a"].sum()


def at(adjoint):
    return lambda *inputs: outcome(adjoint, *inputs)


def stacked():
    return [torch.stack([x, 1.1 * x]) for x in INPUTS.values()]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f, EVERY)(*INPUTS.values()),
    "vmap grad": lambda f: torch.vmap(torch.func.grad(f, EVERY))(*stacked()),
    "grad vmap": lambda f: torch.func.grad(lambda *v: torch.vmap(f)(*v).sum(), EVERY)(*stacked()),
    "hessian": lambda f: torch.func.hessian(f, (2, 3))(*INPUTS.values()),
    "jacrev grad": lambda f: torch.func.jacrev(torch.func.grad(f, (0, 3)), (3, 6))(
        *INPUTS.values()
    ),
    "jacfwd": lambda f: torch.func.jacfwd(f, EVERY)(*INPUTS.values()),
    "jacrev jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f, 3), 4)(*INPUTS.values()),
    "vmap grad grad": lambda f: torch.vmap(
        torch.func.grad(lambda *v: torch.func.grad(f, 3)(*v), EVERY)
    )(*stacked()),
}


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_checkpointed_equals_unrolled_under(name, adjoint):
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(at(adjoint)), transform(at(Unrolled())), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_checkpointed_equals_unrolled_under_autograd_twice(adjoint):
    def derivatives(adjoint):
        leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
        value = outcome(adjoint, *leaves)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)
        return [value, *grads, *again]

    torch.testing.assert_close(
        derivatives(adjoint), derivatives(Unrolled()), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("adjoint", [Checkpointed(levels=2), FORWARD], ids=str)
def test_checkpointed_agrees_with_finite_differences_twice(adjoint):
    leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
    assert gradcheck(at(adjoint), leaves, fast_mode=True)
    assert gradgradcheck(at(adjoint), leaves, fast_mode=True)


# What a step may depend on


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_recomputed_steps_draw_the_same_random_numbers(adjoint):
    start = torch.ones(50, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()

    def loss(w, generator):
        noise = torch.rand(50, dtype=torch.float64, generator=generator)
        return (torch.nn.functional.dropout(w, 0.5) ** 2 * noise).sum()

    def derivatives(adjoint):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        sol = diffopt.minimize(
            loss, start, generator, optimizer=opt, hparams=opt.hparams(lr=lr), steps=9,
            adjoint=adjoint,
        )  # fmt: skip
        grads = torch.autograd.grad(sol.params.sum(), (lr, start))
        return sol.params, grads, torch.rand(1), torch.rand(1, generator=generator)

    torch.testing.assert_close(derivatives(adjoint), derivatives(Unrolled()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjoint", CHECKPOINTED[:1] + CHECKPOINTED[-1:], ids=str)
def test_recomputed_steps_are_cast_as_they_were(adjoint):
    start = torch.linspace(0, 1, 8)
    matrix = torch.linspace(-1, 1, 64).reshape(8, 8)

    def derivative(adjoint):
        lr = torch.tensor(0.1, requires_grad=True)
        opt = diffopt.sgd()
        with torch.autocast("cpu", torch.bfloat16):
            sol = diffopt.minimize(
                lambda w: ((matrix @ w).float() ** 2).sum(), start,
                optimizer=opt, hparams=opt.hparams(lr=lr), steps=4, adjoint=adjoint,
            )  # fmt: skip
        return torch.autograd.grad(sol.params.sum(), lr)

    torch.testing.assert_close(derivative(adjoint), derivative(Unrolled()), rtol=1e-2, atol=0)


@pytest.mark.parametrize("tol", [None, 1e-9])
@pytest.mark.parametrize("adjoint", [Unrolled(), *CHECKPOINTED], ids=str)
def test_hyperparameters_of_every_step_are_differentiated(adjoint, tol):
    rates = torch.tensor([0.1, 0.2, 0.3, 0.1], dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w: 0.5 * w**2, torch.tensor(1.0, dtype=torch.float64), optimizer=opt,
        hparams=lambda t: opt.hparams(lr=rates[t]), steps=4, tol=tol, adjoint=adjoint,
    )  # fmt: skip
    product = (1 - rates).prod()
    torch.testing.assert_close(sol.params, product)
    (grad,) = torch.autograd.grad(sol.params, rates)
    torch.testing.assert_close(grad, -product.detach() / (1 - rates.detach()))


@pytest.mark.parametrize("adjoint", [Unrolled(), *CHECKPOINTED], ids=str)
def test_buffers_and_aux_carry_derivatives(adjoint):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()

    def loss(w, total, scale):
        return 0.5 * scale * w**2, total + w * scale, {"w": w, "name": "aux"}

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    sol = diffopt.minimize(
        loss, one, scale, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=3,
        buffers=zero, has_aux=True, adjoint=adjoint,
    )  # fmt: skip
    assert [aux["name"] for aux in sol.aux] == ["aux"] * 3
    (grad,) = torch.autograd.grad(sol.buffers + sol.aux[2]["w"], scale)
    # w_t = (1 - s/10)^t, total = s (1 + w_1 + w_2)
    rate, s = 0.8, 2.0
    expected = 1 + rate + rate**2 + s * (-0.1 - 0.2 * rate) - 0.2 * rate
    assert grad.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_running_statistics_are_constants(adjoint, train):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double().train(train)
    module = diffopt.nn.functionalize(net)
    x = torch.randn(8, 2, dtype=torch.float64)

    def loss(params, buffers, x):
        out, buffers = module(params, buffers, x)
        return (out**3 - out).square().mean(), buffers

    def solve(adjoint):
        opt = diffopt.adam()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        sol = diffopt.minimize(
            loss, module.params, x, optimizer=opt, hparams=opt.hparams(lr=lr), steps=4,
            buffers=module.buffers, adjoint=adjoint,
        )  # fmt: skip
        assert not any(buffer.requires_grad for buffer in sol.buffers.values())
        assert not sol.state.step.requires_grad
        outer, buffers = loss(sol.params, sol.buffers, x)
        grads = torch.autograd.grad(outer, [lr, *net.parameters()], create_graph=True)
        if train:  # torch has batch_norm's third derivatives wrong
            return [*grads, *buffers.values()]
        return [*grads, *torch.autograd.grad(grads[0], lr), *buffers.values()]

    for mine, exact in zip(solve(adjoint), solve(Unrolled()), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjoint", [*CHECKPOINTED[:1], FORWARD, ForwardMode()], ids=str)
@pytest.mark.parametrize("transformed", [False, True])
def test_no_grad_in_a_loss_stops_every_derivative(adjoint, transformed):
    opt = diffopt.sgd()

    def loss(w, decay):
        with torch.no_grad():
            scale = 1 / (1 + w.norm())
        return scale * ((w - 1) ** 2).sum() + decay * (w**2).sum() * scale**0

    def stopped(w, decay):
        return ((w - 1) ** 2).sum() / (1 + w.norm()).detach() + decay * (w**2).sum()

    def end(loss, adjoint):
        start = torch.tensor([0.3, 0.5], dtype=torch.float64)
        hparams = opt.hparams(lr=0.2)
        return lambda decay: diffopt.minimize(
            loss, start, decay, optimizer=opt, hparams=hparams, steps=5, adjoint=adjoint
        ).params.sum()

    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(end(stopped, Unrolled())(decay), decay)
    solve = end(loss, adjoint)
    if transformed:
        grad = torch.func.grad(solve)(decay.detach())
    else:
        (grad,) = torch.autograd.grad(solve(decay), decay)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_weights_of_normalisations_under_vmap(name):
    """torch's rules for batches of them have wrong second derivatives."""
    torch.manual_seed(0)
    shape = {"layer_norm": (4,)}.get(name, (3,))
    params = {
        "w": torch.randn(3, 2, dtype=torch.float64),
        "weight": torch.rand(shape, dtype=torch.float64),
        "bias": torch.rand(shape, dtype=torch.float64),
    }
    xs = torch.randn(5, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()

    def loss(p, x):
        h = p["w"] @ x
        if name == "layer_norm":
            h = F.layer_norm(h, shape, p["weight"], p["bias"])
        elif name == "batch_norm":
            h = F.batch_norm(h, None, None, p["weight"], bias=p["bias"], training=True)
        else:
            h = F.instance_norm(h, weight=p["weight"], bias=p["bias"])
        return (h**3 - h).square().mean()

    def end(x):
        sol = diffopt.minimize(
            loss, params, x, optimizer=opt, hparams=opt.hparams(lr=0.01), steps=2
        )
        return sum(leaf.square().sum() for leaf in sol.params.values())

    (expected,) = torch.autograd.grad(sum(end(x) for x in xs), xs)
    (grad,) = torch.autograd.grad(torch.vmap(end)(xs).sum(), xs)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    along = 1e-6 * torch.randn_like(xs)
    with torch.no_grad():
        ahead, behind = (torch.vmap(end)(xs + sign * along).sum() for sign in (1, -1))
    torch.testing.assert_close((grad * along).sum(), (ahead - behind) / 2, rtol=1e-6, atol=1e-13)


# What cannot arrive


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_a_tensor_that_a_later_step_closes_over_raises(adjoint):
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()

    def loss(w, t):
        return ((w - 2) ** 2).sum() + (decay * (w**2).sum() if t >= 2 else 0)

    start = torch.ones(2, dtype=torch.float64, requires_grad=True)
    sol = diffopt.minimize(
        loss, start, optimizer=opt, hparams=opt.hparams(lr=0.1), batches=range(6), adjoint=adjoint
    )
    with pytest.raises(ValueError, match=r"closes over a tensor of shape \(\)"):
        sol.params.sum().backward()


@pytest.mark.parametrize("adjoint", CHECKPOINTED[:1] + CHECKPOINTED[-1:], ids=str)
@pytest.mark.parametrize("momentum", [False, True])
def test_a_generator_that_the_loss_closes_over_raises(adjoint, momentum):
    generator = torch.Generator().manual_seed(0)
    opt = diffopt.sgd(momentum=momentum)
    start = torch.zeros(3, requires_grad=True)

    def loss(w):
        return ((w - torch.rand(3, generator=generator)) ** 2).sum()

    with pytest.raises(ValueError, match="pass the generator it draws from as an argument"):
        diffopt.minimize(
            loss, start, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=4, adjoint=adjoint
        )
    with pytest.raises(ValueError, match="pass the generator it draws from as an argument"):
        unroll(lambda w, rate, t: (w - loss(w), ()), start, (), 4, adjoint=adjoint)


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("transformed", [False, True])
def test_buffers_that_begin_to_vary_later_raise(adjoint, transformed):
    opt = diffopt.sgd(momentum=False)

    def loss(w, total, t):
        kept = w.detach() if t == 0 else w
        return 0.5 * w**2 + 0 * total.detach(), total.detach() + kept

    def end(w):
        return diffopt.minimize(
            loss, w, optimizer=opt, hparams=opt.hparams(lr=0.1), batches=range(6),
            buffers=torch.zeros((), dtype=torch.float64), adjoint=adjoint,
        ).params  # fmt: skip

    def grad(end):
        start = torch.ones((), dtype=torch.float64, requires_grad=True)
        return (
            torch.func.grad(end)(start) if transformed else torch.autograd.grad(end(start), start)
        )

    with pytest.raises(ValueError, match="depends on what is differentiated in some steps"):
        grad(end)


@pytest.mark.parametrize("adjoint", [Unrolled(), FirstOrder(), Checkpointed(), None], ids=str)
def test_a_loss_of_the_modules_own_weights_raises(adjoint):
    net, x, opt = torch.nn.Linear(2, 1), torch.randn(4, 2), diffopt.sgd()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"loss does not depend on params|closes over a tensor"):
        diffopt.minimize(
            lambda params: net(x).square().mean(), params, optimizer=opt,
            hparams=opt.hparams(lr=0.1), steps=2, adjoint=adjoint,
        )  # fmt: skip


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("adjoint", CHECKPOINTED[:1] + CHECKPOINTED[-1:], ids=str)
def test_a_closed_over_tensor_that_needs_a_gradient_raises(adjoint, computed):
    opt = diffopt.sgd()

    def solve(target):
        target = 2 * target if computed else target
        return diffopt.minimize(
            lambda w: ((w - target) ** 2).sum(), torch.zeros(3, dtype=torch.float64),
            optimizer=opt, hparams=opt.hparams(lr=0.1), steps=4, adjoint=adjoint,
        ).params.sum()  # fmt: skip

    target = torch.ones(3, dtype=torch.float64)
    message = r"closes over a tensor of shape \(3,\) that requires a gradient.*pass it as an arg"
    with pytest.raises(ValueError, match=message):
        solve(target.clone().requires_grad_())
    with pytest.raises(ValueError, match=message):
        torch.func.grad(solve)(target)
    batch = torch.stack([target, target])
    with pytest.raises(ValueError, match=message):
        torch.vmap(torch.func.grad(solve))(batch)
    with pytest.raises(ValueError, match="closes over a tensor"):
        torch.func.grad(lambda batch: torch.vmap(solve)(batch).sum())(batch)
    assert solve(target).item() == pytest.approx(3 * (1 + computed) * (1 - 0.8**4))


def test_what_a_step_makes_itself_is_not_taken_for_closed_over():
    def step(w, rate, t):
        with torch.enable_grad():
            own = torch.ones_like(w).requires_grad_()
            (grad,) = torch.autograd.grad((own * w**2).sum(), own, create_graph=True)
        return w - rate * grad, ()

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    w, _ = unroll(step, start, rate, 3, adjoint=Checkpointed())
    expected, _ = unroll(step, start, rate, 3)
    grads = [torch.autograd.grad(x.sum(), rate)[0] for x in (w, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_second_derivatives_of_a_classifier_equal_unrolled(adjoint):
    """Forward derivatives of torch have derivatives that raise (log_softmax) or are wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (6,), generator=generator)
    opt = diffopt.adam()

    def loss(w, decay):
        h = torch.nn.functional.group_norm(x @ w, 1).softmax(-1)
        return torch.nn.functional.cross_entropy(h, y) + decay * (w**2).sum()

    def derivatives(adjoint):
        lr, decay = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.2))
        w = x[:4, :3].T.reshape(4, 3).clone()
        sol = diffopt.minimize(
            loss, w, decay, optimizer=opt, hparams=opt.hparams(lr=lr), steps=5, adjoint=adjoint
        )
        first = torch.autograd.grad(loss(sol.params, 0.0), (lr, decay), create_graph=True)
        return *first, *torch.autograd.grad(first[0] * first[1], (lr, decay))

    expected = derivatives(Unrolled())
    torch.testing.assert_close(derivatives(adjoint), expected, rtol=1e-10, atol=0)


def test_a_loss_without_forward_derivative_names_the_operation_and_the_other_setting():
    queries = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    opt = diffopt.sgd()

    def loss(w):
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
        with torch.nn.attention.sdpa_kernel(flash):
            attended = torch.nn.functional.scaled_dot_product_attention(w, queries, queries)
        return (attended**2).sum()

    lr = torch.tensor(0.1, requires_grad=True)
    sol = diffopt.minimize(
        loss, queries, optimizer=opt, hparams=opt.hparams(lr=lr), steps=2, adjoint=FORWARD
    )
    with pytest.raises(NotImplementedError, match=r"flash_attention.*sdpa_kernel"):
        torch.autograd.grad(sol.params.sum(), lr)


class Cube(torch.autograd.Function):
    """x^3, without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0] ** 2


def test_forward_over_reverse_with_parameters_that_do_not_matter():
    params = {"used": torch.tensor(2.0), "unused": torch.tensor(3.0)}
    opt, lr = diffopt.sgd(), torch.tensor(0.1, requires_grad=True)
    end = diffopt.minimize(
        lambda p: p["used"] ** 2, params, optimizer=opt, hparams=opt.hparams(lr=lr), steps=2,
        adjoint=FORWARD,
    ).params  # fmt: skip
    (grad,) = torch.autograd.grad(end["used"] + end["unused"], lr)
    torch.testing.assert_close(grad, torch.tensor(2 * 2 * 0.8 * -2))  # 2 (1 - 2 lr)^2


def test_a_function_without_forward_derivative_is_named():
    opt, lr = diffopt.sgd(), torch.tensor(0.1, requires_grad=True)

    def run(adjoint):
        loop = {"optimizer": opt, "hparams": opt.hparams(lr=lr), "steps": 2, "adjoint": adjoint}
        return diffopt.minimize(Cube.apply, torch.tensor(1.0), **loop).params

    w = run(FORWARD)
    with pytest.raises(NotImplementedError, match=r"Cube.*use hvp='reverse-over-reverse'"):
        torch.autograd.grad(w, lr)
    with pytest.raises(NotImplementedError, match=r"Cube.*use Checkpointed\(\)"):
        run(ForwardMode())
    expected = -3 - 3 * 0.7**2 + 0.1 * 6 * 0.7 * 3  # w - lr 3 w^2, twice
    torch.testing.assert_close(torch.autograd.grad(run(Checkpointed()), lr)[0].item(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments is 0, but must be an integer >= 1"),
        ({"levels": 1.5}, "levels is 1.5, but must be an integer >= 1"),
        ({"offload": "disk"}, "offload is 'disk', but must be None or 'cpu'"),
        ({"hvp": "forward"}, "hvp is 'forward', but must be"),
    ],
)
def test_options_of_checkpointed_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpointed(**options)


# Loops inside loops


LOOPS = [Checkpointed(segments=2), FORWARD, Unrolled()]
HESSIAN = torch.tensor([[1.3, 0.2, -0.1], [0.2, 1.1, 0.3], [-0.1, 0.3, 0.9]], dtype=torch.float64)


def nested(adjoints, x, lr):
    """The end of a loop whose loss contains the end of a loop whose loss contains one."""
    opt = diffopt.sgd()

    def innermost(w, v, u):
        return 0.5 * w @ HESSIAN @ w + 0.1 * (w**4).sum() - w @ v * u.sum()

    def middle(v, u):
        w = solve(2, innermost, torch.zeros_like(v), v, u, lr=0.1).params
        return ((w - u) ** 2).sum() + 0.1 * (v**2).sum()

    def outermost(u, x):
        v = solve(1, middle, torch.full_like(u, 0.5), u, lr=0.2).params
        return ((v - x) ** 2).sum() + 0.1 * (u**2).sum()

    def solve(level, loss, start, *args, lr):
        hparams = opt.hparams(lr=lr)
        return diffopt.minimize(
            loss, start, *args, optimizer=opt, hparams=hparams, steps=2, adjoint=adjoints[level]
        )

    return (solve(0, outermost, torch.full_like(x, 0.3), x, lr=lr).params ** 2).sum()


X = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
RATE = torch.tensor(0.1, dtype=torch.float64)


def test_three_levels_of_unrolled_loops_agree_with_finite_differences():
    inputs = (X.clone().requires_grad_(), RATE.clone().requires_grad_())
    assert gradcheck(lambda x, lr: nested([Unrolled()] * 3, x, lr), inputs, fast_mode=True)


@functools.cache
def three_levels_unrolled():
    inputs = (X.clone().requires_grad_(), RATE.clone().requires_grad_())
    value = nested([Unrolled()] * 3, *inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("levels", [(0, 0, 0), (1, 1, 1), (0, 1, 2), (2, 0, 0), (1, 0, 2)])
def test_three_levels_of_loops_equal_unrolled(levels):
    adjoints = [LOOPS[i] for i in levels]
    inputs = (X.clone().requires_grad_(), RATE.clone().requires_grad_())
    expected_value, expected = three_levels_unrolled()
    value = nested(adjoints, *inputs)
    torch.testing.assert_close(value.detach(), expected_value, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(value, inputs)
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-14)
    grad = torch.func.grad(lambda x: nested(adjoints, x, RATE))(X)
    torch.testing.assert_close(grad, expected[0], rtol=1e-12, atol=1e-14)


OUTER = [Checkpointed(), FORWARD, ForwardMode()]
INNER = [Checkpointed(levels=2), ForwardMode(), Implicit(), Truncated(30)]


@pytest.mark.parametrize("outer", OUTER, ids=str)
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_adjoints_mix(outer, inner):
    """An inner loop that has converged, so that each of these adjoints is exact."""
    opt = diffopt.sgd()

    def innermost(w, v):
        return 0.5 * w @ HESSIAN @ w - w.sum() * v.exp()

    def solve(adjoints, u):
        def middle(v, u):
            w = diffopt.minimize(
                innermost, torch.zeros_like(u), v, optimizer=opt, hparams=opt.hparams(lr=0.9),
                steps=30, adjoint=adjoints[1],
            ).params  # fmt: skip
            return ((w - u) ** 2).sum() + 0.1 * v**2

        return diffopt.minimize(
            middle, 5 * RATE, u, optimizer=opt, hparams=opt.hparams(lr=0.05), steps=2,
            adjoint=adjoints[0],
        ).params  # fmt: skip

    u = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(solve([Unrolled()] * 2, u), u)
    if isinstance(inner, ForwardMode) and outer == Checkpointed():
        with pytest.raises(NotImplementedError, match="no second derivatives in reverse mode"):
            torch.autograd.grad(solve([outer, inner], u), u)
        return
    (grad,) = torch.autograd.grad(solve([outer, inner], u), u)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=0)


# Stopping early


@pytest.mark.parametrize("adjoint", [None, Unrolled(), Truncated(3), *CHECKPOINTED], ids=str)
def test_a_loop_stops_where_the_gradient_is_within_the_tolerance(adjoint):
    start = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()
    batches = iter(range(100))
    sol = diffopt.minimize(
        lambda w, _: 0.5 * (w**2).sum(), start, optimizer=opt, hparams=opt.hparams(lr=0.5),
        batches=batches, tol=0.7, adjoint=adjoint,
    )  # fmt: skip
    assert sol.steps == 3  # 5, 2.5, 1.25, 0.625
    assert len(sol.losses) == 3
    assert next(batches) == 4
    torch.testing.assert_close(sol.params, start / 8)
    if adjoint is not None:
        (grad,) = torch.autograd.grad(sol.params.sum(), start)
        torch.testing.assert_close(grad, torch.full_like(start, 1 / 8))


@pytest.mark.parametrize("adjoint", [Unrolled(), *CHECKPOINTED[:2]], ids=str)
def test_under_vmap_each_example_stops_by_itself(adjoint):
    opt = diffopt.sgd()

    def solve(start):
        sol = diffopt.minimize(
            lambda w: 0.5 * w**2, start, optimizer=opt, hparams=opt.hparams(lr=0.5), steps=100,
            tol=0.7, adjoint=adjoint,
        )  # fmt: skip
        return sol.params, (sol.steps, sol.losses)

    starts = torch.tensor([0.6, 5.0, 1.0], dtype=torch.float64)
    grads, (steps, losses) = torch.vmap(torch.func.grad(solve, has_aux=True))(starts)
    assert steps.tolist() == [0, 3, 1]
    assert losses.shape == (3, 3)
    torch.testing.assert_close(grads, 0.5 ** steps.double())


def test_truncation_under_vmap_refuses_examples_that_stopped_before():
    opt = diffopt.sgd()

    def solve(start):
        return diffopt.minimize(
            lambda w: 0.5 * w**2, start, optimizer=opt, hparams=opt.hparams(lr=0.5), steps=100,
            tol=0.7, adjoint=Truncated(1),
        ).params  # fmt: skip

    with pytest.raises(ValueError, match="under vmap, tol ends the examples after different"):
        torch.vmap(solve)(torch.tensor([5.0, 1.0]))


def test_a_negative_tolerance_is_refused():
    opt = diffopt.sgd()
    with pytest.raises(ValueError, match="tol is -1, but must be a number >= 0"):
        diffopt.minimize(
            torch.square, torch.ones(()), optimizer=opt, hparams=opt.hparams(lr=1), steps=1, tol=-1
        )


# A batch of which an input, and so a result, is no batch


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_a_common_start_gets_the_sum_of_a_batch_of_rates(adjoint):
    start, rates = INPUTS["a"], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    opt = diffopt.sgd()

    def total(start, adjoint):
        def end(lr):
            sol = diffopt.minimize(
                lambda w: (w**4).sum(), start, optimizer=opt, hparams=opt.hparams(lr=lr), steps=3,
                adjoint=adjoint,
            )  # fmt: skip
            return (sol.losses**2).sum() + sol.params.sum()

        return torch.vmap(end)(rates).sum()

    found, expected = (torch.func.grad(total)(start, a) for a in (adjoint, Unrolled()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# Any step function


@pytest.mark.parametrize("adjoint", [Unrolled(), *CHECKPOINTED], ids=str)
def test_unroll_differentiates_any_step_over_xs(adjoint):
    def step(carry, args, x):
        position, velocity = carry
        velocity = velocity + 0.1 * (x["force"] - args * torch.sin(position))
        position = position + 0.1 * velocity
        return (position, velocity), {"position": position, "push": x["force"].sum()}

    def end(stiffness, force, start):
        zeros = torch.zeros_like(start)
        (position, _), path = unroll(
            step, (start, zeros), stiffness, xs={"force": force}, adjoint=adjoint
        )
        assert path["position"].shape == (6, 2)
        return position, path["position"]

    inputs = (
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
        torch.linspace(0, 1, 12, dtype=torch.float64).reshape(6, 2).requires_grad_(),
        torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True),
    )
    assert gradcheck(end, inputs, fast_mode=True, rtol=1e-5, atol=1e-7)
    assert gradgradcheck(end, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "length is None, but must be an integer >= 0 without xs"),
        ({"length": -1}, "length is -1"),
        ({"xs": {"a": torch.ones(3), "b": torch.ones(2)}}, r"xs\['b'\] has 2 entries.*3 steps"),
        ({"xs": torch.ones(())}, "xs is a tensor of shape .*leading time dimension"),
        ({"xs": torch.ones(3), "length": 4}, "xs has 3 entries, but there are 4 steps"),
    ],
)
def test_unroll_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        unroll(lambda carry, args, x: (carry, ()), torch.ones(1), **arguments)
    with pytest.raises(TypeError, match="adjoint is 'unrolled'"):
        unroll(lambda carry, args, x: (carry, ()), torch.ones(1), (), 2, adjoint="unrolled")


@pytest.mark.parametrize("adjoint", [Unrolled(), *CHECKPOINTED, ForwardMode()], ids=str)
@pytest.mark.parametrize("start", [torch.ones(1), torch.ones(2, 3)])
def test_unroll_checks_what_a_step_returns(adjoint, start):
    scale = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match=r"step must return \(carry, output\), not a tensor"):
        unroll(lambda carry, scale, x: scale * carry, start, scale, 2, adjoint=adjoint)
    with pytest.raises(
        ValueError, match=r"structure of carry: .* has type tuple, where a tensor of"
    ):
        unroll(lambda carry, scale, x: ((scale, carry), x), start, scale, 2, adjoint=adjoint)


def test_unroll_of_no_steps_is_the_identity():
    start = torch.ones(2, requires_grad=True)
    for adjoint in (Unrolled(), *CHECKPOINTED):
        carry, outputs = unroll(lambda c, a, x: (2 * c, x), start, (), 0, adjoint=adjoint)
        assert carry is start
        assert outputs == []


def test_a_thread_that_waits_too_long_for_forward_mode_says_so(monkeypatch):
    class Held:
        def acquire(self, timeout):
            return False

    opt, lr = diffopt.sgd(), torch.tensor(0.1, requires_grad=True)
    sol = diffopt.minimize(
        lambda w: w**2, torch.tensor(1.0), optimizer=opt, hparams=opt.hparams(lr=lr), steps=2,
        adjoint=Checkpointed(hvp="forward-over-reverse"),
    )  # fmt: skip
    monkeypatch.setattr(functions, "_LEVELS", Held())
    with pytest.raises(RuntimeError, match=r"^another thread"):
        sol.params.backward()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "adjoint", [Checkpointed(), Checkpointed(graph="step"), Checkpointed(levels=2)], ids=repr
)
def test_a_place_in_the_carry_that_becomes_a_tensor_is_named(adjoint, late):
    def step(carry, rate, t):
        w, v = carry["w"], carry["v"]
        return {"w": rate * w, "v": w if v is None and (t == 3 or not late) else v}, w

    rate = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(ValueError, match=r"carry\['v'\] is None before some steps and a tensor"):
        unroll(step, {"w": torch.ones(2), "v": None}, rate, 5, adjoint=adjoint)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Truncated(1)], ids=repr)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.sum, r"the output of step 2 is a tensor of shape \(\), where type dict is expected"),
        (lambda w: {"y": w}, r"the output of step 2\['x'\] is missing, and .*\['y'\] is not"),
        (lambda w: {"x": w[:1]}, r"step 2\['x'\] is .* \(1,\), but .* step 0\['x'\] is .* \(2,\)"),
    ],
    ids=["type", "key", "shape"],
)
def test_outputs_that_cannot_be_stacked_are_named(adjoint, other, message):
    def step(w, rate, t):
        return rate * w, {"x": w} if t < 2 else other(w)

    rate = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        unroll(step, torch.ones(2), rate, 4, adjoint=adjoint)
