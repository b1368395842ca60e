"""The optimizers of the study by name, each built from an initial learning rate and the number of steps.

Optimizers without a learning rate (Prodigy, D-Adaptation) get the initial rate as their first estimate d0: it plays the
same part.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clara_fused

COSINE_WEIGHT_DECAY = 0.01

VARIANTS: dict[str, type[clara_fused.AdamClara]] = {
    "global": clara_fused.AdamClaraGlobal,
    "local": clara_fused.AdamClaraLocal,
    "smoothed": clara_fused.AdamClaraSmoothed,
}


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]] = {
    "cosine": lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
    "warm-up": lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=0.01, total_iters=steps // 10
    ),
}


@dataclass
class Trainer:
    """An optimizer, its schedule and bound of the gradients' norm if it has them, and the rates in force."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    max_grad_norm: float | None = None

    def step(self) -> None:
        if self.max_grad_norm is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def rates(self) -> Tensor:
        """Learning rate in force per parameter tensor, [tensors]."""
        if isinstance(self.optimizer, clara_fused.AdamClara):
            return torch.cat(self.optimizer.effective_lrs())
        return torch.tensor(
            [
                float(group.get("d", 1.0)) * float(group["lr"])  # d: the estimate of Prodigy and D-Adaptation
                for group in self.optimizer.param_groups
                for _ in group["params"]
            ]
        )

    def evaluation_mode(self, on: bool) -> None:
        """Schedule-free optimizers evaluate at another point than they differentiate at."""
        switch = getattr(self.optimizer, "eval" if on else "train", None)
        if switch is not None:
            switch()


@dataclass(frozen=True)
class Contender:
    """`options` goes into the key of a run: other options are another run."""

    name: str
    label: str
    build: Callable[[Sequence[Tensor], float, int], Trainer]
    options: Mapping[str, Any] = field(default_factory=dict)


def _adamw_with_cosine(params: Sequence[Tensor], lr: float, steps: int) -> Trainer:
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=COSINE_WEIGHT_DECAY)
    return Trainer(optimizer, SCHEDULES["cosine"](optimizer, steps))


def _peer(module: str, class_name: str, lr_argument: str, params: Sequence[Tensor], lr: float, steps: int) -> Trainer:
    return Trainer(getattr(importlib.import_module(module), class_name)(params, **{lr_argument: lr}))


def clara(
    variant: str,
    *,
    cautious: bool = False,
    schedule: str | None = None,
    max_grad_norm: float | None = None,
    **options: Any,
) -> Contender:
    """A variant with some options changed. Its key holds all options, so that a changed default is another run.

    Args:
        cautious: start from the `initial_scale` that `cautious_initial_scale` finds for the task and its initial rate.
        schedule: one of `SCHEDULES`.
        max_grad_norm: the gradients' norm is clipped to it.
    """
    cls = VARIANTS[variant]
    around = {name: value for name, value in (("schedule", schedule), ("max_grad_norm", max_grad_norm)) if value}

    def build(params: Sequence[Tensor], lr: float, steps: int) -> Trainer:
        start = {"initial_scale": clara_fused.cautious_initial_scale(params, lr)} if cautious else {}
        optimizer = cls(params, lr=lr, **options, **start)
        return Trainer(optimizer, SCHEDULES[schedule](optimizer, steps) if schedule else None, max_grad_norm)

    in_force = {**cls([torch.zeros(1)], **options).defaults, **around}
    del in_force["lr"]
    if cautious:
        in_force["initial_scale"] = "cautious"
    text = _options_text({**options, **around})
    return Contender(variant + text, cls.__name__ + text, build, {name: repr(v) for name, v in in_force.items()})


def _options_text(options: Mapping[str, Any]) -> str:
    return "".join(f",{name}={_short(value)}" for name, value in options.items())


def _short(value: Any) -> str:
    return "-".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


AS_PUBLISHED = {"accumulate": False, "reference": 1.0, "damping": 1.0}
# Bounds that never bind: from 1e-6, four decades are not enough for every task.
_MEASURED_WALK = {"reference": "measured_walk", "damping": 0.5, "scale_bounds": (1e-8, 1e8)}
MEASURED_WALK: dict[str, dict[str, Any]] = {
    "global": _MEASURED_WALK,
    "local": _MEASURED_WALK,
    # Averaged with nine tenths of the old scale, as by default, the climb would be half a percent a step and a fall 5%
    # at most. So it climbs by 5%, as the other two, and falls by up to a quarter.
    "smoothed": {**_MEASURED_WALK, "damping": 0.25, "lr_smoothing": 0.5},
}
# Two decades below the given rate: it is climbed back where the rate was right, and spares the network where it was far
# too large.
LOW_START_SCALE = 1e-2


def _renamed(name: str, label: str, contender: Contender) -> Contender:
    return Contender(name, label, contender.build, contender.options)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("adam", "Adam", lambda params, lr, steps: Trainer(torch.optim.Adam(params, lr=lr))),
        Contender(
            "adamw-cosine", "AdamW, cosine", _adamw_with_cosine, {"weight_decay": COSINE_WEIGHT_DECAY}
        ),
        *(clara(variant) for variant in VARIANTS),
        Contender("prodigy", "Prodigy", partial(_peer, "prodigyopt", "Prodigy", "d0")),
        Contender("dadaptation", "D-Adaptation", partial(_peer, "dadaptation", "DAdaptAdam", "d0")),
        Contender("schedulefree", "Schedule-free AdamW", partial(_peer, "schedulefree", "AdamWScheduleFree", "lr")),
        *(
            _renamed(f"{variant}-published", f"{cls.__name__} as first published", clara(variant, **AS_PUBLISHED))
            for variant, cls in VARIANTS.items()
        ),
        *(
            _renamed(f"{variant}-deferred", f"{cls.__name__} deferred", clara(variant, deferred=True))
            for variant, cls in VARIANTS.items()
        ),
        *(
            _renamed(f"{variant}-measured", f"{cls.__name__}, measured walk", clara(variant, **MEASURED_WALK[variant]))
            for variant, cls in VARIANTS.items()
        ),
        *(
            _renamed(f"{variant}-cautious", f"{cls.__name__}, cautious start", clara(variant, cautious=True))
            for variant, cls in VARIANTS.items()
        ),
        *(
            _renamed(
                f"{variant}-measured-cautious",
                f"{cls.__name__}, measured walk, cautious start",
                clara(variant, cautious=True, **MEASURED_WALK[variant]),
            )
            for variant, cls in VARIANTS.items()
        ),
        *(
            _renamed(f"{variant}-measured-low", f"{VARIANTS[variant].__name__}, measured walk, low start",
                     clara(variant, **MEASURED_WALK[variant], initial_scale=LOW_START_SCALE))
            for variant in ("global", "local")
        ),
    )
}


def variation(base: str, **changes: Any) -> Contender:
    """A variant, or a variant with the measured walk ("global-measured"), with some options changed."""
    variant, _, measured = base.partition("-")
    options = MEASURED_WALK[variant] if measured else {}
    text = _options_text(changes)
    return _renamed(base + text, CONTENDERS[base].label + text, clara(variant, **{**options, **changes}))
