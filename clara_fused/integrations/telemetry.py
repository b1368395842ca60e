"""Summaries of the scales and learning rates in force, without waiting for a device at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clara_fused import AdamClara

_STATISTICS = ("min", "median", "max")


def find_optimizer(optimizer: Any) -> AdamClara | None:
    """The AdamClara inside wrappers (accelerate, ZeroRedundancyOptimizer, Lightning), or None if there is none."""
    seen = set()
    while optimizer is not None and id(optimizer) not in seen:
        if isinstance(optimizer, AdamClara):
            return optimizer
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
    return None


class ScaleSummary:
    """Minimum, median and maximum per param group of mu and of lr * mu, as tensors that can be read later.

    Taking one neither waits for the device nor changes with later steps; `read` waits.
    """

    def __init__(self, optimizer: AdamClara) -> None:
        self._quantities = {
            "effective_lr": [_statistics(values) for values in optimizer.effective_lrs() if len(values)],
            "lr_scale": [_statistics(values) for values in optimizer.lr_scales() if len(values)],
        }

    def read(self, prefix: str = "clara") -> dict[str, float]:
        """`{prefix}/group{index}/{effective_lr or lr_scale}/{min, median or max}` -> value; groups with parameters."""
        return {
            f"{prefix}/group{index}/{quantity}/{name}": value
            for quantity, groups in self._quantities.items()
            for index, statistics in enumerate(groups)
            for name, value in zip(_STATISTICS, statistics.tolist(), strict=True)
        }


def _statistics(values: Tensor) -> Tensor:
    return torch.stack([values.min(), values.median(), values.max()])
