"""Summaries of the scales and learning rates in force, without waiting for a device at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clara_fused.optimizers import AdamClara

_STATISTICS = ("min", "median", "max")


def find_optimizer(optimizer: Any) -> AdamClara | None:
    """The AdamClara inside wrappers (accelerate, ZeroRedundancyOptimizer, Lightning), or None if there is none.

    accelerate's wrapper hides `lr_scales`, `effective_lrs`, `enable_fused_amp` and `process_group`; what this returns
    has them.
    """
    seen = set()
    while optimizer is not None and id(optimizer) not in seen:
        if isinstance(optimizer, AdamClara):
            return optimizer
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
    return None


def current_lrs(optimizer: AdamClara) -> list[float | Tensor]:
    """Every param group's `lr`, to be read later: a scheduler that moves it does not change what was returned."""
    lrs = (group["lr"] for group in optimizer.param_groups)
    return [lr.detach().clone() if isinstance(lr, Tensor) else float(lr) for lr in lrs]


class ScaleSummary:
    """Minimum, median and maximum per param group of mu and of lr * mu, as tensors that can be read later.

    Taking one neither waits for the device nor changes with later steps; `read` waits.

    Args:
        lrs: of `current_lrs`, before a scheduler moved them; None: as they are now.
    """

    def __init__(self, optimizer: AdamClara, lrs: Sequence[float | Tensor] | None = None) -> None:
        scales = optimizer.lr_scales()
        rates = [
            scale * (lr.to(scale.device, scale.dtype, non_blocking=True).reshape(()) if isinstance(lr, Tensor) else lr)
            for scale, lr in zip(scales, current_lrs(optimizer) if lrs is None else lrs, strict=True)
        ]
        self._quantities = {
            name: {group: _statistics(values) for group, values in enumerate(groups) if len(values)}
            for name, groups in (("effective_lr", rates), ("lr_scale", scales))
        }

    def read(self, prefix: str = "clara") -> dict[str, float]:
        """`{prefix}/group{index}/{effective_lr or lr_scale}/{min, median or max}` -> value; groups with parameters."""
        return {
            f"{prefix}/group{index}/{quantity}/{name}": value
            for quantity, groups in self._quantities.items()
            for index, statistics in groups.items()
            for name, value in zip(_STATISTICS, statistics.tolist(), strict=True)
        }


def _statistics(values: Tensor) -> Tensor:
    return torch.stack([values.min(), values.median(), values.max()])
