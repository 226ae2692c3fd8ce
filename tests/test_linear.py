"""Linear solvers against matrices, and their derivatives against finite differences."""

import dataclasses
import functools
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt import fixed_point_iteration, linear
from diffopt.linear import (
    GMRES,
    BiCGStab,
    ConjugateGradient,
    ConvergenceError,
    ConvergenceWarning,
    Direct,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    Run,
)

N = 8


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


GENERAL = random(N, N) + 4 * torch.eye(N)  # nonsymmetric, eigenvalues in the right half-plane
POSITIVE = GENERAL @ GENERAL.T / N + 0.5 * torch.eye(N)
CLOSE = torch.eye(N, dtype=torch.float64) + 0.05 * random(N, N)
B = random(N, seed=1)

TIGHT = {"rtol": 1e-12}
EXACT = {
    "cg": (ConjugateGradient(**TIGHT), POSITIVE),
    "normal_cg": (NormalCG(**TIGHT), GENERAL),
    "gmres": (GMRES(**TIGHT), GENERAL),
    "gmres_restarted": (GMRES(restart=4, **TIGHT), GENERAL),
    "bicgstab": (BiCGStab(**TIGHT), GENERAL),
    "direct": (Direct(**TIGHT), GENERAL),
    "neumann": (Neumann(k=60, scale=0.9, **TIGHT), CLOSE),
}
ITERATIVE = [name for name in EXACT if name not in ("direct", "neumann")]


def product(v, matrix):
    return matrix @ v


def solve(solver, matrix, b, x0=None, **arguments):
    return solver.solve(product, b, x0, operands=(matrix,), **arguments)


def replaced(solver, **numbers):
    return dataclasses.replace(solver, **numbers)


# Values


@pytest.mark.parametrize("name", EXACT)
def test_solves(name):
    solver, matrix = EXACT[name]
    solution = solve(solver, matrix, B)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, B))
    torch.testing.assert_close(solution.residual, torch.linalg.norm(B - matrix @ solution.value))
    assert solution.converged
    assert solution.iterations.dtype == torch.int64
    assert solution.iterations > 0


@pytest.mark.parametrize("name", EXACT)
def test_one_unknown(name):
    solver, _ = EXACT[name]
    solver = Neumann(60, scale=0.4) if name == "neumann" else solver
    solution = solver.solve(lambda v: 2 * v, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(solution.value, torch.tensor(1.5, dtype=torch.float64))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("warm", [False, True])
def test_zero_gives_zero_at_once(name, warm):
    solver, matrix = EXACT[name]
    solution = solve(solver, matrix, torch.zeros_like(B), B if warm else None)
    assert not solution.value.any()
    assert solution.converged
    if name in ITERATIVE:
        assert solution.iterations == 0


@pytest.mark.parametrize("name", EXACT)
def test_damping_is_added(name):
    solver, matrix = EXACT[name]
    solution = solve(replaced(solver, damping=0.3), matrix, B)
    expected = torch.linalg.solve(matrix + 0.3 * torch.eye(N), B)
    torch.testing.assert_close(solution.value, expected)
    assert solution.converged


@pytest.mark.parametrize("name", EXACT)
def test_trees_keep_their_structure_and_dtypes(name):
    solver, matrix = EXACT[name]
    b = {"w": B[:6].reshape(2, 3), "rest": (B[6], B[7:].float())}

    def operator(v):
        flat = torch.cat([v["w"].reshape(-1), v["rest"][0][None], v["rest"][1].double()])
        flat = matrix @ flat
        return {"rest": (flat[6], flat[7:].float()), "w": flat[:6].reshape(2, 3)}

    value = replaced(solver, rtol=1e-5).solve(operator, b).value
    assert [value["w"].shape, value["rest"][0].shape] == [(2, 3), ()]
    assert value["rest"][1].dtype == torch.float32
    expected = torch.linalg.solve(matrix, B)
    torch.testing.assert_close(value["w"].reshape(-1), expected[:6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(name, dtype):
    solver, matrix = EXACT[name]
    rtol = 1e-4 if dtype == torch.float32 else 0.1
    solution = solve(replaced(solver, rtol=rtol), matrix.to(dtype), B.to(dtype))
    assert solution.value.dtype == solution.residual.dtype == dtype
    assert solution.converged


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_warm_start_at_the_solution_takes_no_steps(name):
    solver, matrix = replaced(EXACT[name][0], rtol=1e-4), EXACT[name][1]
    x = torch.linalg.solve(matrix, B)
    assert solve(solver, matrix, B, x).iterations == 0
    near = solve(solver, matrix, B, 1.001 * x)
    assert 0 < near.iterations < solve(solver, matrix, B).iterations
    torch.testing.assert_close(near.value, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*ITERATIVE, "neumann"])
def test_an_exact_preconditioner_takes_one_step(name):
    solver, matrix = EXACT[name]
    inverse = torch.linalg.inv(matrix)
    solver = replaced(solver, preconditioner=lambda v: inverse @ v)
    if name == "neumann":
        solver = replaced(solver, k=1, scale=1.0)
    solution = solve(solver, matrix, B)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, B))
    assert solution.iterations == 1


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_diagonal_preconditioner_saves_steps(name):
    solver, _ = EXACT[name]
    scales = torch.logspace(0, 3, 40, dtype=torch.float64)
    coupling = 0.01 * random(40, 40)
    matrix = torch.diag(scales) + coupling + coupling.T
    solver = replaced(solver, rtol=1e-8)
    b = torch.ones_like(scales)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        plain = solve(solver, matrix, b)
    helped = solve(replaced(solver, preconditioner=lambda v: v / scales), matrix, b)
    assert helped.converged
    assert helped.iterations < plain.iterations / 2


def test_conjugate_gradients_end_after_as_many_steps_as_eigenvalues():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0], dtype=torch.float64))
    solution = ConjugateGradient().solve(lambda v: matrix @ v, torch.ones(5, dtype=torch.float64))
    assert solution.iterations == 3


def test_gmres_without_restart_ends_after_as_many_steps_as_unknowns():
    rotation = torch.roll(torch.eye(N, dtype=torch.float64), 1, 0)  # no progress before the last
    solution = GMRES(restart=N).solve(lambda v: rotation @ v, torch.eye(N, dtype=torch.float64)[0])
    torch.testing.assert_close(solution.value, torch.eye(N, dtype=torch.float64)[-1])
    assert solution.iterations == N


def test_gmres_that_restarts_too_early_says_so():
    rotation = torch.roll(torch.eye(N, dtype=torch.float64), 1, 0)
    with pytest.warns(ConvergenceWarning, match="GMRES stopped after 3 iterations"):
        solution = GMRES(restart=3).solve(
            lambda v: rotation @ v, torch.eye(N, dtype=torch.float64)[0]
        )
    assert not solution.converged


def test_bicgstab_starts_again_where_it_breaks_down():
    """A residual orthogonal to the shadow residual after the first step."""
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.1]], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0], dtype=torch.float64)
    solution = BiCGStab(max_steps=100).solve(lambda v: matrix @ v, b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b))


def test_neumann_is_its_series():
    scale, terms = 0.1, 7
    expected = scale * sum(
        torch.linalg.matrix_power(torch.eye(N) - scale * POSITIVE, j) @ B for j in range(terms)
    )
    solution = solve(Neumann(terms, scale), POSITIVE, B)
    torch.testing.assert_close(solution.value, expected)
    error = torch.linalg.matrix_power(torch.eye(N) - scale * POSITIVE, terms)
    exact = torch.linalg.solve(POSITIVE, B)
    torch.testing.assert_close(exact - solution.value, error @ exact)


def test_a_diverging_series_says_so():
    with pytest.warns(ConvergenceWarning, match="Neumann stopped after 5 iterations"):
        Neumann(k=5).solve(lambda v: 3 * v, B)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_nystrom_of_full_rank_is_direct(damping):
    expected = solve(Direct(damping=damping), POSITIVE, B).value
    for rank in (N, N + 5):
        solution = solve(Nystrom(rank, damping=damping), POSITIVE, B)
        torch.testing.assert_close(solution.value, expected)


def test_nystrom_is_exact_for_a_matrix_of_its_rank():
    factor = random(N, 3)
    matrix = factor @ factor.T
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(N), B)
    torch.testing.assert_close(solve(Nystrom(3, damping=0.1), matrix, B).value, expected)


def test_nystrom_approximates_by_random_columns():
    solver = Nystrom(4, damping=0.5, rtol=10.0)
    value = solve(solver, POSITIVE, B).value
    candidates = []
    for indices in torch.combinations(torch.arange(N), 4):
        columns = POSITIVE[:, indices]
        low = columns @ torch.linalg.inv(POSITIVE[indices][:, indices]) @ columns.T
        candidates.append(torch.linalg.solve(low + 0.5 * torch.eye(N), B))
    assert min((value - c).norm() for c in candidates) < 1e-10
    assert not torch.equal(value, solve(replaced(solver, seed=3), POSITIVE, B).value)
    torch.testing.assert_close(value, solve(solver, POSITIVE, B).value)


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("samples", [None, 3])
def test_nystrom_makes_nothing_larger_than_its_columns(samples):
    n, rank = 2000, 3
    diagonal = random(n).abs() + 1

    def run(b):
        return Nystrom(rank, rtol=1e9).solve(lambda v, d: d * v, b, operands=(diagonal,)).value

    with _Largest() as largest:
        torch.func.vmap(run)(random(samples, n)) if samples else run(random(n))
    assert largest.numel <= rank * n * (samples or 1)


def test_a_transpose_may_be_given():
    solver, matrix = EXACT["normal_cg"]
    calls = []

    def transpose(v, matrix):
        calls.append(v)
        return matrix.T @ v

    solution = solve(solver, matrix, B, transpose=transpose)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, B))
    assert calls


# Failure


@pytest.mark.parametrize("name", EXACT)
def test_failure_warns_or_raises(name):
    solver, _ = EXACT[name]
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    b = torch.ones(2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=f"{type(solver).__name__} stopped after"):
        solution = solve(solver, singular, b)
    assert not solution.converged
    with pytest.raises(ConvergenceError, match="above the tolerance of rtol=1e-12"):
        solve(replaced(solver, on_failure="raise"), singular, b)


@pytest.mark.parametrize("name", ITERATIVE)
def test_too_few_steps_are_no_convergence(name):
    solver, matrix = EXACT[name]
    with pytest.warns(ConvergenceWarning, match="stopped after 2 iterations"):
        solution = solve(replaced(solver, max_steps=2), matrix, B)
    assert solution.iterations == 2
    assert not solution.converged
    with pytest.warns(ConvergenceWarning, match="stopped after 0 iterations"):
        assert not solve(replaced(solver, max_steps=0), matrix, B).value.any()


@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [-1.0, -2.0], [0.0, 0.0]])
def test_conjugate_gradients_see_that_curvature_is_not_positive(diagonal):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="nonpositive curvature"):
        solution = ConjugateGradient().solve(lambda v: matrix @ v, b)
    assert not solution.converged
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_finite_is_no_convergence(name):
    solver, matrix = EXACT[name]
    with pytest.warns(ConvergenceWarning):
        assert not solve(solver, matrix * torch.nan, B).converged
    with pytest.warns(ConvergenceWarning):
        assert not solve(solver, matrix, B * torch.nan).converged


@pytest.mark.parametrize("name", EXACT)
def test_a_right_hand_side_that_is_not_finite_gives_nan_for_its_sample_only(name):
    solver, matrix = EXACT[name]
    b = torch.stack([B, torch.where(B[0] == B, torch.inf, B), 0 * B, B * torch.nan])
    with pytest.warns(ConvergenceWarning, match="b is not finite"):
        solution = torch.vmap(lambda b: solve(solver, matrix, b))(b)
    assert solution.converged.tolist() == [True, False, True, False]
    assert solution.value[[1, 3]].isnan().all()
    assert solution.residual[[1, 3]].isnan().all()
    torch.testing.assert_close(matrix @ solution.value[0], B)
    assert not solution.value[2].any()
    raising = replaced(solver, on_failure="raise")
    with pytest.raises(ConvergenceError, match="b is not finite"):
        solve(raising, matrix, b[1])


@pytest.mark.parametrize("size", [2.0**-120, 2.0**-80, 2.0**66, 2.0**120])
@pytest.mark.parametrize("name", EXACT)
def test_a_scale_whose_square_is_out_of_range_changes_nothing(name, size):
    solver, matrix = EXACT[name]
    solver, matrix, b = replaced(solver, rtol=1e-5), matrix.float(), B.float()
    plain, scaled = solve(solver, matrix, b, b), solve(solver, matrix, b * size, b * size)
    assert scaled.converged
    torch.testing.assert_close(scaled.value / size, plain.value, rtol=0, atol=0)
    _, batch = torch.vmap(lambda s: solve(solver, matrix, b * s)[:2])(torch.tensor([1.0, size]))
    assert (batch <= 1e-5 * (b * torch.tensor([[1.0], [size]])).double().norm(dim=1)).all()


def test_atol_is_that_of_the_system_as_it_is_given():
    small = B * 1e-30
    assert not ConjugateGradient(atol=1e-20).solve(lambda v: v, small).value.any()
    assert ConjugateGradient(atol=1e-40).solve(lambda v: v, small).value.all()


@pytest.mark.parametrize("size", [0.0, 1e-40])
def test_atol_may_be_out_of_range_beside_a_small_system(size):
    solution = GMRES(atol=100.0).solve(lambda v: 2 * v, torch.full((2,), size))
    assert solution.converged
    found = fixed_point_iteration(lambda x: size * x, atol=100.0)(torch.ones(2))
    torch.testing.assert_close(found, torch.full((2,), size))


def test_nothing_to_solve_for():
    assert GMRES().solve(lambda v: v, torch.ones(0)).converged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GMRES(on_failure="ignore"),
            r"on_failure is 'ignore', but must be 'warn' or 'raise'",
        ),
        (lambda: GMRES(rtol=-1.0), r"rtol is -1.0, but must be a number >= 0"),
        (lambda: GMRES(atol=float("nan")), r"atol is nan, but must be a number >= 0"),
        (lambda: Direct(damping="1"), r"damping is '1', but must be a number >= 0"),
        (lambda: ConjugateGradient(max_steps=1.5), r"max_steps is 1.5, but must be an integer"),
        (lambda: GMRES(restart=0), r"restart is 0, but must be an integer >= 1"),
        (lambda: Neumann(k=0), r"k is 0, but must be an integer >= 1"),
        (lambda: Neumann(3, 0.0), r"scale is 0.0, but must be a number > 0"),
        (lambda: Neumann(3, "a"), r"scale is 'a', but must be a number > 0"),
        (lambda: Nystrom(3, damping=0.0), r"damping is 0.0, but must be a number > 0"),
        (lambda: Nystrom(0, damping=1.0), r"rank is 0, but must be an integer >= 1"),
    ],
)
def test_solvers_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.solve(lambda v: v, {"a": 1.0}), TypeError, r"b\['a'\] is 1.0 of type float"),
        (lambda s: s.solve(lambda v: v, B.long()), TypeError, r"b has dtype torch.int64"),
        (lambda s: s.solve(lambda v: v, B + 0j), TypeError, r"dtype torch.complex128, .* real"),
        (lambda s: s.solve(lambda v: v, ()), ValueError, r"b holds no tensors"),
        (lambda s: s.solve(GENERAL, B), TypeError, r"operator is a tensor of .*, not a function"),
        (lambda s: s.solve(abs, B, transpose=3), TypeError, r"transpose is 3 .*, not a function"),
        (lambda s: GMRES(preconditioner=3), TypeError, r"preconditioner is 3 .*, not a function"),
        (lambda s: s.solve(lambda v: v[:3], B), ValueError, r"output of operator .*\(3,\), but"),
        (
            lambda s: s.solve(lambda v: (v,), B),
            ValueError,
            r"the output of operator has type tuple",
        ),
        (
            lambda s: s.solve(lambda v: v, B, B[:2]),
            ValueError,
            r"x0 is .*\(2,\), but must .*\(8,\)",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(GMRES())


def test_an_operator_that_hides_what_needs_a_gradient_is_refused():
    matrix = POSITIVE.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"operator closes over a tensor .* pass it as an arg"):
        GMRES().solve(lambda v: matrix @ v, B)


def test_a_solver_of_ones_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Descent(LinearSolver):
        rate: float

        def run(self, system, x0, residual):
            x, steps = x0, 0  # every sample takes as many steps
            while linear.anywhere(torch.linalg.norm(residual) > system.tolerance):
                x, steps = x + self.rate * residual, steps + 1
                residual = system.b - system.matvec(x)
            return Run(x, torch.full((), steps))

    solver, matrix, b = Descent(rate=0.9, rtol=1e-10), CLOSE[:3, :3], B[:3]
    torch.testing.assert_close(solve(solver, matrix, b).value, torch.linalg.solve(matrix, b))
    matrix = matrix.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: solve(solver, m, b).value, matrix)
    batch = torch.vmap(lambda b: solve(solver, CLOSE, b).value)(torch.stack([B, 2 * B]))
    torch.testing.assert_close(batch[1], torch.linalg.solve(CLOSE, 2 * B))


# Derivatives and transforms


def symmetrised(solver, matrix):
    return (matrix + matrix.T) / 2 if solver.symmetric else matrix


@pytest.mark.parametrize("name", EXACT)
def test_solutions_have_the_derivatives_of_finite_differences(name):
    solver, matrix = EXACT[name]
    matrix = matrix[:3, :3].clone().requires_grad_()
    b = B[:3].clone().requires_grad_()

    def function(matrix, b):
        return solve(solver, symmetrised(solver, matrix), b).value

    closely = {"fast_mode": True, "rtol": 1e-5, "atol": 1e-7}
    assert torch.autograd.gradcheck(function, (matrix, b), check_forward_ad=True, **closely)
    assert torch.autograd.gradgradcheck(function, (matrix, b), check_fwd_over_rev=True, **closely)


def test_nystrom_of_full_rank_has_derivatives():
    solver = Nystrom(4, damping=0.1)
    matrix = POSITIVE[:4, :4].clone().requires_grad_()

    def function(matrix):
        return solve(solver, symmetrised(solver, matrix), B[:4]).value

    assert torch.autograd.gradcheck(function, matrix)
    assert torch.autograd.gradgradcheck(function, matrix)


@pytest.mark.parametrize("name", EXACT)
def test_func_transforms_agree_with_the_matrix(name):
    solver, matrix = EXACT[name]
    matrix, b = matrix[:3, :3], B[:3]
    solver = replaced(solver, scale=0.5) if name == "neumann" else solver

    def outer(inverse, t):
        m = symmetrised(solver, matrix) + torch.diag(torch.cos(t))
        return (inverse(m, b) ** 3).sum()

    iterative = functools.partial(outer, lambda m, b: solve(solver, m, b).value)
    dense = functools.partial(outer, lambda m, b: torch.linalg.inv(m) @ b)
    t = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    func = torch.func
    for transform in (
        func.grad,
        func.jacfwd,
        func.hessian,
        lambda f: func.jacrev(func.jacrev(f)),
        lambda f: func.jacfwd(func.jacfwd(f)),
        lambda f: func.jacrev(func.jacfwd(f)),
        lambda f: func.jacfwd(func.jacfwd(func.jacfwd(f))),
        lambda f: func.grad(lambda t: func.vmap(func.grad(f))(torch.stack([t, 2 * t])).sum()),
    ):
        torch.testing.assert_close(transform(iterative)(t), transform(dense)(t))


@pytest.mark.parametrize("name", ITERATIVE)
def test_each_sample_stops_by_its_own_residual(name):
    solver, matrix = EXACT[name]
    eye = torch.eye(N, dtype=torch.float64)
    matrices = torch.stack([matrix, eye, 3 * eye, matrix])
    bs = torch.stack([B, B, 0 * B, 2 * B])
    batch = torch.vmap(lambda m, b: solve(solver, m, b))(matrices, bs)
    for i, (m, b) in enumerate(zip(matrices, bs, strict=True)):
        single = solve(solver, m, b)
        torch.testing.assert_close(batch.value[i], single.value)
        assert batch.converged[i]
        assert (batch.iterations[i] - single.iterations).abs() <= 1  # rounding at the tolerance
    assert batch.iterations[0] > batch.iterations[1] > batch.iterations[2] == 0


@pytest.mark.parametrize("name", EXACT)
def test_batches_of_batches(name):
    solver, matrix = EXACT[name]
    scales = torch.tensor([0.8, 1.0, 1.1], dtype=torch.float64)
    bs = torch.stack([B, B.flip(0)])

    def one(scale, b):
        return solve(solver, scale * matrix, b).value

    nested = torch.vmap(lambda s: torch.vmap(lambda b: one(s, b))(bs))(scales)
    for i, s in enumerate(scales):
        for j, b in enumerate(bs):
            torch.testing.assert_close(nested[i, j], torch.linalg.solve(s * matrix, b))


def test_a_failing_sample_is_reported_and_spoils_no_other():
    diagonals = torch.tensor([[1.0, 2.0], [1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    b = torch.ones(2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="nonpositive curvature"):
        batch = torch.vmap(
            lambda d: ConjugateGradient().solve(lambda v, d: d * v, b, operands=(d,))
        )(diagonals)
    assert batch.converged.tolist() == [True, False, True]
    torch.testing.assert_close(batch.value[[0, 2]], 1 / diagonals[[0, 2]])
    assert torch.isfinite(batch.value).all()


def test_no_graph_is_kept_without_derivatives():
    matrix = POSITIVE.clone().requires_grad_()
    with torch.no_grad():
        assert not solve(GMRES(), matrix, B).value.requires_grad
    assert not solve(GMRES(), POSITIVE, B).value.requires_grad


def test_a_warm_start_has_no_derivative():
    x0 = B.clone().requires_grad_()
    assert not solve(GMRES(), GENERAL, B, x0).value.requires_grad


def test_a_shared_preconditioner_serves_the_adjoint():
    """Of a nonsymmetric A: its adjoint is applied in the backward solve, which takes one step."""
    inverse = torch.linalg.inv(GENERAL)
    solver = GMRES(preconditioner=lambda v: inverse @ v, max_steps=1, on_failure="raise")
    b = B.clone().requires_grad_()
    (grad,) = torch.autograd.grad(solve(solver, GENERAL, b).value.sum(), b)
    torch.testing.assert_close(grad, torch.linalg.solve(GENERAL.T, torch.ones_like(B)))


def test_torch_compile_is_refused_clearly():
    compiled = torch.compile(
        lambda b: GMRES().solve(lambda v: 2 * v, b).value, backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"cannot be traced by torch.compile"):
        compiled(B)
    torch.compiler.reset()


def test_warnings_are_of_their_own_category():
    assert issubclass(ConvergenceWarning, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ConjugateGradient(max_steps=1).solve(lambda v: POSITIVE @ v, B)


def _badly(b):
    """Three equal warnings but for their numbers, and one at another line."""
    matrix, solver = torch.diag(torch.linspace(1, 100, 5)), ConjugateGradient(max_steps=1)
    for i in range(3):
        solver.solve(lambda x: matrix @ x, b**i)
    solver.solve(lambda x: matrix @ x, b)
    return [4, 5]


def _badly_backward(b):
    x = b.clone().requires_grad_()
    solver = ConjugateGradient(max_steps=1, on_failure="warn")
    matrix = torch.diag(torch.linspace(1, 100, 5))
    with warnings.catch_warnings(action="ignore"):
        values = [(solver.solve(lambda v: matrix @ v, x).value ** (2 + i)).sum() for i in range(3)]
    for value in values:
        value.backward()
    return [7]


@pytest.mark.parametrize("program", [_badly, _badly_backward])
def test_warnings_name_the_users_line_and_come_once_for_each(program):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        lines = program(torch.arange(1.0, 6.0))
    first = program.__code__.co_firstlineno
    assert [w.lineno - first for w in caught] == lines
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(("action", "count"), [("always", 4), ("ignore", 0)])
def test_filters_decide_about_warnings(action, count):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action, ConvergenceWarning)
        _badly(torch.arange(1.0, 6.0))
    assert len(caught) == count


@pytest.mark.parametrize(("message", "count"), [("something else", 4), ("ConjugateGradient", 0)])
def test_filters_of_messages_decide_only_about_theirs(message, count):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message)
        _badly(torch.arange(1.0, 6.0))
    assert len(caught) == count
