"""What the records of a study say about each optimizer. Computed from records alone; nothing is trained here."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .plans import DECADES
from .tasks import TASKS

TOLERANCE = 0.10
BASELINE = "adam"
SAFE_LR = 1e-2

Kind = Literal["validation", "training"]
KINDS: tuple[Kind, ...] = ("validation", "training")


@dataclass(frozen=True)
class Cell:
    """All seeds of one optimizer on one task from one initial learning rate."""

    task: str
    records: tuple[dict[str, Any], ...]

    def scores(self, kind: Kind) -> list[float]:
        """Per seed, lower is better: the final loss; for functions with minimum 0, minus the digits gained.

        Infinite where the loss is not finite.
        """
        if TASKS[self.task].goal == "digits":
            return [-digits_gained(record) for record in self.records]
        losses = (record[f"{kind}_loss"] for record in self.records)
        return [math.inf if loss is None else loss for loss in losses]

    @property
    def diverged(self) -> bool:
        return any(record["diverged"] for record in self.records)

    def mean(self, kind: Kind) -> float:
        return statistics.fmean(self.scores(kind))


def digits_gained(record: dict[str, Any]) -> float:
    """Decimal digits by which the training loss came down; 0 if it did not."""
    final = record["training_loss"]
    if final is None:
        return 0.0
    return max(0.0, math.log10(record["initial_training_loss"] / max(final, 1e-300)))


@dataclass(frozen=True)
class Measures:
    """One optimizer on one task.

    span: how many of the seven decades of initial lr end within 10% of the best that Adam reaches from any, and with
        no seed diverged.
    regret: relative excess over that best at the lr where Adam reaches it; None where that was not run.
    diverged: runs that end above their initial training loss or not finite, from lr <= 1e-2; `runs` of that many.
    step_microseconds: CPU time of one optimizer step, median over the runs.
    """

    span: int
    decades: int
    regret: float | None
    best: float
    diverged: int
    runs: int
    step_microseconds: float


class Study:
    """Records sorted by task, optimizer and lr."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        sorted_records: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            sorted_records[record["task"], record["optimizer"], record["lr"]].append(record)
        self.cells = {key: Cell(key[0], tuple(found)) for key, found in sorted_records.items()}

    @property
    def tasks(self) -> list[str]:
        found = {task for task, _, _ in self.cells}
        return [task for task in TASKS if task in found]

    @property
    def optimizers(self) -> list[str]:
        return list(dict.fromkeys(optimizer for _, optimizer, _ in self.cells))

    @property
    def decades(self) -> list[float]:
        """Those that any run started from."""
        recorded = {lr for _, _, lr in self.cells}
        return [lr for lr in DECADES if lr in recorded]

    def lrs(self, task: str, optimizer: str) -> list[float]:
        return sorted(lr for t, o, lr in self.cells if (t, o) == (task, optimizer))

    def means(self, task: str, optimizer: str, kind: Kind) -> dict[float, float]:
        return {lr: self.cells[task, optimizer, lr].mean(kind) for lr in self.lrs(task, optimizer)}

    def tuned_baseline(self, task: str, kind: Kind) -> tuple[float, float] | None:
        """The lr from which Adam ends best, and the score there; None if Adam was not run."""
        means = self.means(task, BASELINE, kind)
        return min(means.items(), key=lambda item: item[1]) if means else None

    def matches_tuned(self, task: str, optimizer: str, lr: float, kind: Kind) -> bool | None:
        """Whether the runs from this lr end within 10% of tuned Adam; None where either is not recorded."""
        cell = self.cells.get((task, optimizer, lr))
        tuned = self.tuned_baseline(task, kind)
        if cell is None or tuned is None:
            return None
        # With few held-out samples a run that diverged can end with a low validation loss by luck.
        return excess(cell.mean(kind), tuned[1]) <= TOLERANCE and not cell.diverged

    def measures(self, task: str, optimizer: str, kind: Kind) -> Measures | None:
        """None where the optimizer or the baseline was not run on the task."""
        means = self.means(task, optimizer, kind)
        tuned = self.tuned_baseline(task, kind)
        if not means or tuned is None:
            return None
        tuned_lr, tuned_score = tuned
        decades = [lr for lr in means if lr in DECADES]
        safe = [r for lr in means if lr <= SAFE_LR for r in self.cells[task, optimizer, lr].records]
        everything = [r for lr in means for r in self.cells[task, optimizer, lr].records]
        return Measures(
            span=sum(self.matches_tuned(task, optimizer, lr, kind) is True for lr in decades),
            decades=len(decades),
            regret=excess(means[tuned_lr], tuned_score) if tuned_lr in means else None,
            best=min(means.values()),
            diverged=sum(record["diverged"] for record in safe),
            runs=len(safe),
            step_microseconds=1e6 * statistics.median(r["optimizer_seconds"] / r["steps"] for r in everything),
        )

    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of any task, optimizer and lr."""
        counts = [len(cell.records) for cell in self.cells.values()]
        return min(counts), max(counts)


def excess(score: float, best: float) -> float:
    """How much worse than the best, as a fraction of it; for digits gained (negative scores) the share missing."""
    return (score - best) / abs(best) if best else math.inf


@dataclass(frozen=True)
class Summary:
    """One optimizer over several tasks."""

    tasks: int
    wide: int  # tasks with a span of at least 6 decades
    mean_span: float
    median_regret: float
    regrets: int  # tasks whose tuned lr the optimizer was run from
    small_regret: int  # of these, with a regret of at most 1%
    diverged: int
    runs: int


WIDE_SPAN = 6
SMALL_REGRET = 0.01


def summarize(study: Study, optimizer: str, kind: Kind, tasks: Sequence[str]) -> Summary | None:
    """None if the optimizer was run on none of the tasks with all seven decades."""
    found = [m for task in tasks if (m := study.measures(task, optimizer, kind)) and m.decades == len(DECADES)]
    if not found:
        return None
    regrets = [m.regret for m in found if m.regret is not None]
    return Summary(
        tasks=len(found),
        wide=sum(m.span >= WIDE_SPAN for m in found),
        mean_span=statistics.fmean(m.span for m in found),
        median_regret=statistics.median(regrets) if regrets else math.nan,
        regrets=len(regrets),
        small_regret=sum(regret <= SMALL_REGRET for regret in regrets),
        diverged=sum(m.diverged for m in found),
        runs=sum(m.runs for m in found),
    )
