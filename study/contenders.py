"""The optimizers of the study, each built from an initial learning rate and the number of steps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import clara_fused

OURS: dict[str, type[clara_fused.AdamClara]] = {
    "global": clara_fused.AdamClaraGlobal,
    "local": clara_fused.AdamClaraLocal,
    "smoothed": clara_fused.AdamClaraSmoothed,
}
# Not imported before they are needed: the peers are an extra.
OPTIMIZERS = {
    "adam": ("torch.optim", "Adam"),
    "adamw": ("torch.optim", "AdamW"),
    **{name: ("clara_fused", cls.__name__) for name, cls in OURS.items()},
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
}


@dataclass
class Trainer:
    """An optimizer, its schedule if it has one, and the rates in force."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None

    def step(self) -> None:
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def rates(self) -> Tensor:
        """Learning rate in force per parameter tensor, [tensors]."""
        if isinstance(self.optimizer, clara_fused.AdamClara):
            return torch.cat(self.optimizer.effective_lrs())
        # d: Prodigy's estimate.
        return torch.tensor([float(g.get("d", 1.0)) * float(g["lr"]) for g in self.optimizer.param_groups])

    def evaluation_mode(self, on: bool) -> None:
        """Schedule-free optimizers evaluate at another point than they differentiate at."""
        switch = getattr(self.optimizer, "eval" if on else "train", None)
        if switch is not None:
            switch()


@dataclass(frozen=True)
class Contender:
    """An optimizer and what is changed in it; other options are another run.

    options: the optimizer's own.
    warm_up: share of the steps in which the rate rises linearly. final: share of the rate at which a cosine ends; None:
        the rate stays.
    sampled_from: elements from which a tensor keeps the path of a sample, in place of the package's constant.
    """

    name: str
    label: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    warm_up: float = 0.0
    final: float | None = None
    sampled_from: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As a record's key has them. All options of ours, so that a changed default is another run."""
        options = dict(self.options)
        if self.optimizer in OURS:
            options = {**OURS[self.optimizer]([torch.zeros(1)], **options).defaults}
            del options["lr"]
        around = [each for each in fields(self) if each.name in ("warm_up", "final", "sampled_from")]
        changed = {f.name: value for f in around if (value := getattr(self, f.name)) != f.default}
        return {name: repr(value) for name, value in options.items()} | changed

    def build(self, params: Sequence[Tensor], lr: float, steps: int) -> Trainer:
        module, name = OPTIMIZERS[self.optimizer]
        optimizer = getattr(importlib.import_module(module), name)(params, lr=lr, **self.options)
        if not self.warm_up and self.final is None:
            return Trainer(optimizer)
        return Trainer(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.share(step, steps)))

    def share(self, step: int, steps: int) -> float:
        """Of the rate, at a step counted from 0."""
        warm_up = round(self.warm_up * steps)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        if self.final is None:
            return 1.0
        done = (step - warm_up) / max(steps - warm_up, 1)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The threshold of sampled paths as this contender has it."""
        if self.sampled_from is None:
            yield
            return
        with mock.patch("clara_fused.state._MIN_SAMPLED", self.sampled_from):
            yield


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("adam", "Adam", "adam"),
        Contender("adamw-cosine", "AdamW, warm-up, cosine", "adamw", warm_up=0.1, final=0.0),
        *(Contender(name, cls.__name__, name) for name, cls in OURS.items()),
        Contender("prodigy", "Prodigy", "prodigy"),
        Contender("schedulefree", "Schedule-free AdamW", "schedulefree"),
    )
}
