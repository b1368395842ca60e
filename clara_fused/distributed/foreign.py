"""Shards made by others without a word to the optimizer: noticed, so that their sums do not go silently wrong."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..tensors import describe
from .placement import is_fsdp1_shard


def check_shards(param: Tensor, group_index: int, param_index: int, process_group: Any, one_scale: bool) -> None:
    """Check that the optimizer can know of what whole tensor a plain parameter is a part.

    FSDP1's shards and DeepSpeed's partitions carry no way to their process group or to the tensors they are made of.
    `torch.optim.Adam` need not know; a learning-rate scale that follows a part of a tensor would be another one on each
    rank.

    Raises:
        ValueError: it cannot; says what to do.
    """
    ranks = torch.distributed.get_world_size() if _is_distributed() else 1
    problem = None
    if is_fsdp1_shard(param):
        if process_group is None and ranks > 1:
            problem = (
                "is a shard of FSDP1, whose process group an optimizer cannot find: pass process_group=, the group "
                "FullyShardedDataParallel shards over (torch.distributed.group.WORLD unless you gave it another; under "
                "NO_SHARD a group of this rank alone), or use FSDP2"
            )
    elif hasattr(param, "ds_id"):
        problem = (
            "belongs to DeepSpeed ZeRO stage 3, which steps its parts one after the other, so that there is no whole "
            "to adapt to: use AdamClaraGlobal with stage 1 or 2, or FSDP2"
        )
    elif _is_flat_partition(param):
        if not one_scale:
            problem = (
                "is a flat partition of DeepSpeed, in which there are no tensors to have a learning-rate scale each: "
                "use AdamClaraGlobal, or FSDP2 instead of DeepSpeed"
            )
        elif process_group is None and ranks > 1:
            problem = (
                "is one rank's flat partition of DeepSpeed: pass process_group=, the data-parallel group "
                "(torch.distributed.group.WORLD without model parallelism)"
            )
    if problem is not None:
        raise ValueError(f"{describe(group_index, param_index, param)} {problem}. See docs/distributed.md")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_flat_partition(param: Tensor) -> bool:
    """Whether DeepSpeed has put this in place of a group's parameters: a vector that is no `nn.Parameter`."""
    return "deepspeed" in sys.modules and _is_distributed() and param.dim() == 1 and type(param) is Tensor
