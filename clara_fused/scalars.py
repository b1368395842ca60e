"""The scalars of tensors in plain PyTorch: what adapt reads and writes, without gradients, moments or parameters.

Serves the tensors of the PyTorch back end, and those that only other ranks have a gradient of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import adaptation
from .options import GroupOptions, readable
from .state import WALK


class TensorScalars:
    """The 0-dim entries in the states of n tensors of one param group and device.

    Args:
        states: complete ones.
        moves: whether lr is not 0; a bool, or a 0-dim bool tensor on the device.
        keep: where set, nothing is written and evidence is 0; a bool tensor, 0-dim or [n]. None: nowhere.
    """

    def __init__(
        self, states: Sequence[dict[str, Any]], options: GroupOptions, moves: bool | Tensor, keep: Tensor | None
    ) -> None:
        self._states, self._options, self._keep = states, options, keep
        # A kernel writes it: a copy from the host would wait.
        self._moves = moves if isinstance(moves, Tensor) else torch.full((), moves, device=states[0]["step"].device)

    def column(self, name: str) -> Tensor:
        """An entry of all states, [n]; a copy."""
        return torch.stack([state[name] for state in self._states])

    @cached_property
    def steps(self) -> Tensor:
        """The number of this step, from 1, float64 [n]."""
        steps = self.column("step")
        return steps.to(adaptation.scalar_dtype(steps.device)) + 1.0

    def adapt(self, sums: Tensor, one_scale: bool) -> Tensor:
        """Count the step, move walks on and, unless there is one for all, scales; see `step.Bucket.adapt`."""
        walks = torch.stack([self.column(name) for name in WALK], dim=-1)
        walks = adaptation.advanced_walks(walks, sums, self._options, self.steps, self._moves)
        for name, values in zip(WALK, walks.unbind(-1), strict=True):
            self._write(name, values)
        self._write("step", self.steps)
        evidence = adaptation.evidence_of(sums, walks, self._options, self._moves)
        if not one_scale:
            self._write("lr_scale", adaptation.adapted_scales(self.column("lr_scale"), evidence, self._options))
        return evidence if self._keep is None else torch.where(self._keep.unsqueeze(-1), 0.0, evidence)

    def _write(self, name: str, values: Tensor) -> None:
        targets = [state[name] for state in self._states]
        values = values.to(targets[0].dtype)
        if self._keep is not None:
            values = torch.where(self._keep, torch.stack(targets), values)
        distribute(values, targets)


def distribute(values: Tensor, targets: list[Tensor]) -> None:
    """Copy the rows of `values` to tensors of their own."""
    if readable(targets[0]):
        torch.unbind_copy(values.to(targets[0].dtype), 0, out=targets)  # makes no Python objects of the rows
    else:
        torch._foreach_copy_(targets, list(values.unbind()))
