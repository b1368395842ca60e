"""What the records of a study say about each optimizer. Computed from records alone; nothing is trained here."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from operator import itemgetter
from typing import Any, Literal

from .contenders import CONTENDERS
from .tasks import TASKS

TOLERANCE = 0.10
BASELINES = ("adam", "adamw-cosine")

Kind = Literal["training", "validation"]
KINDS: tuple[Kind, ...] = ("training", "validation")
Record = dict[str, Any]


def score(record: Record, kind: Kind) -> float:
    """Lower is better: the final loss, or for functions with minimum 0 minus the digits gained. Infinite if lost."""
    if TASKS[record["task"]].goal == "digits":
        return -digits_gained(record)
    loss = record[f"{kind}_loss"]
    return math.inf if loss is None else loss


def digits_gained(record: Record) -> float:
    """Decimal digits by which the training loss came down; 0 if it did not."""
    final = record["training_loss"]
    if final is None:
        return 0.0
    return max(0.0, math.log10(record["initial_training_loss"] / max(final, 1e-300)))


def excess(value: float, best: float) -> float:
    """How much worse than the best, as a fraction of it; for digits gained (negative scores) the share missing."""
    return (value - best) / abs(best) if best else math.inf


class Study:
    """Records by task, optimizer and initial learning rate; each cell holds the seeds."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.cells: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
        for record in records:
            known = CONTENDERS.get(record["optimizer"])
            if known is None or known.settings == record["options"]:  # else of defaults that are gone
                self.cells[record["task"], record["optimizer"], record["lr"]].append(record)

    @property
    def tasks(self) -> list[str]:
        found = {task for task, _, _ in self.cells}
        return [task for task in TASKS if task in found]

    @property
    def optimizers(self) -> list[str]:
        return list(dict.fromkeys(optimizer for _, optimizer, _ in self.cells))

    def rates(self, task: str, optimizer: str) -> list[float]:
        return sorted(lr for t, o, lr in self.cells if (t, o) == (task, optimizer))

    def mean(self, task: str, optimizer: str, lr: float, kind: Kind, seeds: Collection[int] | None = None) -> float:
        """Over these seeds (None: all that were run); infinite if one is lost, NaN if one was not run."""
        scores = {record["seed"]: score(record, kind) for record in self.cells.get((task, optimizer, lr), ())}
        return statistics.fmean(scores.get(seed, math.nan) for seed in seeds or scores) if scores else math.nan

    def diverged(self, task: str, optimizer: str, lr: float) -> int:
        return sum(record["diverged"] for record in self.cells.get((task, optimizer, lr), ()))

    def best(
        self, task: str, optimizer: str, kind: Kind, seeds: Collection[int] | None = None
    ) -> tuple[float, float] | None:
        """The rate from which an optimizer ends best, and the score there."""
        means = [(lr, self.mean(task, optimizer, lr, kind, seeds)) for lr in self.rates(task, optimizer)]
        return min(((lr, mean) for lr, mean in means if not math.isnan(mean)), key=itemgetter(1), default=None)

    def tuned(
        self, task: str, kind: Kind, baselines: Iterable[str] = ("adam",), seeds: Collection[int] | None = None
    ) -> float:
        """The best score of the baselines, each at its best rate; NaN if none was run."""
        found = [best[1] for name in baselines if (best := self.best(task, name, kind, seeds))]
        return min(found, default=math.nan)

    def regret(self, task: str, optimizer: str, lr: float, kind: Kind, baselines: Iterable[str] = ("adam",)) -> float:
        """By what fraction the runs from this rate end above the best of the baselines, with the same seeds; NaN where
        one is missing."""
        seeds = {record["seed"] for record in self.cells.get((task, optimizer, lr), ())}
        mean, best = self.mean(task, optimizer, lr, kind), self.tuned(task, kind, baselines, seeds)
        if math.isnan(mean) or math.isnan(best):
            return math.nan
        return excess(mean, best)

    def near(self, task: str, optimizer: str, lr: float, kind: Kind, baselines: Iterable[str] = ("adam",)) -> bool:
        """Whether the runs end within 10% of the best of the baselines, and no seed diverged.

        With few held-out samples a run that diverged can end with a low validation loss by luck.
        """
        close = self.regret(task, optimizer, lr, kind, baselines) <= TOLERANCE
        return close and not self.diverged(task, optimizer, lr)

    def span(self, task: str, optimizer: str, kind: Kind, rates: Iterable[float]) -> int | None:
        """From how many of the rates the runs end near tuned Adam; None if not all of them, or no Adam, were run."""
        rates = list(rates)
        complete = all((task, optimizer, lr) in self.cells for lr in rates)
        if not complete or math.isnan(self.tuned(task, kind)):
            return None
        return sum(self.near(task, optimizer, lr, kind) for lr in rates)

    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of any cell."""
        counts = [len(found) for found in self.cells.values()]
        return min(counts, default=0), max(counts, default=0)


def best_single(study: Study) -> list[str]:
    """The configurations of AdamW, best over all tasks first: near the best of the baselines on most tasks, then by
    median regret. Those with fewer seeds than others come after these."""
    drawn = {name: lr for _, name, lr in study.cells if name.startswith("adamw#")}
    by_name = {}
    for name, lr in drawn.items():
        found = [len(study.cells[task, name, lr]) for task in study.tasks if (task, name, lr) in study.cells]
        regrets = [study.regret(task, name, lr, "training", BASELINES) for task in study.tasks]
        known = [regret for regret in regrets if not math.isnan(regret)]
        close = sum(study.near(task, name, lr, "training", BASELINES) for task in study.tasks)
        by_name[name] = (-min(found), -len(found), -close, statistics.median(known) if known else math.inf)
    return sorted(by_name, key=lambda name: by_name[name])
