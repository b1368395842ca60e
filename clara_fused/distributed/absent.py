"""Tensors that have a gradient on other ranks only: FSDP1's empty shards, experts that only other ranks have used.

Their step count, walk and scale follow the whole tensor's, so that all ranks have the same; there is no gradient for
moments and parameter to move by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import adaptation
from ..state import WALK
from ..step import Location, StepInputs, moved

_NUMEL = adaptation.PathSums._fields.index("numel")


def has_gradient(sums: Tensor) -> Tensor:
    """Whether some rank has a gradient (with an element) of a tensor with these sums over all ranks, [..., 8]."""
    return sums[..., _NUMEL] > 0.0


class AbsentTensors:
    """Tensors of one group and device, without a gradient on this rank; the verbs and rows are those of a `Bucket`.

    Args:
        sums: float64 [n, 8], over the other ranks.
        states: complete ones.
    """

    def __init__(
        self, locations: Sequence[Location], sums: Tensor, states: Sequence[dict[str, Any]], inputs: StepInputs
    ) -> None:
        self.locations = locations
        self._sums, self._states = sums, states
        group_index = locations[0].group_index
        self._options = inputs.options[group_index]
        lr = inputs.lrs[group_index]
        self._moves = moved(lr, sums.device).reshape(()) != 0.0 if isinstance(lr, Tensor) else lr != 0.0
        self._takes_part = has_gradient(sums)
        if inputs.found_inf is not None:
            self._takes_part &= moved(inputs.found_inf, sums.device).reshape(()) == 0.0

    def advance(self) -> None:
        """Count the step and move the walks on; leaves `evidence`, float64 [n, 8]."""
        steps, walks = self._stacked("step"), torch.stack([self._stacked(name) for name in WALK], dim=1)
        following = steps.to(self._sums.dtype) + 1.0
        advanced = adaptation.advanced_walks(walks, self._sums, self._options, following, self._moves)
        advanced = torch.where(self._takes_part.unsqueeze(1), advanced, walks)
        evidence = adaptation.evidence_of(self._sums, advanced, self._options, following, self._moves)
        self.evidence = torch.where(self._takes_part.unsqueeze(1), evidence, 0.0)
        self._store("step", steps + self._takes_part)
        for column, name in enumerate(WALK):
            self._store(name, advanced[:, column])

    def rescale(self) -> None:
        """Let the scales follow each tensor's own evidence."""
        scales = self._stacked("lr_scale")
        adapted = adaptation.adapted_scales(scales, self.evidence, self._options)
        self._store("lr_scale", torch.where(self._takes_part, adapted, scales))

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([state[name] for state in self._states])

    def _store(self, name: str, values: Tensor) -> None:
        torch._foreach_copy_([state[name] for state in self._states], list(values.unbind()))
