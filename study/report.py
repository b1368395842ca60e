"""Tables of a study: to the terminal, and as Markdown for the docs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from .contenders import CONTENDERS
from .measures import BASELINE, KINDS, Kind, Study, summarize
from .plans import DECADES
from .runs import read_records
from .tasks import TASKS


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def label(optimizer: str) -> str:
    base, *changes = optimizer.split(",")
    return ", ".join([CONTENDERS[base].label if base in CONTENDERS else base, *changes])


def lr_text(lr: float) -> str:
    mantissa, exponent = f"{lr:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(fraction: float | None) -> str:
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{100 * fraction:+.1f}%" if abs(fraction) < 10 else "> 1000%"


def summary_table(study: Study, kind: Kind, optimizers: Sequence[str]) -> Table:
    rows = []
    for optimizer in optimizers:
        summary = summarize(study, optimizer, kind, study.tasks)
        if summary is None:
            continue
        rows.append(
            [
                label(optimizer),
                f"{summary.mean_span:.1f}",
                f"{summary.wide} of {summary.tasks}",
                percent(summary.median_regret),
                f"{summary.small_regret} of {summary.regrets}",
                f"{summary.diverged} of {summary.runs}",
            ]
        )
    header = ["optimizer", "mean span", "span ≥ 6", "median regret", "regret ≤ 1%", "diverged, lr ≤ 1e-2"]
    return Table(f"by {kind} loss, {len(study.tasks)} tasks", header, rows)


def span_table(study: Study, kind: Kind, optimizers: Sequence[str]) -> Table:
    """A line per task: the lr of tuned Adam, and every optimizer's span and regret."""
    rows = []
    for task in study.tasks:
        tuned = study.tuned_baseline(task, kind)
        cells = []
        for optimizer in optimizers:
            m = study.measures(task, optimizer, kind)
            complete = m is not None and m.decades == len(DECADES)
            cells.append(f"{m.span} ({percent(m.regret)})" if complete else "–")
        rows.append([TASKS[task].label, lr_text(tuned[0]) if tuned else "–", *cells])
    return Table(f"span (regret) by {kind} loss", ["task", "Adam's lr", *map(label, optimizers)], rows)


def one_rate_table(study: Study, kind: Kind, optimizers: Sequence[str]) -> Table:
    """On how many tasks one initial rate, the same for all of them, ends within 10% of each task's tuned Adam."""
    rows = []
    for optimizer in optimizers:
        cells = []
        for lr in study.decades:
            known = [study.matches_tuned(task, optimizer, lr, kind) for task in study.tasks]
            recorded = [matches for matches in known if matches is not None]
            cells.append(f"{sum(recorded)}" if len(recorded) == len(known) else f"{sum(recorded)} of {len(recorded)}")
        rows.append([label(optimizer), *cells])
    title = f"tasks of {len(study.tasks)} that end within 10% of tuned Adam, by {kind} loss"
    return Table(title, ["optimizer", *map(lr_text, study.decades)], rows)


def loss_table(study: Study, task: str, kind: Kind, optimizers: Sequence[str]) -> Table:
    """Mean over seeds of the final loss, or of the digits gained, from each decade."""
    digits = TASKS[task].goal == "digits"
    rows = []
    for optimizer in optimizers:
        means = study.means(task, optimizer, kind)
        if means:
            values = [means.get(lr, math.nan) for lr in study.decades]
            rows.append([label(optimizer), *(number(abs(value) if digits else value) for value in values)])
    what = "digits gained" if digits else f"{kind} loss"
    return Table(f"{TASKS[task].label}: {what}", ["optimizer", *map(lr_text, study.decades)], rows)


def seeds_text(study: Study) -> str:
    fewest, most = study.seeds()
    return f"{fewest} to {most} seeds" if fewest != most else f"{most} seed{'s' if most > 1 else ''}"


def number(value: float) -> str:
    """Three digits; infinite: not finite at the end of some seed; NaN: not run."""
    return "–" if math.isnan(value) else f"{value:.3g}" if math.isfinite(value) else "∞"


def print_report(console: Console, path: Path) -> None:
    study = Study(read_records(path))
    if not study.cells:
        console.print(f"no records in {path}")
        return
    optimizers = study.optimizers
    for task in study.tasks:
        loss_table(study, task, "validation", optimizers).show(console)
    for kind in KINDS:
        # Nothing to say without the baseline; the summary has no rows until an optimizer was run from all decades.
        for table in (one_rate_table(study, kind, optimizers), summary_table(study, kind, optimizers)):
            if table.rows and any(study.tuned_baseline(task, kind) for task in study.tasks):
                table.show(console)
    console.print(f"{len(study.cells)} settings, {seeds_text(study)} each; baseline: tuned {label(BASELINE)}")
