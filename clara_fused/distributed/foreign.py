"""Shards made by others without a word to the optimizer: noticed, so that their sums do not go silently wrong."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

from ..tensors import describe
from .placement import ParamGroups, is_distributed, is_fsdp1_shard, located, shards_of


def check_shards(param_groups: ParamGroups, all_groups: ParamGroups, process_group: Any, one_scale: bool) -> None:
    """Check that the optimizer can know of what whole tensors plain parameters are parts.

    FSDP1's shards and DeepSpeed's partitions carry no way to their process group or to the tensors they are made of.
    `torch.optim.Adam` need not know; a learning-rate scale that follows a part of a tensor would be another one on each
    rank.

    Args:
        all_groups: the optimizer's own list of groups, in whose place DeepSpeed's ZeRO puts one at a time.

    Raises:
        ValueError: it cannot; says what to do.
    """
    ranks = torch.distributed.get_world_size() if is_distributed() else 1
    without_group = process_group is None and ranks > 1
    if one_scale and without_group and _steps_for_zero_redundancy_optimizer():
        raise ValueError(f"AdamClaraGlobal inside of {_ZERO_WITHOUT_GROUP}. See docs/distributed.md")
    params = dict(located(param_groups))
    shards = shards_of(params)
    for location, param in params.items():
        problem = None
        if is_fsdp1_shard(param):
            problem = _FSDP1_WITHOUT_GROUP if without_group else None
        elif hasattr(param, "ds_id"):
            problem = _DEEPSPEED_STAGE_3
        elif location in shards:  # DeepSpeed's partition
            if not one_scale:
                problem = _DEEPSPEED_WITHOUT_TENSORS
            elif len(all_groups) > len(param_groups):
                problem = _DEEPSPEED_GROUP_BY_GROUP
            elif without_group:
                problem = _DEEPSPEED_WITHOUT_GROUP
        if problem is not None:
            raise ValueError(f"{describe(*location, param)} {problem}. See docs/distributed.md")


def _steps_for_zero_redundancy_optimizer() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is calling; it leaves no mark on parameters or optimizer."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe()
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return True
        frame = frame.f_back
    return False


_ZERO_WITHOUT_GROUP = (
    "ZeroRedundancyOptimizer sees this rank's parameters only, and each rank would find a scale of its own: pass "
    "optimizer_class=functools.partial(AdamClaraGlobal, process_group=torch.distributed.group.WORLD)"
)
_FSDP1_WITHOUT_GROUP = (
    "is a shard of FSDP1, whose process group an optimizer cannot find: pass process_group=, the group "
    "FullyShardedDataParallel shards over (torch.distributed.group.WORLD unless you gave it another; under NO_SHARD a "
    "group of this rank alone), or use FSDP2"
)
_DEEPSPEED_STAGE_3 = (
    "belongs to DeepSpeed ZeRO stage 3, which steps its parts one after the other, so that there is no whole to adapt "
    "to: use AdamClaraGlobal with stage 1 or 2, or FSDP2"
)
_DEEPSPEED_WITHOUT_TENSORS = (
    "is a flat partition of DeepSpeed, in which there are no tensors to have a learning-rate scale each: use "
    "AdamClaraGlobal, or FSDP2 instead of DeepSpeed"
)
_DEEPSPEED_GROUP_BY_GROUP = (
    "is a flat partition of DeepSpeed ZeRO, which steps param groups one after the other, so that there is no whole to "
    "adapt the one scale to: give all parameters in one group, or use FSDP2 instead of DeepSpeed"
)
_DEEPSPEED_WITHOUT_GROUP = (
    "is one rank's flat partition of DeepSpeed: pass process_group=, the data-parallel group "
    "(torch.distributed.group.WORLD without model parallelism)"
)
