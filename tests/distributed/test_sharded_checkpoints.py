"""Checkpoints of sharded runs: torch.distributed.checkpoint, other numbers of ranks, every form of state dict."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import World
from sharded_models import (
    LAYOUTS,
    LIVELY,
    VARIANTS,
    Sharded,
    full_parameters,
    make_model,
    on_all_ranks,
    scales_by_name,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from clara_fused.state import SCALARS, WALK

BEFORE, AFTER = 5, 4
FORMS: dict[str, StateDictOptions] = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "full-cpu-offload": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
# Layouts by the size of their world, as checkpoints are carried from one to another; "alone" is one plain process.
WORLD_SIZES = {name: size for name, (size, _) in LAYOUTS.items()} | {"alone": 1}


def build(layout: str, variant: str, seed: int = 3) -> Sharded:
    make = functools.partial(VARIANTS[variant], **LIVELY)
    model = make_model(seed=seed)
    if layout == "alone":
        return Sharded(model, make(model.parameters()), 0, 1)
    return LAYOUTS[layout][1](model, make)


def outcome(sharded: Sharded) -> tuple[dict[str, list[float]], dict[str, float]]:
    params = {name: value.flatten().tolist() for name, value in full_parameters(sharded).items()}
    return params, scales_by_name(sharded)


def train(sharded: Sharded, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        sharded.step(step)


def save(layout: str, variant: str, form: str, folder: str) -> tuple[Any, Any]:
    """Train, save, and go on without a break: the run that a resumed one is compared with."""
    sharded = build(layout, variant)
    train(sharded, 0, BEFORE)
    state = {
        "model": get_model_state_dict(sharded.model, options=StateDictOptions()),
        "optimizer": get_optimizer_state_dict(sharded.model, sharded.optimizer, options=FORMS[form]),
    }
    dcp.save(state, checkpoint_id=folder)
    train(sharded, BEFORE, AFTER)
    return outcome(sharded)


def resume(layout: str, variant: str, form: str, folder: str) -> tuple[Any, Any]:
    """Load into fresh objects with other weights and go on."""
    sharded = build(layout, variant, seed=4)
    state = {
        "model": get_model_state_dict(sharded.model, options=StateDictOptions()),
        "optimizer": get_optimizer_state_dict(sharded.model, sharded.optimizer, options=FORMS[form]),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(sharded.model, state["model"])
    set_optimizer_state_dict(sharded.model, sharded.optimizer, state["optimizer"], options=FORMS[form])
    train(sharded, BEFORE, AFTER)
    return outcome(sharded)


def assert_same(got: tuple[Any, Any], expected: tuple[Any, Any], bitwise: bool) -> None:
    if bitwise:
        assert got == expected
        return
    for values, expected_values in zip(got, expected, strict=True):
        assert values.keys() == expected_values.keys()
        for name, value in values.items():
            assert value == pytest.approx(expected_values[name], rel=2e-7, abs=5e-8), name


@pytest.mark.parametrize("form", ["sharded", "flattened"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_on_4_ranks_resumes_on_4_2_and_1(worlds, tmp_path: Path, variant: str, form: str) -> None:
    folder = str(tmp_path / "checkpoint")
    expected = worlds[4].run(save, "fsdp2-4", variant, form, folder)[0]
    for layout in ("fsdp2-4", "fsdp2-2", "alone"):
        for rank_outcome in worlds[WORLD_SIZES[layout]].run(resume, layout, variant, form, folder):
            assert_same(rank_outcome, expected, bitwise=layout == "fsdp2-4")


@pytest.mark.parametrize(
    ("saved_as", "resumed_as"),
    [
        ("alone", "fsdp2-4"),
        ("fsdp2-2", "hsdp-2x2"),
        ("fsdp2-tp-2x2", "fsdp2-2"),
        ("tp-2", "fsdp2-tp-2x2"),
        ("ddp-2", "tp-2"),
    ],
)
def test_resumes_under_another_layout(worlds, tmp_path: Path, saved_as: str, resumed_as: str) -> None:
    folder = str(tmp_path / "checkpoint")
    expected = worlds[WORLD_SIZES[saved_as]].run(save, saved_as, "Smoothed", "sharded", folder)[0]
    for rank_outcome in worlds[WORLD_SIZES[resumed_as]].run(resume, resumed_as, "Smoothed", "sharded", folder):
        assert_same(rank_outcome, expected, bitwise=False)


def through_memory(layout: str, variant: str, form: str) -> None:
    """get_optimizer_state_dict -> set_optimizer_state_dict on a second model."""
    options = FORMS[form]
    first = build(layout, variant)
    train(first, 0, BEFORE)
    model_state = get_model_state_dict(first.model, options=StateDictOptions(full_state_dict=options.full_state_dict))
    state = get_optimizer_state_dict(first.model, first.optimizer, options=options)
    if options.full_state_dict:
        tensors = [v for entry in state["state"].values() for v in entry.values()] if "state" in state else []
        assert not any(isinstance(value, DTensor) for value in tensors)
    # What was returned may be the live tensors.
    model_state, state = copy.deepcopy((model_state, state))
    train(first, BEFORE, AFTER)
    second = build(layout, variant, seed=4)
    if options.cpu_offload or (options.full_state_dict and layout == "fsdp2-tp-2x2"):
        # Only rank 0 has it with cpu_offload; and PyTorch 2.13 cannot cut strided shards out of whole weights.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(
        second.model,
        model_state,
        options=StateDictOptions(
            full_state_dict=options.full_state_dict, broadcast_from_rank0=options.broadcast_from_rank0
        ),
    )
    set_optimizer_state_dict(second.model, second.optimizer, state, options=options)
    train(second, BEFORE, AFTER)
    assert_same(outcome(second), outcome(first), bitwise=True)
    for param, entry in second.optimizer.state.items():
        for name in ("step", "lr_scale", *WALK):
            assert entry[name].shape == ()
            assert not isinstance(entry[name], DTensor)
        for name in ("exp_avg", "exp_avg_sq", "path"):
            assert type(entry[name]) is (DTensor if isinstance(param, DTensor) else torch.Tensor)
            if isinstance(param, DTensor):
                assert entry[name].placements == param.placements


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["fsdp2-2", "tp-2", "fsdp2-tp-2x2"])
def test_every_form_of_state_dict(worlds, layout: str, form: str) -> None:
    worlds[WORLD_SIZES[layout]].run(through_memory, layout, "Local", form)


@pytest.mark.parametrize("variant", ["Global", "Smoothed"])
def test_full_state_dicts_of_other_variants(world2: World, variant: str) -> None:
    world2.run(through_memory, "fsdp2-2", variant, "full-cpu-offload")


def plain_state_dict(layout: str, variant: str) -> None:
    """optimizer.state_dict() itself, on the same layout; and that of one process, with whole tensors, into shards."""
    first = build(layout, variant)
    train(first, 0, BEFORE)
    state, model_state = first.optimizer.state_dict(), {k: v.clone() for k, v in first.model.state_dict().items()}
    second = build(layout, variant, seed=4)
    second.model.load_state_dict(model_state)
    second.optimizer.load_state_dict(state)
    train(first, BEFORE, AFTER)
    train(second, BEFORE, AFTER)
    assert_same(outcome(second), outcome(first), bitwise=True)

    alone = build("alone", variant)
    train(alone, 0, BEFORE)
    third = build(layout, variant)
    train(third, 0, BEFORE)
    third.optimizer.load_state_dict(alone.optimizer.state_dict())
    fourth = build("alone", variant)
    train(fourth, 0, BEFORE)
    whole = first.optimizer.state_dict()
    fourth.optimizer.load_state_dict(third.optimizer.state_dict())
    assert whole["param_groups"][0]["params"] == list(range(len(whole["state"])))
    for sharded in (alone, third, fourth):
        train(sharded, BEFORE, AFTER)
    assert_same(outcome(third), outcome(alone), bitwise=False)
    assert_same(outcome(fourth), outcome(alone), bitwise=False)


@pytest.mark.parametrize(
    ("layout", "variant"), [("fsdp2-2", "Global"), ("fsdp2-2", "Smoothed"), ("fsdp2-tp-2x2", "Local")]
)
def test_own_state_dict_between_shards_and_whole_tensors(worlds, layout: str, variant: str) -> None:
    worlds[WORLD_SIZES[layout]].run(plain_state_dict, layout, variant)


def fsdp1_state_dict(variant: str) -> None:
    """Rank by rank; FullyShardedDataParallel.optim_state_dict mixes up moments on the CPU, torch Adam's as well."""
    first = build("fsdp1-4", variant)
    train(first, 0, BEFORE)
    state = copy.deepcopy(first.optimizer.state_dict())
    params = full_parameters(first)
    train(first, BEFORE, AFTER)
    second = build("fsdp1-4", variant, seed=4)
    with FullyShardedDataParallel.summon_full_params(second.model):
        for name, param in second.model.named_parameters():
            param.data.copy_(params[name.replace("_fsdp_wrapped_module.", "")])
    second.optimizer.load_state_dict(state)
    train(second, BEFORE, AFTER)
    assert_same(outcome(second), outcome(first), bitwise=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp1_state_of_each_rank(world4: World, variant: str) -> None:
    world4.run(fsdp1_state_dict, variant)


def fsdp1_whole_state_dict(variant: str) -> None:
    """FSDP1's own functions: what is 0-dim goes through; on ranks with an empty shard FSDP1 loads nothing."""
    first = build("fsdp1-4", variant)
    train(first, 0, BEFORE)
    whole = FullyShardedDataParallel.optim_state_dict(first.model, first.optimizer)
    scales = {name: entry["lr_scale"].item() for name, entry in whole["state"].items()}
    assert scales == {name: pytest.approx(scale) for name, scale in scales_by_name(first).items()}
    second = build("fsdp1-4", variant)
    parts = FullyShardedDataParallel.optim_state_dict_to_load(second.model, second.optimizer, copy.deepcopy(whole))
    second.optimizer.load_state_dict(parts)
    second.step(BEFORE)
    assert all(other == scales_by_name(second) for other in on_all_ranks(scales_by_name(second)))
    params = dict(second.model.named_parameters())
    for name in SCALARS:
        here = {key: second.optimizer.state[param][name].item() for key, param in params.items()}
        assert all(other == here for other in on_all_ranks(here)), name
    assert {entry["step"].item() for entry in second.optimizer.state.values()} == {BEFORE + 1}


@pytest.mark.parametrize("variant", ["Global", "Smoothed"])
def test_fsdp1_whole_state_dict(world4: World, variant: str) -> None:
    world4.run(fsdp1_whole_state_dict, variant)


def zero1_state_dict() -> None:
    first = build("zero1-2", "Global")
    train(first, 0, BEFORE)
    first.optimizer.consolidate_state_dict(0)
    states: list[Any] = [first.optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    # On the rank that sent it, it still is the live state, which ZeRO would go on sharing.
    states = copy.deepcopy(states)
    second = build("zero1-2", "Global", seed=4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(states[0])
    train(first, BEFORE, AFTER)
    train(second, BEFORE, AFTER)
    assert_same(outcome(second), outcome(first), bitwise=True)


def test_zero1_state_dict(world2: World) -> None:
    world2.run(zero1_state_dict)


def zero1_that_loads_its_own_state(fused: bool | None) -> list[list[float]]:
    """One rank has a single parameter, the other three; ZeRO replaces the states that the optimizer knows."""
    make = functools.partial(VARIANTS["Global"], **LIVELY, fused=fused, process_group=dist.group.WORLD)
    runs = []
    for loads in (False, True):
        params = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (40, 10, 10, 10)]
        optimizer = ZeroRedundancyOptimizer(params, optimizer_class=make)
        assert len(optimizer.optim.param_groups[0]["params"]) in (1, 3)
        for step in range(8):
            if loads and step == 4:
                optimizer.consolidate_state_dict(0)
                states: list[Any] = [optimizer.state_dict() if dist.get_rank() == 0 else None]
                dist.broadcast_object_list(states)
                optimizer.load_state_dict(copy.deepcopy(states[0]))
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(len(param), generator=generator, dtype=torch.float64) + 1.0
            optimizer.step()
        scales = {entry["lr_scale"].item() for entry in optimizer.optim.state.values()}
        assert len(scales) == 1
        runs.append([scales.pop(), *(param.sum().item() for param in params)])
    return runs


@pytest.mark.parametrize("fused", [None, False])
def test_zero1_that_loads_its_own_state_goes_on_bit_for_bit(world2: World, fused: bool | None) -> None:
    runs = [run for on_rank in world2.run(zero1_that_loads_its_own_state, fused) for run in on_rank]
    assert runs == [runs[0]] * 4


# --- checkpoints of other optimizers ---------------------------------------------------------------------------------


def of_adamw(layout: str, folder: str) -> None:
    """Train with torch.optim.AdamW, save, load into ours: what AdamW lacks is missing in the checkpoint."""
    sharded = LAYOUTS[layout][1](make_model(), functools.partial(torch.optim.AdamW, lr=0.02))
    train(sharded, 0, BEFORE)
    state = {
        "model": get_model_state_dict(sharded.model),
        "optimizer": get_optimizer_state_dict(sharded.model, sharded.optimizer),
    }
    dcp.save(state, checkpoint_id=folder)

    ours = LAYOUTS[layout][1](
        make_model(seed=4), functools.partial(VARIANTS["Local"], lr=0.02, decoupled_weight_decay=True)
    )
    state = {
        "model": get_model_state_dict(ours.model),
        "optimizer": get_optimizer_state_dict(ours.model, ours.optimizer),
    }
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(ours.model, state["model"])
    set_optimizer_state_dict(ours.model, ours.optimizer, state["optimizer"])
    for param, other in zip(ours.model.parameters(), sharded.model.parameters(), strict=True):
        entry, expected = ours.optimizer.state[param], sharded.optimizer.state[other]
        assert entry["step"].item() == BEFORE
        assert entry["lr_scale"].item() == 1.0  # it has been trained at this rate
        moments = [(entry[name], expected[name]) for name in ("exp_avg", "exp_avg_sq")]
        for got, want in moments:
            assert torch.equal(got.to_local(), want.to_local())
        assert not entry["path"].to_local().any()
    train(ours, BEFORE, AFTER)
    assert all(0.5 < scale < 2.0 for scale in scales_by_name(ours).values())


def test_adamw_checkpoint_through_dcp(world2: World, tmp_path: Path) -> None:
    world2.run(of_adamw, "fsdp2-2", str(tmp_path / "checkpoint"))
