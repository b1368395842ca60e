"""What a back end works on: tensors of a step, and the three verbs it offers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .options import GroupOptions


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Only a copy to the CPU waits: its reader would not."""
    return tensor.to(device, non_blocking=device.type != "cpu")


class Location(NamedTuple):
    """Which parameter of an optimizer."""

    group_index: int
    param_index: int


class TensorWork(NamedTuple):
    """One parameter tensor that takes part in a step: validated, with its state prepared."""

    group_index: int
    param_index: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]

    @property
    def location(self) -> Location:
        return Location(self.group_index, self.param_index)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step reads beside the tensors: options and learning rate per group, and the GradScaler's scalars."""

    options: Sequence[GroupOptions]
    lrs: Sequence[float | Tensor]
    grad_scale: Tensor | None
    found_inf: Tensor | None


class Batch(Protocol):
    """Tensors that share device and dtypes, in one back end, in one step. Called in the order measure, adapt, apply."""

    works: Sequence[TensorWork]
    """The tensors; a batch kept for later steps lets go of them."""

    locations: Sequence[Location]
    """Where they are among the param groups; in the order of `works`."""

    def measure(self) -> Tensor:
        """Update moments and path; under `deferred` also take the step, with the scales from before.

        Returns:
            float64 [n, 2] on the tensors' device: N_i, the squared norm of the path, and n_i * kappa_{t_i}.
        """
        ...

    def adapt(self, sums: Tensor | None) -> None:
        """Count the step and let each tensor's scale follow its `sums` [n, 2]; None: scales are set elsewhere."""
        ...

    def apply(self) -> None:
        """Take the step with the scales as they are now; nothing under `deferred`."""
        ...
