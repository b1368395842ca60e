"""Shards that do not say so: FSDP1 and ZeRO without process_group, and vectors that DeepSpeed puts in their place."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from sharded_models import LIVELY, VARIANTS, make_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from clara_fused.distributed.placement import shards_of
from clara_fused.step import Location


def fsdp1_without_group(variant: str, use_orig_params: bool) -> str:
    wrapped = FullyShardedDataParallel(
        make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"), process_group=dist.group.WORLD
    )
    optimizer = VARIANTS[variant](wrapped.parameters(), **LIVELY)
    wrapped(torch.ones(4, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("variant", ["Global", "Local"])
def test_fsdp1_without_process_group_is_refused(world2: World, variant: str, use_orig_params: bool) -> None:
    for message in world2.run(fsdp1_without_group, variant, use_orig_params):
        assert "is a shard of FSDP1" in message
        assert "pass process_group=" in message


def fsdp1_without_group_after_loading() -> str:
    """The state of the right run does not make the wrong one right."""
    wrapped = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    right = VARIANTS["Local"](wrapped.parameters(), **LIVELY, process_group=dist.group.WORLD)
    wrapped(torch.ones(4, 6, dtype=torch.float64)).sum().backward()
    right.step()
    wrong = VARIANTS["Local"](wrapped.parameters(), **LIVELY)
    wrong.load_state_dict(right.state_dict())
    with pytest.raises(ValueError) as caught:
        wrong.step()
    return str(caught.value)


def test_fsdp1_without_process_group_is_refused_after_loading(world2: World) -> None:
    for message in world2.run(fsdp1_without_group_after_loading):
        assert "is a shard of FSDP1" in message


def fsdp1_on_one_rank() -> list[float]:
    wrapped = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = VARIANTS["Local"](wrapped.parameters(), **LIVELY)
    wrapped(torch.ones(4, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return optimizer.lr_scales()[0].tolist()


def test_fsdp1_on_one_rank_needs_no_group(world1: World) -> None:
    assert len(world1.run(fsdp1_on_one_rank)[0]) == 9


def step_under_deepspeed(variant: str, with_group: bool, params: list[torch.Tensor]) -> str:
    """DeepSpeed replaces the parameters after the optimizer was made; the module stands for its import."""
    model = make_model()
    optimizer: Any = VARIANTS[variant](
        model.parameters(), **LIVELY, process_group=dist.group.WORLD if with_group else None
    )
    optimizer.param_groups[0]["params"] = params
    for param in params:
        param.grad = torch.ones_like(param)
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    finally:
        del sys.modules["deepspeed"]
    return ""


def step_of_a_flat_vector(variant: str, with_group: bool) -> str:
    return step_under_deepspeed(variant, with_group, [torch.ones(8, requires_grad=True)])


def step_of_whole_copies(variant: str) -> str:
    """Without ZeRO: a clone for each parameter, of which biases are vectors."""
    return step_under_deepspeed(variant, False, [torch.ones(shape, requires_grad=True) for shape in ((3, 4), (3,))])


@pytest.mark.parametrize("variant", ["Local", "Global"])
def test_whole_copies_are_no_partitions(world2: World, variant: str) -> None:
    assert world2.run(step_of_whole_copies, variant) == ["", ""]


def known_shards(*groups: list[tuple[int, ...]]) -> int:
    """How many of plain tensors of these shapes, by param group, count as parts of something larger."""
    params = {
        Location(group_index, index): torch.ones(shape, requires_grad=True)
        for group_index, shapes in enumerate(groups)
        for index, shape in enumerate(shapes)
    }
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    try:
        return len(shards_of(params))
    finally:
        del sys.modules["deepspeed"]


def test_a_partition_is_the_only_one_of_its_group(world1: World) -> None:
    assert world1.run(known_shards, [(8,)], [(5,)]) == [2]
    assert world1.run(known_shards, [(8,), (3, 4)], [(2, 2)]) == [0]


def test_flat_partitions_are_noticed(world2: World) -> None:
    for message in world2.run(step_of_a_flat_vector, "Local", True):
        assert "use AdamClaraGlobal, or FSDP2 instead of DeepSpeed" in message
    for message in world2.run(step_of_a_flat_vector, "Global", False):
        assert "pass process_group=" in message
    assert world2.run(step_of_a_flat_vector, "Global", True) == ["", ""]


def test_a_vector_of_the_users_own_is_nobodys_partition() -> None:
    vector = torch.ones(8, requires_grad=True)
    vector.grad = torch.ones(8)
    optimizer = VARIANTS["Local"]([vector, nn.Parameter(torch.ones(2))], **LIVELY)
    optimizer.step()
    assert vector in optimizer.state


def zero_without_group(variant: str) -> str:
    model = make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=VARIANTS[variant], **LIVELY)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("variant", ["Local", "Global"])
def test_one_scale_inside_of_zero_needs_the_group(world2: World, variant: str) -> None:
    """Each rank found a scale of its own, 0.52 and 0.20 where the single process had 0.44."""
    for message in world2.run(zero_without_group, variant):
        assert ("pass optimizer_class=functools.partial(AdamClaraGlobal" in message) == (variant == "Global")
