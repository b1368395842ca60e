"""Whole-tensor sums for sharded parameters."""

from __future__ import annotations

from torch import Tensor


def is_sharded(param: Tensor) -> bool:
    """Whether the parameter is a DTensor."""
    return hasattr(param, "device_mesh") and hasattr(param, "placements")


def refuse_sharded(param: Tensor, group_index: int, param_index: int) -> None:
    """Raise NotImplementedError for a DTensor parameter."""
    if is_sharded(param):
        raise NotImplementedError(
            f"param group {group_index}, parameter {param_index}: DTensor parameters are not supported yet"
        )
