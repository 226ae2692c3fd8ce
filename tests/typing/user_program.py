"""What a user writes, checked by `mypy --strict` and by pyright in strict mode: never run.

Both see the types of the public API, and a misspelt argument is an error.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import Any, ClassVar, NamedTuple, assert_type

import torch
from torch import Tensor

import diffopt
from diffopt import transforms
from diffopt.rules import Hyperparameter, Leafwise, hparams as record, number
from diffopt.rules.adam import Adam, AdamHParams, AdamState, AdamW, AdamWHParams
from diffopt.rules.sgd import MomentumHParams, SGDState
from diffopt.schedules import Schedule
from diffopt.transforms.chain import Chain
from diffopt.transforms.clip import MaxNorm

params = {"w": torch.zeros(3), "b": torch.zeros(())}

opt = diffopt.adam(amsgrad=True)
assert_type(opt, Adam)
assert_type(opt.amsgrad, bool)
assert_type(diffopt.adamw(maximize=True, execution="leaf"), AdamW)
assert_type(diffopt.lbfgs(history_size=5).history_size, int)
diffopt.adam(amsgrd=True)  # type: ignore[call-arg]
diffopt.adam(amsgrad="yes")  # type: ignore[arg-type]
diffopt.adam(params.values())  # type: ignore[call-arg, arg-type]
diffopt.lbfgs(lr=0.1)  # type: ignore[call-arg]

hparams = opt.hparams(lr=1e-2, beta1=torch.tensor(0.9))
assert_type(hparams, AdamHParams)
opt.hparams(learning_rate=1e-2)  # type: ignore[call-arg]
assert_type(diffopt.adamw().hparams(lr=1e-2), AdamWHParams)
assert_type(diffopt.sgd().hparams(lr=1e-2), MomentumHParams)
assert_type(diffopt.sgd().init(params), SGDState)

state = opt.init(params)
assert_type(state, AdamState)
new_params, new_state = opt.update(params, params, state, hparams)
assert_type(new_state, AdamState)


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (params["w"] * x).sum() + params["b"]


solution = diffopt.minimize(loss, params, torch.ones(3), optimizer=opt, hparams=hparams, steps=3)
assert_type(solution, diffopt.Solution)
diffopt.minimize(loss, params, optimizer=opt, hparams=lambda t: opt.hparams(lr=0.1**t), steps=3)
assert_type(solution.losses, Tensor)
assert_type(solution.steps, Tensor)

model = diffopt.nn.functionalize(torch.nn.Linear(3, 1))
assert_type(model, diffopt.nn.Functional)
assert_type(model.params, dict[str, Tensor])
outputs, buffers = model(model.params, model.buffers, torch.ones(1, 3))
assert_type(buffers, dict[str, Tensor])

schedule: Schedule = diffopt.schedules.cosine(0.1, 100)
diffopt.schedules.cosine(torch.tensor(0.1), 100)(state.step)
diffopt.schedules.linear("0.1", 0.0, 100)  # type: ignore[arg-type]

clip = transforms.clip_by_global_norm()
assert_type(clip.hparams(max_norm=1.0), MaxNorm)
assert_type(transforms.chain(clip, diffopt.sgd()), Chain)

trained = diffopt.optim.Adam([torch.zeros(3, requires_grad=True)], lr=1e-3)
assert_type(trained, diffopt.optim.Adam)
fused = diffopt.optim.RMSprop([torch.zeros(3, requires_grad=True)], lr=1e-3, fused=True)
assert_type(fused, diffopt.optim.RMSprop)
weights = [torch.zeros(3, requires_grad=True)]
diffopt.optim.Adamax(weights, 1e-3, (0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True)
diffopt.optim.NAdam(weights, momentum_decay=0.1, decoupled_weight_decay=True, foreach=False)
diffopt.optim.RMSprop(weights, alhpa=0.9)  # type: ignore[call-arg]
diffopt.optim.Adamax(weights, beta=(0.9, 0.9))  # type: ignore[call-arg]
diffopt.optim.NAdam(weights, momentum_deacy=0.1)  # type: ignore[call-arg]
diffopt.optim.RAdam(weights, decoupled=True)  # type: ignore[call-arg]
diffopt.optim.Adadelta(weights, rh0=0.9)  # type: ignore[call-arg]
diffopt.optim.ASGD(weights, lambda_=0.9)  # type: ignore[call-arg]
diffopt.optim.Rprop(weights, eta=(0.5, 1.2), fuse=True)  # type: ignore[call-arg]
assert_type(diffopt.optim.from_pure(opt, params, lr=1e-3), torch.optim.Optimizer)
assert_type(diffopt.optim.to_pure(trained, module=torch.nn.Linear(3, 1)).params, Any)

# Every optimizer takes its hyperparameters as numbers, tensors and trees.
rate: Hyperparameter = torch.tensor(0.1)
diffopt.adadelta().hparams(lr=0.1, rho=rate)
diffopt.adafactor().hparams(lr=0.1)
diffopt.adagrad().hparams(lr=0.1, eps=rate)
diffopt.adamax().hparams(lr=0.1, beta1=rate)
diffopt.adamw().hparams(lr={"w": 0.1, "b": torch.tensor(0.2)})
diffopt.asgd().hparams(lr=0.1, lambd=rate)
diffopt.lbfgs().hparams(lr=0.1)
diffopt.muon().hparams(lr=0.1, momentum=rate)
diffopt.nadam().hparams(lr=0.1, beta2=rate)
diffopt.radam().hparams(lr=0.1, weight_decay=rate)
diffopt.rmsprop().hparams(lr=0.1, alpha=rate)
diffopt.rprop().hparams(lr=0.1, etaminus=rate)
diffopt.sgd(nesterov=True).hparams(lr=0.1, momentum=rate)
diffopt.sparse_adam().hparams(lr=0.1, eps=rate)
diffopt.adamw().hparams(learning_rate=0.1)  # type: ignore[call-arg]
diffopt.adamw().hparams(0.1)  # type: ignore[call-arg]


# A record and an optimizer of one's own.
class LionState(NamedTuple):
    step: Any
    exp_avg: Any


@record
class LionHParams:
    lr: Hyperparameter = number(default=1e-4, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    plain: float = number(default=0.0)


LionHParams()
LionHParams(lr=0.1, beta1=torch.tensor(0.9), plain=0.5)
LionHParams(lr={"w": 0.1, "b": torch.tensor(0.2)})
LionHParams(0.1)  # type: ignore[call-arg]
LionHParams(beta=0.9)  # type: ignore[call-arg]
LionHParams(plain="0.5")  # type: ignore[arg-type]


class Lion(Leafwise[LionState, LionHParams]):
    State = LionState
    hparams: ClassVar[type[LionHParams]] = LionHParams

    def rule(self, p: Any, g: Any, s: LionState, hp: LionHParams, c: Any) -> tuple[Any, LionState]:
        update = (hp.beta1 * s.exp_avg + (1 - hp.beta1) * g).sign()
        return p - hp.lr * update, LionState(s.step, g)


class Brief(Lion):
    hparams = LionHParams


assert_type(Lion().hparams(lr=0.1), LionHParams)
Lion().hparams(rate=0.1)  # type: ignore[call-arg]
Brief().hparams(lr=0.1)
assert_type(Lion().init(params), LionState)


class Halved(transforms.Wrapper[Any]):
    def update(self, params: Any, grads: Any, state: Any, hparams: Any) -> tuple[Any, Any]:
        return self.optimizer.update(params, grads, state, hparams)


transforms.chain(clip, Halved(Lion())).hparams(lr=0.1, max_norm=1.0)
Halved()  # type: ignore[call-arg]


# A model without buffers, and one that exists.
class Net(torch.nn.Module):
    def features(self, x: Tensor) -> Tensor:
        return x


value = model(model.params, torch.ones(1, 3))
with diffopt.innerloop(Net(), torch.optim.SGD([torch.zeros(3)], lr=0.1), first_order=True) as (
    net,
    inner,
):
    assert_type(net, Net)
    assert_type(inner, diffopt.InnerLoop)
    inner.step(net.features(torch.ones(3)).sum(), override={"lr": rate})
    assert_type(inner.params(0), dict[str, Tensor])
    inner.step(1.0)  # type: ignore[arg-type]
diffopt.innerloop(Net(), trained, track_grads=True)  # type: ignore[call-arg]


def report(step: int, loss: Tensor, params: dict[str, Tensor], state: AdamState) -> None:
    if loss < 0.1:
        raise StopIteration


diffopt.minimize(
    loss, params, torch.ones(3), optimizer=opt, hparams=hparams, steps=3, callback=report
)
diffopt.minimize(loss, params, optimizer=opt, hparams=hparams, callback=3)  # type: ignore[arg-type]
