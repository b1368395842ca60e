"""What changing one setting does: how often it ends near tuned Adam, and how it ends against the unchanged."""

from __future__ import annotations

import math
import statistics

from .measures import BASELINE, KINDS, Kind, Study, excess
from .plans import SWEEP_LRS, SWEEP_SEED, variations
from .report import Table, lr_text, percent
from .tasks import TASKS

EQUAL = 0.05  # ends that differ by less count as equal
ALL_LRS = sorted({lr for lrs in SWEEP_LRS.values() for lr in lrs})


def sweep_table(study: Study, base: str) -> Table:
    """A line per setting, that without a change first; settings that were not run everywhere are left out.

    `study` holds the records of the sweep, of its unchanged optimizers and of Adam.
    """
    swept = as_swept(study)
    names = [name for name in (base, *(each.name for each in variations(base))) if is_complete(swept, name)]
    pairs = sum(len(lrs) for lrs in SWEEP_LRS.values())
    header = [
        "changed",
        *(f"within 10% of tuned Adam, {kind}" for kind in KINDS),
        *(f"from {lr_text(lr)}" for lr in ALL_LRS),
        *(f"better : worse, {kind}" for kind in KINDS),
        "diverged, lr ≤ 1e-2",
    ]
    return Table(f"{base}, {pairs} pairs of a task and a rate", header, [row(swept, name, base) for name in names])


def as_swept(study: Study) -> Study:
    """The study as if it had the rates and the seed of the sweep alone; Adam keeps all its rates, to be tuned."""
    return Study(
        record
        for (task, optimizer, lr), cell in study.cells.items()
        for record in cell.records
        if record["seed"] == SWEEP_SEED and (lr in SWEEP_LRS[task] or optimizer == BASELINE)
    )


def is_complete(swept: Study, optimizer: str) -> bool:
    return all((task, optimizer, lr) in swept.cells for task, lrs in SWEEP_LRS.items() for lr in lrs)


def row(swept: Study, name: str, base: str) -> list[str]:
    found = {kind: [m for task in TASKS if (m := swept.measures(task, name, kind))] for kind in KINDS}
    changes = {kind: {lr: changes_from(swept, lr, name, base, kind) for lr in ALL_LRS} for kind in KINDS}
    near = [str(sum(m.span for m in found[kind])) for kind in KINDS]
    diverged = f"{sum(m.diverged for m in found[KINDS[0]])} of {sum(m.runs for m in found[KINDS[0]])}"
    if name == base:
        return ["nothing", *near, *["–"] * (len(ALL_LRS) + len(KINDS)), diverged]
    medians = [percent(statistics.median(changes["validation"][lr])) for lr in ALL_LRS]
    return [
        name.removeprefix(f"{base},").replace(",", ", "),
        *near,
        *medians,
        *(won_and_lost([change for all_tasks in changes[kind].values() for change in all_tasks]) for kind in KINDS),
        diverged,
    ]


def changes_from(swept: Study, lr: float, name: str, base: str, kind: Kind) -> list[float]:
    """Per task, by what fraction the final loss is above that of `base`; for functions, the share of digits missing."""
    tasks = [task for task, lrs in SWEEP_LRS.items() if lr in lrs]
    return [change(*(swept.cells[task, each, lr].mean(kind) for each in (name, base))) for task in tasks]


def change(score: float, base: float) -> float:
    if score == base:
        return 0.0
    if math.isinf(base) or base == 0.0:  # lost altogether, or no digit gained: all or nothing
        return -1.0 if score < base else math.inf
    return excess(score, base)


def won_and_lost(changes: list[float]) -> str:
    return f"{sum(each < -EQUAL for each in changes)} : {sum(each > EQUAL for each in changes)}"
