"""Every variant under every way to shard: the run is that of one process.

What is compared: all parameters after every step in float64, where rounding cannot hide a wrong sum; the scale of every
parameter after every step, with the single-process run and, bit for bit, among the ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from sharded_models import (
    LAYOUTS,
    LIVELY,
    MORE_LAYOUTS,
    VARIANTS,
    Sharded,
    full_parameters,
    make_model,
    on_all_ranks,
    scales_by_name,
)

STEPS = 8


def compare_runs(
    layout: str,
    variant: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    default_dtype: torch.dtype = torch.float32,
) -> float:
    """Train sharded and alone, under a default dtype set once the models are made; return how far the scales moved."""
    make = functools.partial(VARIANTS[variant], **{**LIVELY, **options})
    sharded = (LAYOUTS | MORE_LAYOUTS)[layout][1](make_model(dtype), make)
    alone_model = make_model(dtype)
    alone = Sharded(alone_model, make(alone_model.parameters()), 0, 1)
    torch.set_default_dtype(default_dtype)
    for step in range(STEPS):
        sharded.step(step, dtype)
        alone.step(step, dtype)
        expected_params, params = full_parameters(alone), full_parameters(sharded)
        assert params.keys() == expected_params.keys()
        for name, expected in expected_params.items():
            difference = (params[name] - expected).abs().max().item()
            assert difference <= tolerance, f"step {step}, {name}: parameters differ by {difference}"
        expected_scales = scales_by_name(alone)
        by_rank = on_all_ranks(scales_by_name(sharded))
        assert set().union(*by_rank) == set(expected_scales)
        for name, expected in expected_scales.items():
            seen = {scales[name] for scales in by_rank if name in scales}
            assert len(seen) == 1, f"step {step}, {name}: ranks have different scales {seen}"
            # A float32 that float64 sums in another order may round to its neighbour.
            assert seen.pop() == pytest.approx(expected, rel=max(2e-7, tolerance)), f"step {step}, {name}"
    return max(abs(scale - 1.0) for scale in scales_by_name(alone).values())


def run(
    world: World, layout: str, variant: str, tolerance: float = 5e-8, dtype: torch.dtype = torch.float64, **options: Any
) -> None:
    moved = world.run(compare_runs, layout, variant, options, dtype, tolerance)
    if options.get("adapt_lr", True):
        assert all(m > 0.05 for m in moved), f"scales hardly moved, nothing was tested: {moved}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_run_is_the_single_process_run(worlds, layout: str, variant: str) -> None:
    run(worlds[LAYOUTS[layout][0]], layout, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "layout", ["fsdp2-4", "hsdp-2x2", "tp-2", "fsdp2-tp-2x2", "fsdp1-4", "fsdp1-ignoring", "zero1-2"]
)
def test_cautious_initial_scale_of_shards_is_that_of_the_whole(worlds, layout: str, variant: str) -> None:
    """A rate so large that the first scales are small, by sums over all elements of the whole parameters."""
    if layout == "zero1-2" and variant != "Global":
        pytest.skip("each rank has whole parameters of its own, and nothing is sent: its scales start from those")
    run(worlds[(LAYOUTS | MORE_LAYOUTS)[layout][0]], layout, variant, initial_scale="cautious", lr=0.3)


@pytest.mark.parametrize("variant", ["Global", "Smoothed"])
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_ways_to_shard(worlds, layout: str, variant: str) -> None:
    run(worlds[MORE_LAYOUTS[layout][0]], layout, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["fsdp2-4", "fsdp2-tp-2x2", "fsdp1-4"])
def test_pytorch_back_end(worlds, layout: str, variant: str) -> None:
    run(worlds[LAYOUTS[layout][0]], layout, variant, fused=False)


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True, "decoupled_weight_decay": True},
        {"reference": 1.0, "maximize": True, "lr": 0.002},
        {"adapt_lr": False},
    ],
    ids=str,
)
def test_options(world4: World, options: dict[str, Any]) -> None:
    run(world4, "fsdp2-4", "Local", **options)


@pytest.mark.parametrize("variant", ["Global", "Local"])
def test_other_default_dtype_and_device(world4: World, variant: str) -> None:
    """What is sent has the same size and place whatever the defaults are (FSDP1: some ranks have empty shards)."""
    world4.run(compare_runs_under_other_defaults, variant)


def compare_runs_under_other_defaults(variant: str) -> None:
    # Ranks that would follow the defaults would send numbers of different sizes.
    default_dtype = torch.bfloat16 if dist.get_rank() == 1 else torch.float64
    try:
        compare_runs("fsdp1-4", variant, {}, torch.float64, 5e-8, default_dtype)
    finally:
        torch.set_default_dtype(torch.float32)
