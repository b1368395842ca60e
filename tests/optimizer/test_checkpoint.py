"""Saving, resuming bit for bit, and loading what other optimizers saved."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    LIVELY,
    VARIANTS,
    WALK,
    StepCheck,
    all_params,
    clones,
    core_available,
    frozen,
    parameters,
    results,
    set_gradients,
    snapshot,
    through_file,
    train,
    why_not_core,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from clara_fused.options import OPTIONS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fresh_copy(optimizer: torch.optim.Optimizer, variant: str, fused: bool, **options: Any) -> torch.optim.Optimizer:
    """A new optimizer over copies of the parameters, as a new process would make it."""
    groups = [{"params": clones(g["params"])} for g in optimizer.param_groups]
    return VARIANTS[variant](groups, fused=fused, **{**LIVELY[variant], **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bitwise(variant: str, dtype: torch.dtype, fused: bool) -> None:
    """apex casts the moments of bfloat16 parameters to bfloat16 on loading, then reads them as float32."""
    if fused and (reason := why_not_core("cpu", dtype)):
        pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")
    options = {**LIVELY[variant], "initial_scale": "cautious", "amsgrad": True}
    params = parameters([(5, 3), (7,), (64, 1024)], dtype=dtype)
    optimizer = VARIANTS[variant]([{"params": params[:2]}, {"params": params[2:]}], fused=fused, **options)
    train(optimizer, 4)
    resumed = fresh_copy(optimizer, variant, fused, amsgrad=True)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert results(resumed) == results(optimizer)
    for old, new in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {k: v.dtype for k, v in old.items()} == {k: v.dtype for k, v in new.items()}
    for each in (optimizer, resumed):
        train(each, 4, first=4)
    assert results(resumed) == results(optimizer)


SCRIPT = """
import sys, torch
from helpers import VARIANTS, all_params, parameters, train
fused, folder = sys.argv[1] == "True", sys.argv[2]
for variant in VARIANTS:
    saved = torch.load(f"{folder}/{variant}", weights_only=True)
    optimizer = VARIANTS[variant](saved["params"], fused=fused)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, 3, first=3)
    torch.save({"optimizer": optimizer.state_dict(), "params": all_params(optimizer)}, f"{folder}/{variant}")
"""


@pytest.mark.slow
def test_resume_in_a_new_process_is_bitwise(tmp_path: Path, fused: bool) -> None:
    """Nothing that counts lives outside the checkpoint."""
    expected = {}
    for variant in VARIANTS:
        optimizer = VARIANTS[variant](parameters(dtype=torch.bfloat16), fused=fused, **LIVELY[variant])
        train(optimizer, 3)
        taken = {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in all_params(optimizer)]}
        torch.save(taken, tmp_path / variant)
        train(optimizer, 3, first=3)
        expected[variant] = frozen({"optimizer": optimizer.state_dict(), "params": all_params(optimizer)})
    arguments = [sys.executable, "-c", SCRIPT, str(fused), str(tmp_path)]
    subprocess.run(arguments, check=True, cwd=Path(__file__).resolve().parent.parent)
    for variant, straight in expected.items():
        assert frozen(torch.load(tmp_path / variant, weights_only=True)) == straight, variant


def test_state_dict_has_the_standard_form(variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    taken = optimizer.state_dict()
    assert set(taken) == {"state", "param_groups"}
    assert set(taken["state"]) == {0, 1, 2}
    assert taken["param_groups"][0]["params"] == [0, 1, 2]
    for state in taken["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    keys = set(taken["param_groups"][0])
    train(optimizer, 2)
    assert set(optimizer.state_dict()["param_groups"][0]) == keys


# Values that every option may have, of every kind that it takes.
OPTION_VALUES: dict[str, list[Any]] = {
    "lr": [0.25, 1, torch.tensor(0.5)],
    "betas": [(0.5, 0.75), [0.5, 0.75], (torch.tensor(0.5), np.float64(0.75))],
    "eps": [0.5, torch.tensor(0.5)],
    "weight_decay": [0.5, np.float32(0.5)],
    "amsgrad": [True, np.bool_(True)],
    "maximize": [True, torch.tensor(True)],
    "decoupled_weight_decay": [True, np.array(True)],
    "initial_scale": ["cautious", np.str_("cautious"), 0.5, np.float64(0.5)],
    "path_fraction": [0.5, 1],
    "smoothing": [0.5, torch.tensor(0.5)],
    "damping": [0.25, np.float64(0.25)],
    "clip": [None, (0.5, 1.5), [0.5, 1.5], (np.float64(0.5), 1.5)],
    "lr_smoothing": [0.25, np.float32(0.25)],
    "reference": ["random_walk", np.str_("random_walk"), 0.5, np.float64(0.5)],
    "scale_bounds": [(0.25, 4.0), [0.25, 4.0]],
    "adapt_lr": [False, np.bool_(False), torch.tensor(False)],
}


def test_every_option_has_values_to_save() -> None:
    assert set(OPTION_VALUES) == set(OPTIONS)


def as_json(options: dict[str, Any]) -> Any:
    return json.loads(json.dumps({k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}))


@pytest.mark.parametrize("name", OPTION_VALUES)
def test_every_option_can_be_saved(name: str, variant: str, fused: bool) -> None:
    """A torch.dtype in a group broke `get_optimizer_state_dict` with cpu_offload; numpy's numbers break weights_only
    and JSON. Every option, in all of its kinds, through all of them."""
    if name not in VARIANTS[variant](parameters()).defaults:
        pytest.skip(f"{variant} has no {name}")
    for value in OPTION_VALUES[name]:
        model = small_model()
        optimizer = VARIANTS[variant](model.parameters(), fused=fused, **{name: copy.deepcopy(value)})
        train_model(model, optimizer, 2)
        taken = optimizer.state_dict()
        assert frozen(through_file(taken)) == frozen(taken), value
        options = {k: v for k, v in taken["param_groups"][0].items() if k != "params"}
        plain = (bool, int, float, str, tuple, type(None))
        assert all(type(v) in plain for k, v in options.items() if k != "lr"), value
        assert as_json(options).keys() == {k for k, v in options.items() if not isinstance(v, torch.Tensor)}
        for state_options in (
            StateDictOptions(full_state_dict=True, cpu_offload=True),
            StateDictOptions(cpu_offload=True, flatten_optimizer_state_dict=True),
        ):
            given = get_optimizer_state_dict(model, optimizer, options=state_options)
            again = VARIANTS[variant](model.parameters(), fused=fused, **{name: copy.deepcopy(value)})
            set_optimizer_state_dict(model, again, through_file(given), options=state_options)
            assert results(again)[1] == results(optimizer)[1], value
            train_model(model, again, 1, first=2)


def test_options_that_went_through_json(variant: str, fused: bool) -> None:
    """Tuples come back as lists."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    taken = copy.deepcopy(optimizer.state_dict())
    taken["param_groups"] = json.loads(json.dumps(taken["param_groups"]))
    resumed = fresh_copy(optimizer, variant, fused)
    resumed.load_state_dict(taken)
    for each in (optimizer, resumed):
        train(each, 2, first=2)
    assert results(resumed) == results(optimizer)


def test_nothing_in_a_state_dict_shares_memory(variant: str, fused: bool) -> None:
    """safetensors refuses tensors that do: the one scale of AdamClaraGlobal was in every state."""
    optimizer = VARIANTS[variant](parameters([(5, 3), (7,), (64, 1024)]), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    tensors = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_safetensors(tmp_path: Path, variant: str, fused: bool) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    taken = optimizer.state_dict()
    flat = {f"{i}.{key}": value for i, state in taken["state"].items() for key, value in state.items()}
    safetensors.save_file(flat, tmp_path / "state.safetensors")
    read = safetensors.load_file(tmp_path / "state.safetensors")
    assert frozen(read) == frozen(flat)


def test_entries_of_the_users_in_the_state_of_a_parameter(variant: str, fused: bool) -> None:
    """Lookahead keeps slow weights there: as torch.optim.Adam they are copied, and cast like it casts floating ones."""

    def reloaded(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> dict[str, Any]:
        train(optimizer, 2)
        state = optimizer.state[all_params(optimizer)[0]]
        state["slow"] = torch.ones(5, 3, dtype=torch.float64)
        state["count"] = torch.tensor(3)
        state["note"] = {"nested": [torch.ones(2), 3.5]}
        taken = optimizer.state_dict()
        other.load_state_dict(taken)
        new = other.state[all_params(other)[0]]
        assert torch.equal(new["slow"], state["slow"].to(new["slow"].dtype))
        new["slow"].fill_(7.0)
        assert (state["slow"] == 1.0).all(), "shares memory with the checkpoint"
        train(other, 1, first=2)
        return new

    mine = reloaded(VARIANTS[variant](parameters(), fused=fused), VARIANTS[variant](parameters(seed=1), fused=fused))
    adam = reloaded(torch.optim.Adam(parameters()), torch.optim.Adam(parameters(seed=1)))
    for key in ("slow", "count", "note"):
        assert frozen(mine[key]) == frozen(adam[key]), key


def test_entries_of_the_users_alone_are_copied(variant: str, fused: bool) -> None:
    """Before the first step a parameter's state has nothing else; what is not a parameter's is wholly the user's."""
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    resumed = fresh_copy(optimizer, variant, fused)
    (param, *_), (other, *_) = all_params(optimizer), all_params(resumed)
    optimizer.state[param]["slow"] = torch.ones(5, 3)
    optimizer.state["lookahead"] = {"step": torch.ones(()), "k": 5}
    resumed.load_state_dict(optimizer.state_dict())
    for key, mine in ((param, resumed.state[other]), ("lookahead", resumed.state["lookahead"])):
        assert frozen(mine) == frozen(optimizer.state[key])
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.data_ptr() != optimizer.state[key][name].data_ptr(), name
    train(resumed, 1)


def test_entries_of_the_users_in_a_group(variant: str, fused: bool) -> None:
    """`step` and `bias_correction` of a user's own are none of ours: only an apex checkpoint's are dropped."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    own = {"step": 17, "bias_correction": "mine", "name": "decoder", "initial_lr": 0.5}
    optimizer.param_groups[0].update(own)
    resumed = fresh_copy(optimizer, variant, fused)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for other in (resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {key: other.param_groups[0][key] for key in own} == own


def test_moments_put_in_before_the_first_step(variant: str, fused: bool) -> None:
    """By a hook, or code that warm-starts: completed as a loaded state is."""
    params = parameters()
    adam = torch.optim.Adam(clones(params), lr=0.05)
    train(adam, 3)
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    for param, other in zip(params, all_params(adam), strict=True):
        param.data.copy_(other.detach())
        optimizer.state[param].update(copy.deepcopy(adam.state[other]))
    loaded = VARIANTS[variant](clones(params), fused=fused, **LIVELY[variant])
    loaded.load_state_dict(adam.state_dict())
    for each in (optimizer, loaded):
        each.param_groups[0].update(lr=0.05, weight_decay=0.0)
        train(each, 2, first=3)
    assert results(optimizer) == results(loaded)


def test_loading_does_not_alias(variant: str, fused: bool) -> None:
    """The base class keeps the given tensors where no cast is needed: two runs from one checkpoint then mix."""
    source = VARIANTS[variant](parameters(), lr=torch.tensor(0.02), fused=fused)
    train(source, 3)
    taken = source.state_dict()
    before = frozen(taken)
    targets = [fresh_copy(source, variant, fused, lr=torch.tensor(0.1)) for _ in range(2)]
    for target in targets:
        target.load_state_dict(taken)
    train(targets[0], 3, first=3)
    targets[0].param_groups[0]["lr"].fill_(5.0)
    assert frozen(taken) == before
    assert frozen(source.state_dict()) == before
    assert frozen(targets[1].state_dict()) == before


def test_loading_ones_own_state(variant: str, fused: bool) -> None:
    """Accelerate's prepare calls load_state_dict(state_dict()), before any step and after."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    other = fresh_copy(optimizer, variant, fused)
    for first in (0, 3):
        for each in (optimizer, other):
            train(each, 3, first=first)
        optimizer.load_state_dict(optimizer.state_dict())
    assert snapshot(optimizer) == snapshot(other)


def test_loading_twice_and_going_back(variant: str, fused: bool) -> None:
    """Roll-back after a loss spike: the same optimizer, its pointers cached, loads an earlier state."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in all_params(optimizer)]
    runs = []
    for _ in range(2):
        train(optimizer, 3, first=3)
        runs.append(results(optimizer))
        optimizer.load_state_dict(saved)
        for param, value in zip(all_params(optimizer), values, strict=True):
            param.data.copy_(value)
    assert runs[0] == runs[1]


def test_saved_options_win_but_lr_tensors_stay_tensors(variant: str, fused: bool) -> None:
    source = VARIANTS[variant](parameters(), lr=0.3, smoothing=0.4, clip=(0.7, 1.2), fused=fused)
    train(source, 1)
    target = VARIANTS[variant](parameters(), lr=0.1, fused=fused)
    target.load_state_dict(through_file(source.state_dict()))
    group = target.param_groups[0]
    assert (group["lr"], group["smoothing"], tuple(group["clip"])) == (0.3, 0.4, (0.7, 1.2))


def test_loading_into_other_dtype_keeps_the_moments(variant: str, fused: bool) -> None:
    """A float32 run continued in bfloat16: moments stay float32, bit for bit."""
    if fused and (reason := why_not_core("cpu", torch.bfloat16)):
        pytest.skip(f"the compiled core cannot serve bfloat16: {reason}")
    source = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(source, 3)
    target = VARIANTS[variant](
        [p.detach().bfloat16().requires_grad_() for p in all_params(source)], fused=fused, **LIVELY[variant]
    )
    target.load_state_dict(through_file(source.state_dict()))
    assert results(target)[1] == results(source)[1]
    check = StepCheck(variant, target)
    set_gradients(all_params(target), 3)
    check.step()


def test_partial_state_loads(variant: str, fused: bool) -> None:
    """A parameter that never had a gradient has no state, then or after loading."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    for step in range(2):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    resumed = fresh_copy(optimizer, variant, fused)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert len(resumed.state) == 2
    for each in (optimizer, resumed):
        train(each, 2, first=2)
    assert results(resumed) == results(optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of other optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference", [torch.optim.Adam, torch.optim.AdamW], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_torch_adam_checkpoint(reference: type, amsgrad: bool, dtype: torch.dtype, variant: str, fused: bool) -> None:
    """Adam's state and hyperparameters are taken, the path starts at zero, the scale at initial_scale; our own options
    are those of the constructor. With adapt_lr=False the run goes on as Adam's would."""
    if fused and (reason := why_not_core("cpu", dtype)):
        pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")
    adam = reference(parameters(dtype=dtype), lr=0.02, betas=(0.8, 0.95), weight_decay=0.2, amsgrad=amsgrad)
    train(adam, 5)
    decoupled = reference is torch.optim.AdamW
    mine = VARIANTS[variant](
        clones(all_params(adam)),
        adapt_lr=False,
        smoothing=0.4,
        decoupled_weight_decay=decoupled,
        amsgrad=amsgrad,
        fused=fused,
    )
    mine.load_state_dict(through_file(adam.state_dict()))
    group = mine.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.02, (0.8, 0.95), 0.2)
    assert (group["smoothing"], group["adapt_lr"], group["decoupled_weight_decay"]) == (0.4, False, decoupled)
    check = StepCheck(variant, mine)
    for step in range(5, 9):
        set_gradients(all_params(mine), step)
        set_gradients(all_params(adam), step)
        if step > 5:
            check.step()
        else:
            mine.step()
        adam.step()
    for a, b in zip(all_params(mine), all_params(adam), strict=True):
        assert mine.state[a]["step"].item() == 9
        # torch keeps the moments of bfloat16 parameters in bfloat16, so that its steps are off by 2^-8.
        close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(a, b, **close)


def test_torch_adam_checkpoint_with_tensor_options(variant: str, fused: bool) -> None:
    """RLlib writes tensors for betas, eps and weight_decay."""
    adam = torch.optim.Adam(parameters(), lr=0.02, weight_decay=0.1)
    train(adam, 5)
    taken = copy.deepcopy(adam.state_dict())
    taken["param_groups"][0].update(
        betas=(torch.tensor(0.9), torch.tensor(0.999)), eps=torch.tensor(1e-8), weight_decay=torch.tensor(0.1)
    )
    mine = VARIANTS[variant](clones(all_params(adam)), adapt_lr=False, fused=fused)
    mine.load_state_dict(taken)
    for each in (mine, adam):
        train(each, 3, first=5)
    for a, b in zip(all_params(mine), all_params(adam), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("initial_scale", ["cautious", 0.25])
def test_the_scale_of_what_was_trained_without_one(initial_scale: str | float, variant: str, fused: bool) -> None:
    """Cautious: it has been trained at that rate, however large. A number stays what it is."""
    adam = torch.optim.Adam(parameters(), lr=5.0)
    train(adam, 3)
    mine = VARIANTS[variant](clones(all_params(adam)), lr=5.0, initial_scale=initial_scale, fused=fused)
    mine.load_state_dict(adam.state_dict())
    expected = 1.0 if initial_scale == "cautious" else initial_scale
    assert mine.lr_scales()[0].tolist() == [expected] * 3


def test_torch_adam_checkpoint_starts_the_adaptation(variant: str, fused: bool) -> None:
    adam = torch.optim.Adam(parameters(), lr=0.02)
    train(adam, 5)
    mine = fresh_copy(adam, variant, fused, initial_scale=0.25)
    mine.load_state_dict(adam.state_dict())
    set_gradients(all_params(mine), 5)
    assert all(mine.state[param]["lr_scale"].item() == 0.25 for param in all_params(mine))
    mine.step()
    for param in all_params(mine):
        state = mine.state[param]
        assert state["step"].item() == 6
        # One step from a zero path: s * u.
        bias1, bias2 = 1 - 0.9**6, 1 - 0.999**6
        u = (state["exp_avg"].double() / bias1) / ((state["exp_avg_sq"].double() / bias2).sqrt() + 1e-8)
        torch.testing.assert_close(state["path"].double(), (0.3 * 1.7) ** 0.5 * u, rtol=1e-5, atol=1e-6)
        # A walk of one step is as long as that step: nothing to learn yet.
        assert state["lr_scale"].item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("step_type", ["int", "float", "tensor int64", "1-element tensor"])
def test_step_counts_of_any_type(step_type: str, variant: str, fused: bool) -> None:
    """Old torch wrote ints, other writers what they liked."""
    adam = torch.optim.Adam(parameters(), lr=0.02)
    train(adam, 5)
    taken = copy.deepcopy(adam.state_dict())
    convert = {
        "int": int,
        "float": float,
        "tensor int64": lambda step: torch.tensor(int(step)),
        "1-element tensor": lambda step: torch.tensor([float(step)]),
    }[step_type]
    for state in taken["state"].values():
        state["step"] = convert(state["step"])
    mine = fresh_copy(adam, variant, fused)
    mine.load_state_dict(taken)
    train(mine, 1, first=5)
    for state in mine.state.values():
        assert (state["step"].item(), state["step"].dtype, state["step"].shape) == (6, torch.float32, ())


@pytest.mark.parametrize("step_type", [int, torch.tensor])
def test_apex_checkpoint(step_type: Any, variant: str, fused: bool) -> None:
    """apex FusedAdam keeps one step count in each group, and its own options there."""
    adam = torch.optim.Adam(parameters(), lr=0.02, weight_decay=0.1)
    train(adam, 5)
    taken = copy.deepcopy(adam.state_dict())
    for state in taken["state"].values():
        del state["step"]
    group = taken["param_groups"][0]
    taken["param_groups"] = [
        {
            "lr": group["lr"],
            "bias_correction": True,
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "step": step_type(5),
            "params": group["params"],
        }
    ]
    mine = fresh_copy(adam, variant, fused, adapt_lr=False)
    mine.load_state_dict(through_file(taken))
    for optimizer in (mine, adam):
        train(optimizer, 4, first=5)
    for a, b in zip(all_params(mine), all_params(adam), strict=True):
        assert mine.state[a]["step"].item() == 9
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # What was loaded saves and loads again as our own.
    again = fresh_copy(mine, variant, fused, adapt_lr=False)
    again.load_state_dict(through_file(mine.state_dict()))
    for optimizer in (mine, again):
        train(optimizer, 2, first=9)
    assert results(again) == results(mine)
    assert again.state[all_params(again)[0]]["step"].item() == 11


def test_checkpoints_of_the_three_variants_interchange(fused: bool) -> None:
    """Same state everywhere. Global takes one scale from what were many: every state must show the same afterwards."""
    for source_variant in VARIANTS:
        source = VARIANTS[source_variant](parameters(), fused=fused, **LIVELY[source_variant])
        train(source, 4)
        for target_variant in VARIANTS:
            target = fresh_copy(source, target_variant, fused)
            target.load_state_dict(through_file(source.state_dict()))
            train(target, 2, first=4)
            scales = {s["lr_scale"].item() for s in target.state.values()}
            assert len(scales) == (1 if target_variant == "Global" else 3)
            assert all(s["step"].item() == 6 for s in target.state.values())


# ---------------------------------------------------------------------------------------------------------------------
# Paths that do not fit, and version 1's

SHAPES = [(64, 1024), (130,), (128, 64, 3, 3)]


def without_walk(taken: dict[str, Any]) -> dict[str, Any]:
    """A state as version 1 wrote it: a path of all elements, no walk, and options that are gone."""
    taken = copy.deepcopy(taken)
    for state in taken["state"].values():
        for key in WALK:
            del state[key]
        if state["path"].shape != state["exp_avg"].shape:
            state["path"] = torch.full_like(state["exp_avg"], 100.0)
    for group in taken["param_groups"]:
        del group["path_fraction"]
        group.update(
            accumulate=True, deferred=False, path_dtype=None, reference="measured_walk", scale_bounds=(1e-4, 1e4),
            initial_scale=1.0,
        )  # fmt: skip
    return taken


@pytest.mark.parametrize("reference", ["measured_walk", "random_walk", 0.5])
def test_version_1_checkpoint(reference: Any, variant: str, fused: bool) -> None:
    """Moments, steps and scales are taken; the path starts anew, and the scale stays where it is on noise."""
    source = VARIANTS[variant](parameters(SHAPES), fused=fused, **LIVELY[variant])
    train(source, 4)
    taken = without_walk(source.state_dict())
    taken["param_groups"][0]["reference"] = reference
    resumed = fresh_copy(source, variant, fused)
    resumed.load_state_dict(through_file(taken))
    group = resumed.param_groups[0]
    assert not {"accumulate", "deferred", "path_dtype"} & set(group)
    assert group["reference"] == "random_walk"  # numbers of another rule mean nothing
    for old, new in zip(source.state.values(), resumed.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq", "lr_scale"):
            assert torch.equal(old[key], new[key]), key
        assert not new["path"].any() and not any(new[key] for key in WALK)
        assert new["path"].shape == old["path"].shape
    check = StepCheck(variant, resumed)
    for step in range(3):
        set_gradients(all_params(resumed), step)
        check.step()


def test_whole_path_becomes_a_sample(variant: str, fused: bool) -> None:
    """Saved where every element had a path: the sample of it goes on, with its walk."""
    whole = VARIANTS[variant](parameters(SHAPES), fused=fused, path_fraction=1.0, **LIVELY[variant])
    sampled = VARIANTS[variant](parameters(SHAPES), fused=fused, **LIVELY[variant])
    for each in (whole, sampled):
        each.param_groups[0]["adapt_lr"] = False
        train(each, 4)
    taken = whole.state_dict()
    taken["param_groups"][0].update(path_fraction=1 / 16, adapt_lr=True)
    resumed = fresh_copy(whole, variant, fused)
    resumed.load_state_dict(through_file(taken))
    for param, other, old in zip(*map(all_params, (resumed, sampled, whole)), strict=True):
        mine = resumed.state[param]
        assert torch.equal(mine["path"], sampled.state[other]["path"])
        assert all(torch.equal(mine[key], whole.state[old][key]) for key in WALK)
    check = StepCheck(variant, resumed)
    for step in range(4, 7):
        set_gradients(all_params(resumed), step)
        check.step()


@pytest.mark.parametrize("fraction", [1 / 4, 1.0])
def test_path_of_another_fraction_starts_anew(fraction: float, variant: str, fused: bool) -> None:
    """The scale is not disturbed by it."""
    source = VARIANTS[variant](parameters(SHAPES), fused=fused, **LIVELY[variant])
    train(source, 4)
    taken = source.state_dict()
    taken["param_groups"][0]["path_fraction"] = fraction
    resumed = fresh_copy(source, variant, fused)
    resumed.load_state_dict(through_file(taken))
    large, small, _ = all_params(resumed)
    assert resumed.state[large]["path"].numel() == int(64 * 1024 * fraction)
    assert not resumed.state[large]["path"].any() and not any(resumed.state[large][key] for key in WALK)
    assert resumed.state[small]["path"].any()
    check = StepCheck(variant, resumed)
    for step in range(4, 7):
        set_gradients(all_params(resumed), step)
        check.step()


def test_an_own_checkpoint_whose_options_are_those_of_its_states(variant: str, fused: bool) -> None:
    """path_fraction changed after the states were made: they keep theirs, also over a checkpoint."""
    source = VARIANTS[variant](parameters(SHAPES), fused=fused, **LIVELY[variant])
    train(source, 2)
    resumed = fresh_copy(source, variant, fused)
    resumed.load_state_dict(through_file(source.state_dict()))
    assert results(resumed)[1] == results(source)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong checkpoints


def test_empty_state_of_a_parameter_loads_as_never_stepped(variant: str, fused: bool) -> None:
    """Other optimizers leave empty entries behind where their code looks up the state of a parameter."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {}
    optimizer.load_state_dict(saved)
    assert not optimizer.state[params[0]]
    train(optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.state[params[1]]["step"] == 3


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_state_that_is_no_adam_state_is_refused(key: str, variant: str, fused: bool) -> None:
    """Nothing can stand for a missing moment or step count, unlike for a missing path or scale."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1][key]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"param group 0, parameter 1 .*state '{key}' is None"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lr_scale", "step"])
def test_state_of_the_wrong_size_is_refused(key: str, variant: str, fused: bool) -> None:
    """torch's fused Adam reads and writes past the end of such state. (A path that does not fit starts anew.)"""
    optimizer = VARIANTS[variant](parameters(), amsgrad=True, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    taken = copy.deepcopy(optimizer.state_dict())
    taken["state"][1][key] = torch.ones(3)
    target = fresh_copy(optimizer, variant, fused, amsgrad=True)
    before = snapshot(target)
    with pytest.raises(ValueError, match=rf"param group 0, parameter 1\b.*{key}"):
        target.load_state_dict(taken)
    assert snapshot(target) == before


def test_a_path_that_no_longer_fits_starts_anew(variant: str, fused: bool) -> None:
    """As it does when it is loaded: after surgery on the parameter, or where its memory is laid out otherwise."""
    params = parameters([(64, 1024), (3, 4)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    scale = optimizer.lr_scales()[0].clone()
    params[0].data = params[0].data.t().contiguous().t()  # whose outermost dimension is the second: no sample
    optimizer.state[params[1]]["path"] = torch.ones(5)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    paths = [optimizer.state[param]["path"] for param in params]
    assert [path.shape for path in paths] == [(64, 1024), (3, 4)]
    torch.testing.assert_close(optimizer.lr_scales()[0], scale, rtol=0, atol=0)  # zero gradients teach nothing
    assert all(float(optimizer.state[param]["step"]) == 3 for param in params)


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
@pytest.mark.parametrize("name", WALK)
def test_a_walk_that_is_not_a_number_is_the_same_to_both_back_ends(name: str, variant: str) -> None:
    """Of a damaged checkpoint, say. Adam's part of the step goes on."""
    scales = []
    for fused in (False, True):
        (param,) = parameters([(50, 30)])
        optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
        for step in range(8):
            if step == 3:
                optimizer.state[param][name].fill_(float("nan"))
            param.grad = torch.ones_like(param)
            optimizer.step()
        scales.append(optimizer.state[param]["lr_scale"].item())
        assert optimizer.state[param]["step"].item() == 8 and param.isfinite().all()
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "path"])
def test_state_that_the_user_breaks_is_refused(key: str, variant: str, fused: bool) -> None:
    """State may be replaced at any time, so a step must look."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    good = optimizer.state[params[1]][key]
    sizes = (torch.zeros(3), good[:-1]) if key != "path" else ()
    for bad in (good.to(torch.int64), *sizes):
        optimizer.state[params[1]][key] = bad
        set_gradients(params, 3)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match=rf"param group 0, parameter 1\b.*{key}"):
            optimizer.step()
        assert snapshot(optimizer) == before
    optimizer.state[params[1]][key] = good
    optimizer.step()


def test_other_numbers_of_groups_or_parameters_are_refused(variant: str) -> None:
    source = VARIANTS[variant](parameters())
    train(source, 1)
    for shapes in ([(5, 3)], [(5, 3), (7,), (2, 3, 4), (1,)]):
        target = VARIANTS[variant](parameters(shapes))
        with pytest.raises(ValueError, match="size of optimizer's group"):
            target.load_state_dict(source.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint's view, in one process


def small_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))


def train_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(model.parameters(), step)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_state_dict(flatten: bool, variant: str, fused: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = small_model()
    optimizer = VARIANTS[variant](model.parameters(), fused=fused, **LIVELY[variant])
    train_model(model, optimizer, 3)
    taken = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    if flatten:
        allowed = (torch.Tensor, int, float, str, bool, type(None), tuple)
        assert all(isinstance(value, allowed) for value in taken.values())
    resumed_model = small_model(seed=1)
    resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = VARIANTS[variant](resumed_model.parameters(), fused=fused, **LIVELY[variant])
    set_optimizer_state_dict(resumed_model, resumed, taken, options=options)
    assert results(resumed) == results(optimizer)
    train_model(model, optimizer, 3, first=3)
    train_model(resumed_model, resumed, 3, first=3)
    assert results(resumed) == results(optimizer)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_distributed_checkpoint_initializes_an_unstepped_optimizer(tensor_lr: bool, variant: str, fused: bool) -> None:
    """It takes one step with zero gradients and lr 0: no parameter may move, and no scale."""
    model = small_model()
    before = [frozen(p) for p in model.parameters()]
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = VARIANTS[variant](model.parameters(), lr=lr, fused=fused, initial_scale=0.5)
    taken = get_optimizer_state_dict(model, optimizer)
    assert [frozen(p) for p in model.parameters()] == before
    assert all(state["lr_scale"].item() == 0.5 for state in taken["state"].values())
    assert not any(state[key].any() for state in taken["state"].values() for key in ("path", *WALK))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_save_and_load(tmp_path: Path, variant: str, fused: bool) -> None:
    """Through torch.distributed.checkpoint's own files."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = small_model()
    optimizer = VARIANTS[variant](model.parameters(), fused=fused)
    train_model(model, optimizer, 3)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    resumed_model = small_model()
    resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = VARIANTS[variant](resumed_model.parameters(), fused=fused)
    target = {"optimizer": get_optimizer_state_dict(resumed_model, resumed, options=options)}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(resumed_model, resumed, target["optimizer"], options=options)
    assert results(resumed) == results(optimizer)
