"""Shards made by others without a word to the optimizer: noticed, so that their sums do not go silently wrong."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..tensors import describe
from .placement import ParamGroups, is_fsdp1_shard, located


def check_shards(param_groups: ParamGroups, process_group: Any, one_scale: bool) -> None:
    """Check that the optimizer can know of what whole tensors plain parameters are parts.

    FSDP1's shards and DeepSpeed's partitions carry no way to their process group or to the tensors they are made of.
    `torch.optim.Adam` need not know; a learning-rate scale that follows a part of a tensor would be another one on each
    rank.

    Raises:
        ValueError: it cannot; says what to do.
    """
    ranks = torch.distributed.get_world_size() if _is_distributed() else 1
    without_group = process_group is None and ranks > 1
    for location, param in located(param_groups):
        is_alone = len(param_groups[location.group_index]["params"]) == 1
        problem = _problem(param, is_alone, without_group, one_scale)
        if problem is not None:
            raise ValueError(f"{describe(*location, param)} {problem}. See docs/distributed.md")


def _problem(param: Tensor, is_alone: bool, without_group: bool, one_scale: bool) -> str | None:
    if is_fsdp1_shard(param):
        if without_group:
            return (
                "is a shard of FSDP1, whose process group an optimizer cannot find: pass process_group=, the group "
                "FullyShardedDataParallel shards over (torch.distributed.group.WORLD unless you gave it another; under "
                "NO_SHARD a group of this rank alone), or use FSDP2"
            )
    elif hasattr(param, "ds_id"):
        return (
            "belongs to DeepSpeed ZeRO stage 3, which steps its parts one after the other, so that there is no whole "
            "to adapt to: use AdamClaraGlobal with stage 1 or 2, or FSDP2"
        )
    elif is_alone and _is_flat_partition(param):
        if not one_scale:
            return (
                "is a flat partition of DeepSpeed, in which there are no tensors to have a learning-rate scale each: "
                "use AdamClaraGlobal, or FSDP2 instead of DeepSpeed"
            )
        if without_group:
            return (
                "is one rank's flat partition of DeepSpeed: pass process_group=, the data-parallel group "
                "(torch.distributed.group.WORLD without model parallelism)"
            )
    return None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_flat_partition(param: Tensor) -> bool:
    """Whether DeepSpeed has put this in place of a group's parameters: a vector that is no `nn.Parameter`.

    It is then the only one of its group. Without ZeRO, DeepSpeed may put a whole copy in place of each parameter.
    """
    return "deepspeed" in sys.modules and _is_distributed() and param.dim() == 1 and type(param) is Tensor
