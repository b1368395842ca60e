"""What changing one option does: span and loss against the defaults, on the same runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measures import Kind, Study
from .plans import DECADES, OURS, sweep_contenders
from .report import Table, label, percent


def sweep_table(study: Study, kind: Kind, tasks: Sequence[str]) -> Table:
    """Mean span, mean regret and mean excess over the best, per setting; seed 0 alone, as the sweep has no other."""
    first = Study(record for cell in study.cells.values() for record in cell.records if record["seed"] == 0)
    rows = []
    for variant in OURS:
        names = [variant, *(c.name for c in sweep_contenders() if c.name.startswith(f"{variant},"))]
        for name in names:
            found = [m for task in tasks if (m := first.measures(task, name, kind)) and m.decades == len(DECADES)]
            if len(found) < len(tasks):
                continue
            at_1e3 = [low_excess(first, task, name, kind) for task in tasks]
            rows.append(
                [
                    label(name) if name in OURS else name.replace(",", ", "),
                    f"{statistics.fmean(m.span for m in found):.1f}",
                    percent(statistics.median(at_1e3)),
                    str(sum(m.diverged for m in found)),
                ]
            )
    return Table("sweep", ["setting", "mean span", "median excess from lr 1e-3", "diverged, lr ≤ 1e-2"], rows)


def low_excess(study: Study, task: str, optimizer: str, kind: Kind) -> float:
    """How much worse than tuned Adam the optimizer ends from lr 1e-3."""
    tuned = study.tuned_baseline(task, kind)
    assert tuned is not None
    score = study.means(task, optimizer, kind)[1e-3]
    return (score - tuned[1]) / abs(tuned[1])
