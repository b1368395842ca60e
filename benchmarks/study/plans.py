"""Which runs a study makes, the most telling first, so that a study cut short is still a study."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from .contenders import CONTENDERS, VARIANTS, Contender, clara
from .runs import Run
from .tasks import TASKS, Task

DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Between them, where a tuned Adam may lie.
TUNING_LRS = (3e-4, 3e-3, 3e-2)
SEEDS = (0, 1, 2)

OURS = tuple(VARIANTS)
MAIN = ("adam", *OURS, "prodigy", "adamw-cosine", "schedulefree", "dadaptation")
PUBLISHED = tuple(f"{variant}-published" for variant in VARIANTS)
DEFERRED = tuple(f"{variant}-deferred" for variant in VARIANTS)
MEASURED = ("global-measured", "local-measured")


def runs_of(tasks: Iterable[Task], names: Iterable[str], lrs: Iterable[float], seed: int) -> list[Run]:
    return [Run(task, CONTENDERS[name], lr, seed) for name, task, lr in product(names, tasks, lrs)]


def full() -> list[Run]:
    """All tasks, all optimizers, seven decades, three seeds; the slow task after the others of a seed."""
    slow = [TASKS["gpt-text"]]
    fast = [task for task in TASKS.values() if task not in slow]
    extra = (*PUBLISHED, *DEFERRED)

    def main(tasks: list[Task], seed: int) -> list[Run]:
        return runs_of(tasks, MAIN, DECADES, seed) + runs_of(tasks, ("adam", *OURS), TUNING_LRS, seed)

    runs = main(fast, SEEDS[0]) + main(slow, SEEDS[0]) + runs_of(fast, extra, DECADES, SEEDS[0])
    for seed in SEEDS[1:]:
        runs += main(fast, seed)
    for seed in SEEDS[1:]:
        runs += main(slow, seed) + runs_of(fast, extra, DECADES, seed)
    return runs + [run for seed in SEEDS for run in runs_of(slow, extra, DECADES, seed)]


QUICK_TASKS = ("logistic-digits", "mlp-wine", "conv-digits", "rosenbrock-noise")


def quick() -> list[Run]:
    """Four small tasks, a third of the steps, one seed, every second decade."""
    tasks = [replace(TASKS[name], steps=TASKS[name].steps // 3) for name in QUICK_TASKS]
    return runs_of(tasks, MAIN, DECADES[::2], seed=0)


# One option changed at a time; what the defaults are, the optimizers themselves say.
SWEPT: dict[str, tuple[object, ...]] = {
    "smoothing": (0.02, 0.1, 0.2),
    "damping": (0.5, 1.0, 5.0),
    "clip": ((0.5, 1.02), (0.5, 1.1), (0.5, 1.2), (0.9, 1.05)),
    "initial_scale": (1e-1, 1e-2, 1e-3),
}
SWEPT_LR_SMOOTHING = (0.5, 0.8, 0.95)
SWEEP_TASKS = ("logistic-digits", "mlp-digits", "mlp-iris", "conv-digits", "rosenbrock-noise", "gpt-text")


def sweep_contenders() -> list[Contender]:
    return [
        clara(variant, **{option: value})
        for option, values in SWEPT.items()
        for variant in VARIANTS
        for value in values
        if value != default_of(variant, option)
    ] + [clara("smoothed", lr_smoothing=value) for value in SWEPT_LR_SMOOTHING]


def default_of(variant: str, option: str) -> object:
    return inspect.signature(VARIANTS[variant]).parameters[option].default


def sweep() -> list[Run]:
    """One option of the three optimizers changed at a time, on six tasks."""
    tasks = [TASKS[name] for name in SWEEP_TASKS]
    return [
        Run(task, contender, lr, 0)
        for lrs in ((1e-3, 1e-5, 1e-1), (1e-2, 1e-4, 1e-6, 1e0))
        for task, contender, lr in product(tasks, sweep_contenders(), lrs)
    ]


def measured() -> list[Run]:
    """The measured walk, to be compared with the records of `full`; the slow task last."""
    slow = [TASKS["gpt-text"]]
    fast = [task for task in TASKS.values() if task not in slow]
    lrs = (*DECADES, *TUNING_LRS)
    return [run for tasks in (fast, slow) for seed in SEEDS for run in runs_of(tasks, MEASURED, lrs, seed)]


PLANS = {"full": full, "quick": quick, "sweep": sweep, "measured": measured}
