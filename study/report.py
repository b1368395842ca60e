"""Tables of a study: to the terminal, and as Markdown for the docs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from .contenders import CONTENDERS, OURS
from .measures import BASELINES, KINDS, Kind, Study, best_single
from .plans import DECADES
from .targets import (
    MAIN,
    ONE_RATE,
    TARGETS,
    WIDE_SPAN,
    at_tuned_rate,
    median,
    near_best,
    one_rate_regret,
    percent,
    wide,
)
from .tasks import LONG_TASKS, TASKS


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
    return CONTENDERS[optimizer].label if optimizer in CONTENDERS else optimizer


def lr_text(lr: float) -> str:
    mantissa, exponent = f"{lr:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def number(value: float) -> str:
    """Three digits; infinite: not finite at the end of some seed; NaN: not run."""
    return "–" if math.isnan(value) else f"{value:.3g}" if math.isfinite(value) else "∞"


def target_table(study: Study) -> Table:
    rows = []
    for target, verdict in TARGETS.items():
        found = [verdict(study, name) for name in OURS]
        marks = {True: "✓ ", False: "✗ ", None: ""}
        rows.append([target, *(f"{marks[each.met]}{each.found}" for each in found)])
    return Table("targets, at the defaults", ["target", *map(label, OURS)], rows)


def summary_table(study: Study) -> Table:
    """The study in five lines: from seven decades, and from one rate for all tasks."""
    wanted = {f"within 10% of tuned Adam from {WIDE_SPAN} of 7 decades, training loss": wide("training")}
    for kind in KINDS:
        wanted[f"from 1e-3 within 10% of the better of tuned Adam and AdamW, {kind} loss"] = near_best(kind)
        wanted[f"median distance to it, {kind} loss"] = one_rate_regret(kind)
    rows = [[what, *(verdict(study, name).found for name in OURS)] for what, verdict in wanted.items()]
    return Table("in short", ["tasks", *map(label, OURS)], rows)


def one_rate_table(study: Study, kind: Kind) -> Table:
    """A line per task, by one loss: tuned Adam and AdamW, the best single AdamW, ours from 1e-3; below, the medians."""
    singles = best_single(study)[:1]
    rates = {name: next(lr for _, found, lr in study.cells if found == name) for name in singles}
    columns = [*((name, rates[name]) for name in singles), *((name, ONE_RATE) for name in OURS)]
    rows = []
    for task in MAIN:
        if task not in study.tasks:
            continue
        best = study.best(task, "adam", kind)
        tuned = [study.tuned(task, kind, [name]) for name in BASELINES]
        regrets = [percent(study.regret(task, name, lr, kind, BASELINES)) for name, lr in columns]
        own = [percent(at_tuned_rate(study, task, name, kind)) for name in OURS]
        losses = [number(abs(value)) for value in tuned]
        rows.append([TASKS[task].label, lr_text(best[0]) if best else "–", *losses, *regrets, *own])
    medians = [percent(median(study.regret(t, name, lr, kind, BASELINES) for t in MAIN)) for name, lr in columns]
    own = [percent(median(at_tuned_rate(study, task, name, kind) for task in MAIN)) for name in OURS]
    rows.append(["median", "", "", "", *medians, *own])
    header = ["task", "Adam's lr", *map(label, BASELINES), *singles, *(f"{name}, 1e-3" for name in OURS),
              *(f"{name}, Adam's lr" for name in OURS)]  # fmt: skip
    return Table(f"{kind} loss (functions: digits gained), and how far above the best of the two", header, rows)


def span_table(study: Study, kind: Kind) -> Table:
    """From how many of the seven decades each of ours ends near tuned Adam, a line per task."""
    spans = {task: [study.span(task, name, kind, DECADES) for name in OURS] for task in MAIN}
    rows = [
        [TASKS[task].label, *("–" if span is None else str(span) for span in found)]
        for task, found in spans.items()
        if found != [None] * len(OURS)
    ]
    return Table(f"decades of 7 within 10% of tuned Adam, {kind} loss", ["task", *map(label, OURS)], rows)


def peer_table(study: Study, kind: Kind) -> Table:
    """Every optimizer at its best rate for each task: how far it ends from the best of tuned Adam and AdamW."""
    rows = []
    for name in (name for name in CONTENDERS if name in study.optimizers):
        best = {task: found for task in MAIN if (found := study.best(task, name, kind))}
        regrets = [study.regret(task, name, lr, kind, BASELINES) for task, (lr, _) in best.items()]
        known = [regret for regret in regrets if not math.isnan(regret)]
        close = sum(regret <= 0.1 for regret in known)
        rows.append([label(name), percent(median(known)), f"{close} of {len(known)}"])
    return Table(f"each at its best rate per task, {kind} loss", ["optimizer", "median regret", "within 10%"], rows)


def sampling_table(study: Study) -> Table:
    """Validation loss with the whole path and with samples of it; functions of the fraction."""
    names = [name for name in study.optimizers if ",path=" in name]
    rows = []
    for task in study.tasks:
        for base in dict.fromkeys(name.partition(",")[0] for name in names):
            for lr in study.rates(task, f"{base},path=1"):
                whole = study.mean(task, f"{base},path=1", lr, "validation")
                others = [study.mean(task, f"{base},path={text}", lr, "validation") for text in ("1/16", "1/64")]
                changes = [percent((value - whole) / whole) for value in others]
                rows.append([f"{TASKS[task].label}, {base}, from {lr_text(lr)}", number(whole), *changes])
    return Table("path of a sample, validation loss", ["", "whole path", "1/16", "1/64"], rows)


def long_table(study: Study) -> Table:
    """A row per optimizer and rate that some long task was run from."""
    tasks = [task.name for task in LONG_TASKS if task.name in study.tasks]
    rows = []
    for name in study.optimizers:
        for lr in sorted({lr for task in tasks for lr in study.rates(task, name)}):
            losses = [number(study.mean(task, name, lr, kind)) for task in tasks for kind in KINDS]
            rows.append([f"{label(name)}, from {lr_text(lr)}", *losses])
    titles = [f"{TASKS[task].label}: {kind}" for task in tasks for kind in KINDS]
    return Table("ten times the steps", ["", *titles], rows)


def coverage(study: Study) -> str:
    runs = sum(map(len, study.cells.values()))
    fewest, most = study.seeds()
    seeds = f"{fewest} to {most} seeds" if fewest != most else f"{most} seed{'s' if most > 1 else ''}"
    tasks = len(set(study.tasks) - {task.name for task in LONG_TASKS})
    return f"Recorded so far: {runs} runs on {tasks} tasks, {seeds}.\n"


def print_report(console: Console, study: Study) -> None:
    if not study.cells:
        console.print("nothing is recorded")
        return
    tables = [table(study, kind) for kind in KINDS for table in (one_rate_table, span_table, peer_table)]
    for table in (*tables, sampling_table(study), long_table(study), target_table(study)):
        if table.rows:
            table.show(console)
    console.print(coverage(study))
