"""What minimize is given by mistake is refused by the argument's name, before the loss runs."""

import pytest
import torch
from torch import nn

import diffopt

OPT = diffopt.adam()
PARAMS = torch.ones(2)
WEIGHT = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": None}, TypeError, "loss is None"),
        ({"loss": PARAMS}, TypeError, "loss is a tensor"),
        ({"loss": nn.Linear}, TypeError, "loss is <class"),
        ({"params": None}, TypeError, "params is None"),
        ({"params": []}, ValueError, "params is .*holds no tensor"),
        ({"params": {}}, ValueError, "params is .*holds no tensor"),
        ({"params": nn.Linear(2, 2)}, TypeError, "diffopt.nn.functionalize"),
        ({"params": nn.Linear(2, 2).parameters()}, TypeError, "params is an iterator: pass dict"),
        ({"params": [1.0]}, TypeError, r"params\[0\] is 1.0"),
        ({"optimizer": torch.optim.SGD([WEIGHT], lr=0.1)}, TypeError, r"diffopt\.optim\.to_pure"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer is SGD, a torch.optim.Optimizer"),
        ({"optimizer": diffopt.optim.Adam([WEIGHT])}, TypeError, r"diffopt\.optim\.to_pure"),
        ({"optimizer": diffopt.adam}, TypeError, r"optimizer is .*diffopt\.adam\(\)"),
        ({"optimizer": "adam"}, TypeError, "optimizer is 'adam'"),
        ({"optimizer": None}, TypeError, "optimizer is None"),
        ({"hparams": 0.1}, TypeError, r"hparams is 0.1 .*optimizer\.hparams\(\.\.\.\)"),
        ({"hparams": None}, TypeError, "hparams is None"),
        ({"hparams": {"lr": 0.1}}, TypeError, "hparams is {'lr': 0.1}"),
        ({"hparams": diffopt.sgd().hparams()}, TypeError, "hparams is SGDHParams|hparams is Mom"),
        ({"hparams": OPT.hparams}, TypeError, "must be called"),
        ({"hparams": lambda t: None}, TypeError, r"hparams\(0\) returned None"),
        ({"hparams": lambda t: diffopt.sgd().hparams()}, TypeError, r"hparams\(0\) returned"),
        ({"steps": True}, ValueError, "steps is True"),
        ({"steps": 2.0}, ValueError, r"steps is 2\.0"),
        ({"steps": torch.tensor(2)}, ValueError, "steps is a tensor"),
        ({"steps": None}, ValueError, "steps= or batches="),
        ({"batches": 5}, TypeError, "batches is 5"),
        ({"batches": True}, TypeError, "batches is True"),
        ({"batches": "ab"}, TypeError, "batches is 'ab'"),
        ({"batches": {1, 2}}, TypeError, "batches is {1, 2}"),
        ({"batches": torch.tensor(1.0)}, TypeError, "batches is a tensor"),
        ({"batches": lambda: [()]}, TypeError, "batches is <function"),
        ({"state": diffopt.sgd().init(PARAMS)}, TypeError, "state has type SGDState"),
        ({"state": {}}, TypeError, "state has type dict"),
        ({"state": 0}, TypeError, "state has type int"),
        ({"has_aux": "yes"}, TypeError, "has_aux is 'yes'"),
        ({"has_aux": 1}, TypeError, "has_aux is 1"),
        ({"buffers": True}, TypeError, "buffers is True"),
        ({"buffers": iter(())}, TypeError, "buffers is .* pass .* buffers=model.buffers"),
        ({"tol": "1"}, TypeError, "tol is '1'"),
        ({"tol": True}, TypeError, "tol is True"),
        ({"tol": torch.tensor(True)}, TypeError, "tol is a tensor"),
        ({"tol": float("nan")}, ValueError, "tol is nan"),
        ({"adjoint": "Unrolled"}, TypeError, "adjoint is 'Unrolled'"),
        ({"adjoint": diffopt.adjoint.Unrolled}, TypeError, "adjoint is <class"),
    ],
)
def test_mistakes_are_refused_by_name_before_anything_runs(arguments, error, message):
    def loss(params):
        pytest.fail("the loss was called")

    arguments = {
        "loss": loss, "params": PARAMS, "optimizer": OPT, "hparams": OPT.hparams(), "steps": 2,
        **arguments,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        diffopt.minimize(arguments.pop("loss"), arguments.pop("params"), **arguments)


NET = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: minimize_with(lr=0.1),
            r"minimize\(\) .* lr: .* hparams=optimizer.hparams\(lr=0.1\)",
        ),
        (lambda: minimize_with(lr=WEIGHT, beta1=0.5), r"hparams\(lr=\.\.\., beta1=0.5\)"),
        (lambda: minimize_with(step=3), "did you mean 'steps'"),
        (lambda: minimize_with(epochs=3), "no argument epochs, only loss, params"),
        (lambda: diffopt.minimize(torch.sum, PARAMS, lr=0.1), r"optimizer.hparams\(lr=0.1\)"),
        (
            lambda: diffopt.innerloop(NET, OPT, lr=0.1),
            r"innerloop\(\) .* hparams=optimizer.hparams",
        ),
        (lambda: diffopt.innerloop(NET, torch.optim.SGD([WEIGHT]), lr=1), r"override=dict\(lr=1\)"),
        (lambda: diffopt.innerloop(NET, OPT, copy_initial_weights=True), "only model, optimizer"),
        (lambda: diffopt.adjoint.unroll(torch.add, PARAMS, lenght=3), "did you mean 'length'"),
        (
            lambda: diffopt.adjoint.unroll(torch.add, PARAMS, steps=3),
            "only step, carry, args, length",
        ),
        (
            lambda: diffopt.adjoint.smooth(torch.sum, n=3),
            r"smooth\(\) .* n, only function, samples",
        ),
        (
            lambda: diffopt.implicit_root(torch.sin, torch.sin, tol=0),
            "no argument tol, only residual",
        ),
        (lambda: diffopt.nn.functionalize(NET, buffers=True), "no argument buffers, only module"),
    ],
)
def test_a_keyword_that_a_function_lacks_is_explained(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("params", "given", "message"),
    [
        (PARAMS, {}, r"optimizer is None, .* such as diffopt\.adam\(\)"),
        (PARAMS, {"optimizer": OPT}, r"hparams is None, .*optimizer\.hparams\("),
        (PARAMS, {"optimizer": torch.optim.SGD([WEIGHT])}, r"diffopt\.optim\.to_pure"),
        (NET, {"optimizer": OPT}, r"diffopt\.nn\.functionalize"),
    ],
    ids=["neither", "no-hparams", "torch-optimizer", "module"],
)
def test_what_is_missing_is_explained_after_what_is_wrong(params, given, message):
    with pytest.raises(TypeError, match=message):
        diffopt.minimize(torch.sum, params, steps=1, **given)


def minimize_with(**keywords):
    return diffopt.minimize(torch.sum, PARAMS, optimizer=OPT, hparams=OPT.hparams(), **keywords)


@pytest.mark.parametrize(
    ("opt", "other"),
    [
        (diffopt.adam(), diffopt.adamw()),
        (diffopt.sgd(momentum=False), diffopt.sgd()),
        (diffopt.rmsprop(momentum=False), diffopt.rmsprop()),
        (diffopt.adafactor(), diffopt.adafactor(eps1=True)),
    ],
    ids=["adam", "sgd", "rmsprop", "adafactor"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_record_of_a_related_optimizer_is_refused_before_any_step(opt, other, swapped):
    opt, other = (other, opt) if swapped else (opt, other)
    p, wrong = torch.ones(2, 2), other.hparams()
    with pytest.raises(TypeError, match="hparams has type"):
        opt.update(p, p, opt.init(p), wrong)
    with pytest.raises(TypeError, match="hparams has type"):
        opt.update_(p, torch.ones(2, 2), opt.init(p), wrong)
    with pytest.raises(TypeError, match="not a record of this optimizer"):
        diffopt.minimize(lambda p: p.sum(), p, optimizer=opt, hparams=wrong, steps=1)
    with pytest.raises(TypeError, match="not a record of this optimizer"):
        diffopt.innerloop(torch.nn.Linear(2, 2), opt, hparams=wrong).__enter__()
    assert p.eq(1).all()
