"""What diffopt.optim loads and what it refuses: dtypes, older formats, nonsense."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from diffopt import optim

CLASSES = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "ASGD": {},
    "Rprop": {},
    "Adafactor": {},
    "Muon": {},
    "SparseAdam": {},
    "LBFGS": {"max_iter": 3, "line_search_fn": "strong_wolfe"},
}
every_class = pytest.mark.parametrize("name", CLASSES)

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float64),
]


def make(library, name, params, **options):
    return getattr(library, name)(params, **({"lr": 0.01} | CLASSES[name] | options))


def draw(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    tensors = [torch.randn(3, 4, generator=generator, dtype=drawn) for _ in range(2)]
    return [Parameter(t.to(dtype)) for t in tensors]


def advance(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        targets = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in params]

        def closure(targets=targets):
            for p, target in zip(params, targets, strict=True):
                gradient = (p.detach() - target.to(p.dtype)) / 10
                sparse = isinstance(optimizer, torch.optim.SparseAdam)
                p.grad = gradient.to_sparse(1) if sparse else gradient
            pairs = zip(params, targets, strict=True)
            return sum((p.detach() - t.to(p.dtype)).abs().square().sum() / 20 for p, t in pairs)

        optimizer.step(closure)


def saved_by(library, name, dtype=torch.float32, steps=3, **options):
    params = draw(dtype)
    optimizer = make(library, name, params, **options)
    advance(optimizer, params, steps)
    return copy.deepcopy(optimizer.state_dict()), params


def loaded(library, name, saved, params, dtype=None, **options):
    params = [Parameter(p.detach().to(dtype or p.dtype)) for p in params]
    optimizer = make(library, name, params, **options)
    optimizer.load_state_dict(saved)
    return optimizer, params


def tensors_of(row):
    return {
        f"{key}.{i}": leaf
        for key, value in row.items()
        for i, leaf in enumerate(value if isinstance(value, list) else [value])
        if isinstance(leaf, torch.Tensor)
    }


# Dtypes.


@pytest.mark.parametrize(("narrow", "wide"), PAIRS, ids=str)
@every_class
def test_narrow_state_is_widened_and_the_run_goes_on_as_in_torch(name, narrow, wide):
    if name == "LBFGS" and narrow == torch.bfloat16:
        pytest.skip("does not run in half precision")
    saved, start = saved_by(torch.optim, name, narrow)
    runs = [loaded(library, name, saved, start, wide) for library in (optim, torch.optim)]
    for key, tensor in tensors_of(runs[0][0].state[runs[0][1][0]]).items():
        assert tensor.dtype == wide or key.split(".")[0] in ("step", "mu_product", "eta", "mu")
    for optimizer, params in runs:
        advance(optimizer, params, 3)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["default", "foreach"])
@pytest.mark.parametrize(("narrow", "wide"), PAIRS, ids=str)
@every_class
def test_wide_state_is_kept_and_the_run_goes_on_as_in_torch(name, narrow, wide, options):
    if name == "LBFGS" and narrow == torch.bfloat16:
        pytest.skip("does not run in half precision")
    if options and name in ("SparseAdam", "LBFGS"):
        pytest.skip("has no such flag")
    saved, start = saved_by(torch.optim, name, wide)
    saved["param_groups"][0] |= options
    runs = [loaded(library, name, saved, start, narrow) for library in (optim, torch.optim)]
    for key, tensor in tensors_of(runs[0][0].state[runs[0][1][0]]).items():
        kept = narrow if name == "LBFGS" else wide  # whose vectors are of the params' dtype
        assert tensor.dtype == kept or key.split(".")[0] in ("step", "mu_product", "eta", "mu")
    for optimizer, params in runs:
        advance(optimizer, params, 3)
    tolerance = 0.02 if narrow == torch.bfloat16 else 2e-6
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Rprop"])
def test_narrow_complex_state_is_widened(name):
    saved, start = saved_by(torch.optim, name, torch.complex64)
    optimizer, params = loaded(optim, name, saved, start, torch.complex128)
    for key, tensor in tensors_of(optimizer.state[params[0]]).items():
        assert tensor.dtype == torch.complex128 or key == "step.0"
    exact, twins = loaded(optim, name, saved, start, torch.complex128)
    advance(optimizer, params, 3)
    advance(exact, twins, 3)
    torch.testing.assert_close(params, twins, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Adam", "ASGD", "NAdam"])
def test_scalars_in_half_precision_can_count_again(name):
    saved, start = saved_by(torch.optim, name)
    for row in saved["state"].values():
        for key in row.keys() & {"step", "mu_product", "eta", "mu"}:
            row[key] = row[key].bfloat16()
    optimizer, params = loaded(optim, name, saved, start)
    for key in ("step", "mu_product", "eta", "mu"):
        value = optimizer.state[params[0]].get(key)
        assert value is None or value.dtype == torch.float32
    optimizer.state[params[0]]["step"].fill_(256.0)
    advance(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 257


# Older formats.


@every_class
def test_a_key_that_older_versions_lack_is_needed_only_where_torch_needs_it(name):
    saved, start = saved_by(torch.optim, name)
    for key in saved["param_groups"][0].keys() - {"params"}:
        results = []
        for library in (optim, torch.optim):
            old = copy.deepcopy(saved)
            del old["param_groups"][0][key]
            try:
                optimizer, params = loaded(library, name, old, start)
                advance(optimizer, params, 2)
                results.append(params)
            except (KeyError, ValueError):
                results.append(None)
        mine, theirs = results
        assert (mine is None) == (theirs is None), key
        if mine:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize(
    ("name", "flag"), [("Adam", "fused"), ("SGD", "fused"), ("NAdam", "foreach")]
)
def test_a_flag_that_an_older_checkpoint_lacks_may_have_been_given(name, flag, value):
    saved, start = saved_by(torch.optim, name)
    del saved["param_groups"][0][flag]
    results: list[list[Parameter]] = []
    for library in (optim, torch.optim):
        optimizer, params = loaded(library, name, saved, start, **{flag: value})
        assert not optimizer.param_groups[0][flag]
        advance(optimizer, params, 2)
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_an_older_sparse_adam_minimized_and_an_adagrad_keeps_its_constructors_start():
    saved, start = saved_by(torch.optim, "SparseAdam")
    del saved["param_groups"][0]["maximize"]
    optimizer, _ = loaded(optim, "SparseAdam", saved, start, maximize=True)
    assert optimizer.param_groups[0]["maximize"] is False
    saved, start = saved_by(torch.optim, "Adagrad")
    del saved["param_groups"][0]["initial_accumulator_value"]
    saved["state"] = {}
    optimizer, params = loaded(optim, "Adagrad", saved, start, initial_accumulator_value=0.5)
    optimizer.zero_grad()
    advance(optimizer, params, 1)
    assert optimizer.state[params[0]]["sum"].min() >= 0.5


@pytest.mark.parametrize("number", [int, float, np.float32, np.int64])
@pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("SGD", "Muon", "LBFGS")])
def test_steps_may_be_numbers(name, number):
    saved, start = saved_by(torch.optim, name)
    for row in saved["state"].values():
        row["step"] = number(3)
    optimizer, params = loaded(optim, name, saved, start)
    advance(optimizer, params, 1)
    assert float(optimizer.state[params[0]]["step"]) == 4


# Nonsense.


def buffer_of(row):
    names = ("exp_avg", "momentum_buffer", "square_avg", "sum", "prev", "ax", "row_var", "d")
    return next(name for name in names if name in row)


NONSENSE = {
    "text": lambda x: "x",
    "list": lambda x: [0.0, 0.0],
    "none": lambda x: None,
    "number": lambda x: 1.0,
    "integers": lambda x: torch.zeros(x.shape, dtype=torch.int64),
    "bools": lambda x: torch.zeros(x.shape, dtype=torch.bool),
    "complex": lambda x: x.to(torch.complex64),
    "another shape": lambda x: torch.zeros(5),
}
BAD_STEPS = [-5.0, torch.tensor(-5.0), torch.tensor(torch.nan), float("inf"), 2.5, "x", None]
BAD_STEPS += [torch.ones(3), [1.0], {}, torch.tensor(1j), np.ones(2)]


def refused(name, saved, start, error, match):
    """Loading raises, and the run goes on as if nothing had been tried."""
    tried, params = loaded(optim, name, saved_by(optim, name)[0], start)
    before = copy.deepcopy((tried.state_dict()["state"], params))
    groups, state, rows = tried.param_groups, tried.state, [*tried.state.values()]
    with pytest.raises(error, match=match):
        tried.load_state_dict(saved)
    assert tried.param_groups is groups
    assert tried.state is state
    assert all(a is b for a, b in zip(rows, tried.state.values(), strict=True))
    torch.testing.assert_close((tried.state_dict()["state"], params), before, rtol=0, atol=0)
    advance(tried, params, 1)


@pytest.mark.parametrize("kind", NONSENSE)
@every_class
def test_a_buffer_that_is_not_one_is_refused_by_name(name, kind):
    saved, start = saved_by(optim, name)
    row = saved["state"][0]
    key = buffer_of(row)
    row[key] = NONSENSE[kind](row[key])
    if kind == "none" and name in ("SGD", "Muon"):
        loaded(optim, name, saved, start)  # as torch saves it before a first momentum
        return
    refused(name, saved, start, ValueError, rf"{key} of param_groups\[0\]\['params'\]\[0\]")


@pytest.mark.parametrize("step", BAD_STEPS, ids=str)
@pytest.mark.parametrize("name", ["AdamW", "ASGD", "Rprop", "SparseAdam"])
def test_a_step_that_is_no_count_is_refused_by_name(name, step):
    saved, start = saved_by(optim, name)
    saved["state"][1]["step"] = step
    refused(
        name, saved, start, (TypeError, ValueError), r"step of param_groups\[0\]\['params'\]\[1\]"
    )


@pytest.mark.parametrize("key", ["mu_product", "eta", "mu"])
def test_another_scalar_that_is_not_a_number_is_refused_by_name(key):
    name = "NAdam" if key == "mu_product" else "ASGD"
    for value in ("x", None, torch.ones(2)):
        saved, start = saved_by(optim, name)
        saved["state"][0][key] = value
        refused(name, saved, start, TypeError, rf"{key} of param_groups\[0\]\['params'\]\[0\]")


@every_class
def test_what_is_not_a_state_dict_is_refused(name):
    saved, start = saved_by(optim, name)
    for nonsense in (None, [], "x", 3):
        refused(name, nonsense, start, TypeError, "state_dict is .* not a dict")
    refused(name, {}, start, ValueError, "state_dict has no 'param_groups'")
    for key in saved:
        part = {k: v for k, v in saved.items() if k != key}
        refused(name, part, start, ValueError, f"state_dict has no '{key}'")
        refused(name, saved | {key: None}, start, TypeError, key)
    refused(name, saved | {"param_groups": [None]}, start, TypeError, r"\['param_groups'\]\[0\]")
    refused(name, saved | {"param_groups": [{}]}, start, ValueError, "no list of 'params'")
    refused(name, saved | {"state": {0: "x"}}, start, TypeError, r"state of param_groups\[0\]")
    if len(saved["state"][0]) > 1:
        key = buffer_of(saved["state"][0])
        broken = copy.deepcopy(saved)
        broken["state"][0]["other"] = broken["state"][0].pop(key)
        refused(name, broken, start, ValueError, f"no {key}")


@pytest.mark.parametrize("key", ["old_dirs", "old_stps", "ro", "n_iter", "func_evals"])
def test_a_broken_history_of_lbfgs_is_refused(key):
    for value in (None, -1, [torch.ones(2)] * 3, "x"):
        saved, start = saved_by(optim, "LBFGS")
        saved["state"][0][key] = value
        refused("LBFGS", saved, start, ValueError, key)


@pytest.mark.parametrize("key", ["t", "H_diag", "prev_loss"])
def test_a_number_of_lbfgs_that_is_none_is_refused(key):
    for value in (None, "x", torch.ones(2)):
        saved, start = saved_by(optim, "LBFGS")
        saved["state"][0][key] = value
        refused("LBFGS", saved, start, TypeError, key)


def test_a_hook_that_raises_after_loading_undoes_it():
    saved, start = saved_by(optim, "Adam")
    optimizer, _ = loaded(optim, "Adam", saved_by(optim, "Adam", steps=1)[0], start)
    before = copy.deepcopy(optimizer.state_dict())

    def hook(_):
        raise RuntimeError("no")

    optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


# Numbers in groups.


@every_class
def test_what_is_not_a_number_in_a_group_is_refused_before_anything_changes(name):
    params = draw(torch.float32)
    groups = [{"params": params}] if name == "LBFGS" else [{"params": [p]} for p in params]
    optimizer = make(optim, name, groups)
    before = copy.deepcopy(params)
    *_, last = optimizer.param_groups
    position = len(groups) - 1
    for key, value in copy.deepcopy(optimizer.defaults).items():
        if type(value) in (float, int):
            nonsense = [None, "fast", [0.1], torch.ones(2), np.ones(2), 1j]
        elif isinstance(value, tuple):
            nonsense = [None, 0.5, value[:-1], ("a", *value[1:]), (*value[:-1], None)]
        else:
            continue
        for bad in nonsense:
            last[key] = bad
            with pytest.raises(TypeError, match=rf"param_groups\[{position}\]\['{key}'\]"):
                advance(optimizer, params, 1)
            assert not any(row["step"] for row in optimizer.state.values() if "step" in row)
            torch.testing.assert_close(params, before, rtol=0, atol=0)
        last[key] = value
    advance(optimizer, params, 1)


@pytest.mark.parametrize(
    "value",
    [np.float64(0.1), np.float32(0.1), np.array(0.1), np.int64(1), Fraction(1, 8)],
    ids=repr,
)
@every_class
def test_rates_may_be_any_kind_of_number(name, value):
    results = []
    for rate in (value, float(value)):
        params = draw(torch.float32)
        optimizer = make(optim, name, params, lr=rate)
        advance(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = rate
        for key, default in optimizer.defaults.items():
            if type(default) is tuple and key != "ns_coefficients":
                numbers = tuple(v if v is None else np.array(v) for v in default)
                optimizer.param_groups[0][key] = numbers if rate is value else default
            elif type(default) is float and key != "lr":
                optimizer.param_groups[0][key] = np.array(default) if rate is value else default
        advance(optimizer, params, 2)
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_none_is_machine_epsilon_for_eps1_alone():
    results = []
    for eps in ((None, 1e-3), (torch.finfo(torch.float32).eps, 1e-3)):
        params = draw(torch.float32)
        optimizer = optim.Adafactor(params, lr=0.1)
        optimizer.param_groups[0]["eps"] = eps
        advance(optimizer, params, 2)
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=0)
