"""A step: gather -> measure -> adapt -> update. What its parts hand to each other, and what a back end has to offer.

Words: a *tensor* is a parameter with its gradient and state, a *bucket* holds tensors that share device and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import adaptation
from .options import StepInputs


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy to a GPU does not wait; one to the CPU does, because it may be read at once."""
    return tensor.to(device, non_blocking=device.type != "cpu")


class Location(NamedTuple):
    """Which parameter of an optimizer."""

    group_index: int
    param_index: int


class TensorWork(NamedTuple):
    """A parameter with a gradient, checked, with its state complete. Of a DTensor: this rank's part, of all of them."""

    location: Location
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


class Bucket(Protocol):
    """Tensors of one device and dtypes, in one back end, for one step.

    Either `step`, or `measure`, `adapt`, `update`, in this order. If the step's `found_inf` is set,
    nothing is changed, and what is returned means nothing.
    """

    @property
    def locations(self) -> Sequence[Location]:
        """Where the tensors are among the param groups; rows of sums and evidence are in this order."""
        ...

    @property
    def device(self) -> torch.device: ...

    def measure(self) -> Tensor:
        """Write the path. Returns float64 [n, 9] on `device`, columns of `adaptation.PathSums`; this rank's part."""
        ...

    def adapt(self, sums: Tensor) -> Tensor:
        """Count the step and move the walks on, by whole-tensor sums [n, 9]; each scale follows its tensor's evidence.

        But for the one scale of AdamClaraGlobal, which follows the total: `adapt_one_scale`.

        Returns:
            float64 [n, 8] on `device`, columns of `adaptation.Evidence`.
        """
        ...

    def update(self) -> None:
        """Write moments and parameters, at the new rates."""
        ...

    def step(self) -> None:
        """All of it in one go, where no other bucket and no other rank has a part in the evidence."""
        ...


def adapt_one_scale(total: Tensor, scales: Iterable[Tensor], inputs: StepInputs) -> None:
    """Let the one scale of AdamClaraGlobal follow the total evidence [8], on every device that holds it."""
    scales = list(scales)
    if not scales or not inputs.options:  # a rank without parameters
        return
    scale = moved(scales[0], total.device)
    adapted = adaptation.adapted_scales(scale, total, inputs.options[0])
    if inputs.found_inf is not None:
        adapted = torch.where(moved(inputs.found_inf, total.device).reshape(()) != 0, scale, adapted)
    for target in scales:
        target.copy_(moved(adapted, target.device))
