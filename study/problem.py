"""What a task is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Mean losses at one moment; None where a task has no such thing."""

    training_loss: float
    validation_loss: float | None = None


class Problem(Protocol):
    """One instance of a task: what is trained, and losses on its own sequence of batches."""

    parameters: Sequence[Tensor]

    def next_loss(self) -> Tensor:
        """The loss on the next batch, to be differentiated."""
        ...

    def evaluate(self) -> Evaluation: ...


@dataclass(frozen=True)
class Task:
    """A problem for every seed and device, and how many steps an optimizer gets on it.

    For one seed every optimizer gets the same initial parameters and the same batches.

    goal: what a final training loss means: "loss" where its value does; "digits" where the optimum is 0 and what counts
        is the number of decimal digits by which the loss has come down.
    micro_batches: how many batches' gradients are averaged for a step.
    max_grad_norm: what the gradients' norm is clipped to.
    """

    name: str
    label: str
    steps: int
    make: Callable[[int, torch.device], Problem]
    goal: Literal["loss", "digits"] = "loss"
    micro_batches: int = 1
    max_grad_norm: float | None = None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all predictions: logits [..., classes], targets [...]."""
    return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """In evaluation mode (batch norm), and in pieces that bound the memory taken."""
    model.eval()
    pieces = zip(inputs.split(512), targets.split(512), strict=True)
    total = sum(cross_entropy(model(x), y).item() * len(x) for x, y in pieces)
    model.train()
    return total / len(inputs)
