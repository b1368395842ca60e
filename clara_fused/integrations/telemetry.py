"""Summaries of the scales and learning rates in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clara_fused.optimizers import AdamClara


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


def scale_figures(optimizer: AdamClara, lrs: Sequence[float | Tensor], prefix: str) -> dict[str, float]:
    """Minimum, median and maximum per param group of mu and of lr * mu; waits for the device.

    Args:
        lrs: of `current_lrs`, before a scheduler moved them.

    Returns:
        `{prefix}/group{index}/{effective_lr or lr_scale}/{min, median or max}` -> value; groups with parameters.
    """
    figures = {}
    for index, (scales, lr) in enumerate(zip(optimizer.lr_scales(), lrs, strict=True)):
        if len(scales) == 0:
            continue
        if isinstance(lr, Tensor):
            lr = lr.to(scales.device, scales.dtype).reshape(())
        both = torch.stack([scales * lr, scales])
        numbers = torch.stack([both.amin(1), both.median(1).values, both.amax(1)], dim=1).tolist()
        for quantity, values in zip(("effective_lr", "lr_scale"), numbers, strict=True):
            for name, value in zip(("min", "median", "max"), values, strict=True):
                figures[f"{prefix}/group{index}/{quantity}/{name}"] = value
    return figures
