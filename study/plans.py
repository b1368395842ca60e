"""Which runs the study makes, the most telling first, so that a study cut short is still a study.

A plan gets what is recorded so far: some runs follow from others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

from .contenders import CONTENDERS, OURS, Contender
from .measures import KINDS, Study, best_single
from .problem import Task
from .runs import Run
from .tasks import LONG_TASKS, MAIN_TASKS, SAMPLED_TASKS, TASKS

DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HALF_DECADES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = {
    **dict.fromkeys(OURS, DECADES),
    "adam": HALF_DECADES,
    "adamw-cosine": HALF_DECADES,
    "prodigy": (0.1, 0.3, 1.0, 3.0, 10.0),  # in units of its own estimate; 1 is its default
    "schedulefree": HALF_DECADES[2:],
}
SEEDS = (0, 1, 2)
PEERS = ("prodigy", "schedulefree")
LARGE_FIRST = MAIN_TASKS[::-1]
SEARCHED = 40  # configurations of AdamW
CONFIRMED = 4  # of these, with all seeds


def runs_of(tasks: Iterable[Task], names: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    return [
        Run(task.name, CONTENDERS[name], lr, seed)
        for seed, task, name in product(seeds, tasks, names)
        for lr in RATES[name]
    ]


def main(_: Study) -> list[Run]:
    """Ours from seven decades; Adam, and AdamW with warm-up and cosine, from half decades."""
    return runs_of(LARGE_FIRST, ("local", "adam", "adamw-cosine", "global", "smoothed"), SEEDS)


def peers(_: Study) -> list[Run]:
    return runs_of(LARGE_FIRST, PEERS, SEEDS)


def tuned(study: Study) -> list[Run]:
    """Ours from the rate that is tuned Adam's, where that is no decade."""
    best = ((task, study.best(task.name, "adam", kind)) for task in LARGE_FIRST for kind in KINDS)
    pairs = dict.fromkeys((task.name, found[0]) for task, found in best if found and found[0] not in DECADES)
    return [Run(task, CONTENDERS[name], lr, seed) for seed in SEEDS for task, lr in pairs for name in OURS]


def configurations(count: int = SEARCHED) -> list[tuple[Contender, float]]:
    """AdamW with everything that is tuned in practice drawn at random; the rate is a part of it."""
    draw = random.Random(0)
    found = []
    for index in range(count):
        lr = 10 ** draw.uniform(-3.5, -1.0)
        options = {
            "betas": (draw.choice((0.8, 0.9, 0.95)), draw.choice((0.95, 0.99, 0.999))),
            "weight_decay": draw.choice((0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
        }
        warm_up, final = draw.choice((0.0, 0.02, 0.05, 0.1, 0.2)), draw.choice((0.0, 0.1))
        contender = Contender(f"adamw#{index}", f"AdamW, configuration {index}", "adamw", options, warm_up, final)
        found.append((contender, float(f"{lr:.2g}")))
    return found


def single(study: Study) -> list[Run]:
    """The search for the one configuration of AdamW that does best over all tasks; then its best with all seeds."""
    drawn = configurations()
    search = [Run(task.name, contender, lr, SEEDS[0]) for contender, lr in drawn for task in LARGE_FIRST]
    if any((run.task, run.contender.name, run.lr) not in study.cells for run in search):
        return search
    first_seed = Study(r for found in study.cells.values() for r in found if r["seed"] == SEEDS[0])
    ranked = best_single(first_seed)[:CONFIRMED]
    return [
        Run(task.name, contender, lr, seed)
        for contender, lr in drawn if contender.name in ranked
        for seed, task in product(SEEDS[1:], LARGE_FIRST)
    ]  # fmt: skip


def sampling(_: Study) -> list[Run]:
    """The whole path or a sample of it, with a threshold so low that most tensors are sampled."""
    contenders = [
        replace(CONTENDERS[name], name=f"{name},path={text}", label=f"{CONTENDERS[name].label}, path of {text}",
                options={"path_fraction": fraction, "fused": False}, sampled_from=1024)
        for name in ("local", "global")
        for text, fraction in (("1", 1.0), ("1/16", 1 / 16), ("1/64", 1 / 64))
    ]  # fmt: skip
    return [
        Run(task.name, contender, lr, seed)
        for seed, task, contender, lr in product(SEEDS, SAMPLED_TASKS, contenders, (1e-3, 1e-5))
    ]


def long(_: Study) -> list[Run]:
    """Ten times the steps; Adam from the rates that may be right."""
    return [
        Run(task.name, CONTENDERS[name], lr, SEEDS[0])
        for task in LONG_TASKS
        for name, rates in (("local", (1e-3, 1e-5)), ("global", (1e-3,)), ("smoothed", (1e-3,)),
                            ("adam", (3e-4, 1e-3, 3e-3)), ("adamw-cosine", (1e-3, 3e-3, 1e-2)))
        for lr in rates
    ]  # fmt: skip


QUICK_TASKS = ("words", "mlp-wine", "conv-norm", "temperature", "rosenbrock-noise")


def quick(_: Study) -> list[Run]:
    """Five tasks, a third of the steps, one seed, every second decade."""
    return [
        Run(task, CONTENDERS[name], lr, 0, steps=TASKS[task].steps // 3)
        for task, name in product(QUICK_TASKS, ("adam", "adamw-cosine", *OURS))
        for lr in (DECADES[::2] if name in OURS else (1e-4, 1e-3, 3e-3, 1e-2, 3e-2))
    ]


PLANS: dict[str, Callable[[Study], list[Run]]] = {
    "main": main, "tuned": tuned, "single": single, "peers": peers, "sampling": sampling, "long": long, "quick": quick,
}  # fmt: skip
FULL = tuple(name for name in PLANS if name != "quick")
