"""What a user writes, checked by `mypy --strict` and by pyright in strict mode: never run.

Both see the types of the public API, and a misspelt argument is an error.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import torch
from torch import Tensor

import diffopt
from diffopt import transforms
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
