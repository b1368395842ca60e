"""Which runs a study makes, the most telling first, so that a study cut short is still a study."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from .contenders import CONTENDERS, VARIANTS, Contender, variation
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
MEASURED = tuple(f"{variant}-measured" for variant in VARIANTS)
CAUTIOUS = tuple(f"{name}-cautious" for name in (*OURS, *MEASURED))
LOW_START = ("global-measured-low", "local-measured-low")

SLOW_TASKS = (TASKS["gpt-text"],)
FAST_TASKS = tuple(task for task in TASKS.values() if task not in SLOW_TASKS)


def runs_of(tasks: Iterable[Task], names: Iterable[str], lrs: Iterable[float], seed: int) -> list[Run]:
    return [Run(task, CONTENDERS[name], lr, seed) for name, task, lr in product(names, tasks, lrs)]


def full() -> list[Run]:
    """All tasks, all optimizers, seven decades, three seeds; the slow task after the others of a seed."""
    extra = (*PUBLISHED, *DEFERRED)

    def main(tasks: Iterable[Task], seed: int) -> list[Run]:
        return runs_of(tasks, MAIN, DECADES, seed) + runs_of(tasks, ("adam", *OURS), TUNING_LRS, seed)

    runs = main(FAST_TASKS, SEEDS[0]) + main(SLOW_TASKS, SEEDS[0]) + runs_of(FAST_TASKS, extra, DECADES, SEEDS[0])
    for seed in SEEDS[1:]:
        runs += main(FAST_TASKS, seed)
    for seed in SEEDS[1:]:
        runs += main(SLOW_TASKS, seed) + runs_of(FAST_TASKS, extra, DECADES, seed)
    return runs + [run for seed in SEEDS for run in runs_of(SLOW_TASKS, extra, DECADES, seed)]


QUICK_TASKS = ("logistic-digits", "mlp-wine", "conv-digits", "rosenbrock-noise")


def quick() -> list[Run]:
    """Four small tasks, a third of the steps, one seed, every second decade."""
    tasks = [replace(TASKS[name], steps=TASKS[name].steps // 3) for name in QUICK_TASKS]
    return runs_of(tasks, MAIN, DECADES[::2], seed=0)


# What is changed in the optimizers of `SWEPT`, one setting at a time or two that belong together. `deferred` is the
# yardstick: it takes the scale of one step earlier and changes nothing else, so it tells how far apart two settings end
# that are equally good.
Changes = tuple[dict[str, Any], ...]
_DEFERRED: Changes = ({"deferred": True},)
_SMOOTHING: Changes = ({"smoothing": 0.02}, {"smoothing": 0.1})
_ALL: Changes = (
    *_DEFERRED, {"smoothing": 0.01}, *_SMOOTHING, {"initial_scale": 1e-1}, {"initial_scale": 1e-3},
    {"scale_bounds": (1e-2, 1e2)}, {"scale_bounds": (1e-8, 1e8)},
)  # fmt: skip
_AT_ONCE: Changes = (
    *_ALL, {"damping": 0.5}, {"damping": 1.0}, {"damping": 5.0}, {"damping": 10.0},
    {"smoothing": 0.02, "damping": 1.0}, {"smoothing": 0.02, "damping": 5.0},
    {"clip": (0.5, 1.02)}, {"clip": (0.5, 1.1)},
)  # fmt: skip
_AVERAGED: Changes = (
    *_ALL, {"damping": 0.25}, {"damping": 1.0}, {"damping": 2.5},
    {"smoothing": 0.02, "damping": 0.2}, {"smoothing": 0.02, "damping": 1.0},
    {"clip": (0.5, 1.2)}, {"clip": (0.5, 1.5)}, {"lr_smoothing": 0.5}, {"lr_smoothing": 0.8}, {"lr_smoothing": 0.95},
)  # fmt: skip
_MEASURED_AT_ONCE: Changes = (
    *_DEFERRED, *_SMOOTHING, {"initial_scale": 1e-3}, {"scale_bounds": (1e-4, 1e4)},
    {"damping": 0.25}, {"damping": 1.0}, {"clip": (0.5, 1.02)}, {"clip": (0.9, 1.05)},
)  # fmt: skip
_MEASURED_AVERAGED: Changes = (
    *_DEFERRED, *_SMOOTHING, {"initial_scale": 1e-3},
    {"damping": 0.5, "lr_smoothing": 0.9}, {"damping": 0.1, "lr_smoothing": 0.9},
)  # fmt: skip
# What else a training often has.
_AROUND: Changes = (
    {"schedule": "cosine"}, {"schedule": "warm-up"}, {"max_grad_norm": 1.0},
    {"weight_decay": 0.01, "decoupled_weight_decay": True},
)  # fmt: skip
SWEPT: dict[str, Changes] = {
    "global": _AT_ONCE,
    "local": _AT_ONCE,
    "smoothed": (*_AVERAGED, *_AROUND),
    "global-measured": _MEASURED_AT_ONCE,
    "local-measured": (*_MEASURED_AT_ONCE, *_AROUND),
    "smoothed-measured": _MEASURED_AVERAGED,
}
SWEEP_LRS = (1e-3, 1e-5, 1e-1)
SWEEP_SEED = SEEDS[0]
# What the sweep found better than the defaults on small tasks, to be confirmed with all seeds.
CANDIDATES: dict[str, dict[str, Any]] = {
    "global": {"damping": 5.0},
    "smoothed": {"damping": 1.0},
}


def variations(base: str) -> list[Contender]:
    return [variation(base, **changes) for changes in SWEPT[base]]


def sweep() -> list[Run]:
    """The optimizers of `SWEPT` with one setting changed at a time; unchanged they are in `full` and `measured`."""
    return [
        Run(task, contender, lr, SWEEP_SEED)
        for tasks in (FAST_TASKS, SLOW_TASKS)
        for base in SWEPT
        for contender in variations(base)
        for task, lr in swept_pairs(base)
        if task in tasks
    ]


def swept_pairs(base: str) -> list[tuple[Task, float]]:
    """The tasks and rates of the sweep; the slow task with the defaults alone, and not from a rate that loses it."""
    slow = SLOW_TASKS if base in OURS else ()
    return [*product(FAST_TASKS, SWEEP_LRS), *product(slow, (lr for lr in SWEEP_LRS if lr <= 1e-3))]


def measured() -> list[Run]:
    """The measured walk, to be compared with the records of `full`."""
    return _everywhere(CONTENDERS[name] for name in (*MEASURED, *LOW_START))


def cautious() -> list[Run]:
    """The cautious start, to be compared with the records of `full` and `measured`."""
    return _everywhere(CONTENDERS[name] for name in CAUTIOUS)


def candidates() -> list[Run]:
    """`CANDIDATES` on the fast tasks, to be compared with the records of `full`; the slow task is in the sweep."""
    return [run for run in _everywhere(candidate_contenders()) if run.task in FAST_TASKS]


def candidate_contenders() -> list[Contender]:
    return [variation(base, **changes) for base, changes in CANDIDATES.items()]


def _everywhere(contenders: Iterable[Contender]) -> list[Run]:
    """All tasks from all rates with all seeds, the slow task last."""
    per_seed = list(product(contenders, (*DECADES, *TUNING_LRS)))
    return [
        Run(task, contender, lr, seed)
        for tasks in (FAST_TASKS, SLOW_TASKS)
        for seed in SEEDS
        for task in tasks
        for contender, lr in per_seed
    ]


PLANS = {
    "full": full,
    "quick": quick,
    "sweep": sweep,
    "candidates": candidates,
    "measured": measured,
    "cautious": cautious,
}
