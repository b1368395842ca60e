"""The curves of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class History:
    """Loss and effective learning rates at every step, loss and accuracy on held-out data at some.

    ``record`` takes tensors and leaves them on their device; ``flush`` brings all recorded since the last time over at
    once. On a GPU the training loop thus waits for the device once per ``flush``, not at every step.
    """

    training_loss: list[float] = field(default_factory=list)
    lr_min: list[float] = field(default_factory=list)  # over the parameter tensors, as are the next two
    lr_median: list[float] = field(default_factory=list)
    lr_max: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    _pending_losses: list[Tensor] = field(default_factory=list, repr=False)
    _pending_lrs: list[Tensor] = field(default_factory=list, repr=False)

    def record(self, loss: Tensor, effective_lrs: Tensor) -> None:
        self._pending_losses.append(loss.detach())
        self._pending_lrs.append(effective_lrs)

    def record_validation(self, step: int, loss: float, accuracy: float) -> None:
        self.validation_steps.append(step)
        self.validation_loss.append(loss)
        self.validation_accuracy.append(accuracy)

    def flush(self) -> None:
        if not self._pending_losses:
            return
        lrs = torch.stack(self._pending_lrs).cpu()
        self.training_loss += torch.stack(self._pending_losses).tolist()
        self.lr_min += lrs.min(dim=1).values.tolist()
        self.lr_median += lrs.median(dim=1).values.tolist()
        self.lr_max += lrs.max(dim=1).values.tolist()
        self._pending_losses.clear()
        self._pending_lrs.clear()

    def recent_training_loss(self, steps: int = 20) -> float:
        recent = self.training_loss[-steps:]
        return math.fsum(recent) / len(recent) if recent else math.nan

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {name: list(values) for name, values in vars(self).items() if not name.startswith("_")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> History:
        return cls(**{name: list(values) for name, values in state.items()})
