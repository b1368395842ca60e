"""What changing one setting does: how often it ends near tuned Adam, and how it ends against the unchanged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection

from .measures import BASELINE, KINDS, Kind, Study, excess
from .plans import SWEEP_LRS, SWEEP_SEED, swept_pairs, variations
from .report import Table, lr_text, percent

EQUAL = 0.05  # ends that differ by less count as equal
Pairs = Collection[tuple[str, float]]  # a task's name and an initial learning rate


def sweep_table(study: Study, base: str) -> Table:
    """A line per setting, that without a change first; settings that were not run everywhere are left out.

    `study` holds the records of the sweep, of its unchanged optimizers and of Adam.
    """
    pairs = [(task.name, lr) for task, lr in swept_pairs(base)]
    swept = restricted(study, pairs)
    candidates = (base, *(each.name for each in variations(base)))
    names = [name for name in candidates if all((task, name, lr) in swept.cells for task, lr in pairs)]
    header = [
        "changed",
        *(f"within 10% of tuned Adam, {kind}" for kind in KINDS),
        *(f"from {lr_text(lr)}" for lr in sorted(SWEEP_LRS)),
        *(f"better : worse, {kind}" for kind in KINDS),
        "diverged, lr ≤ 1e-2",
    ]
    title = f"{base}, {len(pairs)} pairs of a task and a rate"
    return Table(title, header, [row(swept, pairs, name, base) for name in names])


def restricted(study: Study, pairs: Pairs) -> Study:
    """The study as if it had these pairs and the sweep's seed alone; Adam keeps all its rates, to be tuned."""
    tasks = {task for task, _ in pairs}
    return Study(
        record
        for (task, optimizer, lr), cell in study.cells.items()
        for record in cell.records
        if record["seed"] == SWEEP_SEED and ((task, lr) in pairs or (optimizer == BASELINE and task in tasks))
    )


def row(swept: Study, pairs: Pairs, name: str, base: str) -> list[str]:
    found = {kind: [m for task in swept.tasks if (m := swept.measures(task, name, kind))] for kind in KINDS}
    near = [str(sum(m.span for m in found[kind])) for kind in KINDS]
    diverged = f"{sum(m.diverged for m in found[KINDS[0]])} of {sum(m.runs for m in found[KINDS[0]])}"
    if name == base:
        return ["nothing", *near, *["–"] * (len(SWEEP_LRS) + len(KINDS)), diverged]
    changes = {kind: {pair: change_at(swept, pair, name, base, kind) for pair in pairs} for kind in KINDS}
    by_rate = [[each for (_, lr), each in changes["validation"].items() if lr == rate] for rate in sorted(SWEEP_LRS)]
    return [
        name.removeprefix(f"{base},").replace(",", ", "),
        *near,
        *(percent(statistics.median(of_one_rate)) for of_one_rate in by_rate),
        *(won_and_lost(changes[kind].values()) for kind in KINDS),
        diverged,
    ]


def change_at(swept: Study, pair: tuple[str, float], name: str, base: str, kind: Kind) -> float:
    """By what fraction the final loss is above that of `base`; for functions, the share of digits missing."""
    task, lr = pair
    return change(*(swept.cells[task, each, lr].mean(kind) for each in (name, base)))


def change(score: float, base: float) -> float:
    if score == base:
        return 0.0
    if math.isinf(base) or base == 0.0:  # lost altogether, or no digit gained: all or nothing
        return -1.0 if score < base else math.inf
    return excess(score, base)


def won_and_lost(changes: Collection[float]) -> str:
    return f"{sum(each < -EQUAL for each in changes)} : {sum(each > EQUAL for each in changes)}"
