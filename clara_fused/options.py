"""The hyperparameters of one param group, validated and frozen for one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from . import validation


class Variant(Enum):
    """What a learning-rate scale belongs to, and how it follows the path."""

    GLOBAL = "global"  # one scale for the optimizer, factor of the summed path norm
    LOCAL = "local"  # one scale per tensor, factor of its own path norm, at once
    SMOOTHED = "smoothed"  # one scale per tensor, a moving average of the factor's effect


# Every option but `lr`, which may change at each step and may be a tensor that must not be compared.
OPTION_NAMES = (
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "decoupled_weight_decay",
    "smoothing",
    "damping",
    "reference",
    "clip",
    "accumulate",
    "deferred",
    "initial_scale",
    "scale_bounds",
    "adapt_lr",
    "path_dtype",
)

# Global has one scale, so whatever decides on it must be the same in all groups.
GLOBAL_OPTION_NAMES = (
    "smoothing",
    "damping",
    "reference",
    "clip",
    "accumulate",
    "deferred",
    "initial_scale",
    "scale_bounds",
    "adapt_lr",
)


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Options of one param group, in the names of `docs/algorithm.md`; floats throughout.

    `clip` is (0, inf) for "not clipped", `lr_smoothing` is None except under AdamClaraSmoothed.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    smoothing: float
    damping: float
    reference: str | float
    clip: tuple[float, float]
    accumulate: bool
    deferred: bool
    initial_scale: float
    scale_bounds: tuple[float, float]
    adapt_lr: bool
    path_dtype: torch.dtype | None
    lr_smoothing: float | None

    @property
    def fixed_reference(self) -> float | None:
        """The number that the path is compared with; None for a walk."""
        return None if isinstance(self.reference, str) else self.reference

    @property
    def measured_walk(self) -> bool:
        """Whether the walk's steps are as long as the one just measured, not as pure noise would make them."""
        return self.reference == "measured_walk"

    @property
    def path_decay(self) -> float:
        """q: what is left of the path after one step."""
        return 1.0 - self.smoothing

    @property
    def path_gain(self) -> float:
        """s: weight of a new step in the path; makes unit white noise keep a unit path."""
        return math.sqrt(self.smoothing * (2.0 - self.smoothing))

    @property
    def factor_gain(self) -> float:
        """Logarithm of the scale's factor per unit of excess path."""
        return self.smoothing / (2.0 * self.damping)


def option_names(variant: Variant) -> tuple[str, ...]:
    """Names of the group options (without `lr`) that `variant` reads."""
    return (*OPTION_NAMES, "lr_smoothing") if variant is Variant.SMOOTHED else OPTION_NAMES


def option_values(group: Mapping[str, Any], variant: Variant) -> tuple[Any, ...]:
    """The options that `variant` reads as they stand now; lists are copied, as they can be changed in place."""
    values = [group[name] for name in option_names(variant)]
    return tuple([tuple(value) if isinstance(value, list) else value for value in values])


def read_options(group: Mapping[str, Any], group_index: int, variant: Variant) -> GroupOptions:
    """Validate the options of a param group as they stand now.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """
    validation.check_options(group, group_index, smoothed=variant is Variant.SMOOTHED)
    reference, clip = group["reference"], group["clip"]
    return GroupOptions(
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
        decoupled_weight_decay=bool(group["decoupled_weight_decay"]),
        smoothing=float(group["smoothing"]),
        damping=float(group["damping"]),
        reference=reference if isinstance(reference, str) else float(reference),
        clip=(0.0, math.inf) if clip is None else (float(clip[0]), float(clip[1])),
        accumulate=bool(group["accumulate"]),
        deferred=bool(group["deferred"]),
        initial_scale=float(group["initial_scale"]),
        scale_bounds=(float(group["scale_bounds"][0]), float(group["scale_bounds"][1])),
        adapt_lr=bool(group["adapt_lr"]),
        path_dtype=group["path_dtype"],
        lr_smoothing=float(group["lr_smoothing"]) if variant is Variant.SMOOTHED else None,
    )
