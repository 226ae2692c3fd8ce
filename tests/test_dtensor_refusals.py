"""What does not support DTensors refuses them by name before it calls the loss."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import diffopt
from diffopt.adjoint import Checkpointed, Evolution, ForwardMode, Implicit, Reversible, Unrolled
from diffopt.linear import GMRES, Direct, NormalCG

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def run(place, adjoint, loss=lambda w: (w - 1).square().sum()):
    opt = diffopt.sgd(momentum=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    sol = diffopt.minimize(
        loss, place(start), optimizer=opt, hparams=opt.hparams(lr=lr, momentum=0.5), steps=3,
        adjoint=adjoint,
    )  # fmt: skip
    return sol, lr


@pytest.mark.parametrize(
    "adjoint", [Reversible(), Evolution(), ForwardMode(), Implicit(GMRES()), Implicit(Direct())]
)
def test_adjoints_refuse_dtensors(adjoint, mesh):
    def loss(w):
        pytest.fail("the loss was called")

    with pytest.raises(ValueError, match="is a DTensor, which is not supported by"):
        run(lambda t: distribute_tensor(t, mesh, [Shard(0)]), adjoint, loss)


@pytest.mark.parametrize("solver", [GMRES(), Direct(), NormalCG()], ids=repr)
@pytest.mark.parametrize("wrap", [diffopt.implicit_root, diffopt.implicit_fixed_point])
def test_implicit_functions_refuse_dtensors(wrap, solver, mesh):
    w = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(ValueError, match=r"^x is a DTensor, .* by a \w+ \(ConjugateGradient"):
        wrap(lambda x, w: 0 * x + w, lambda _, w: w.detach(), solver=solver)(None, w)


def test_lbfgs_refuses_dtensors(mesh):
    with pytest.raises(ValueError, match=r"params is a DTensor, .* lbfgs"):
        diffopt.lbfgs().init(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))


def test_the_class_lbfgs_refuses_dtensors_beside_others(mesh):
    sharded = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    elsewhere = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1, 1)), [Shard(0)] * 2)

    def closure():
        pytest.fail("the closure was called")

    for pair in ((sharded, torch.ones(2)), (torch.ones(2), sharded), (sharded, elsewhere)):
        optimizer = diffopt.optim.LBFGS(map(torch.nn.Parameter, pair))
        with pytest.raises(ValueError, match=r"'params'\]\[0\] is .*'params'\]\[1\] is .*DTensor"):
            optimizer.step(closure)
        assert not optimizer.state
    both = diffopt.optim.LBFGS([torch.nn.Parameter(sharded), torch.nn.Parameter(sharded.clone())])
    both.step(lambda: both.param_groups[0]["params"][0].full_tensor().square().sum())


def test_precision_refuses_dtensors(mesh):
    opt, params = diffopt.transforms.precision(diffopt.adam()), {"w": torch.ones(4, 3)}
    state, record = opt.init(params), opt.hparams(lr=0.1)
    params["w"] = distribute_tensor(params["w"], mesh, [Shard(0)])
    for use in (opt.init, lambda p: opt.update(p, p, state, record)):
        with pytest.raises(ValueError, match=r"params\['w'\] is a DTensor, .* precision"):
            use(params)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Checkpointed(levels=2)])
def test_adjoints_that_take_dtensors(adjoint, mesh):
    grads: list[torch.Tensor] = []
    for place in (lambda t: distribute_tensor(t, mesh, [Shard(0)]), torch.clone):
        sol, lr = run(place, adjoint)
        grads += torch.autograd.grad(sol.losses.sum(), lr)
    torch.testing.assert_close(getattr(grads[0], "full_tensor", lambda: grads[0])(), grads[1])
