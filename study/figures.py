"""Pictures and tables of docs/learning_rate.md, from recorded results alone.

What stands between `<!-- study: NAME -->` and `<!-- end of study -->` in the text is generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .measures import KINDS, TOLERANCE, Study
from .plans import (
    CAUTIOUS,
    DECADES,
    DEFERRED,
    FAST_TASKS,
    LOW_START,
    MAIN,
    MEASURED,
    OURS,
    PUBLISHED,
    SWEPT,
    candidate_contenders,
)
from .report import Table, label, loss_table, one_rate_table, seeds_text, span_table, summary_table
from .runs import read_records
from .sweep_report import sweep_table
from .tasks import TASKS

MARKED = re.compile(r"(<!-- study: (\S+) -->\n)(.*?)(<!-- end of study -->)", re.DOTALL)

Styles = Mapping[str, tuple[str, str]]
# Okabe and Ito's colors, told apart by color-blind readers as well.
STYLES = {
    "adam": ("#000000", "-"),
    "adamw-cosine": ("#000000", ":"),
    "global": ("#0072B2", "-"),
    "local": ("#D55E00", "-"),
    "smoothed": ("#009E73", "-"),
    "prodigy": ("#CC79A7", "--"),
    "dadaptation": ("#E69F00", "--"),
    "schedulefree": ("#56B4E9", "--"),
}
MEASURED_STYLES = {
    "adam": STYLES["adam"],
    **{name: STYLES[name.partition("-")[0]] for name in MEASURED},
    **{name: (STYLES[name.partition("-")[0]][0], "--") for name in LOW_START},
}
CAUTIOUS_STYLES = {
    "adam": STYLES["adam"],
    **{f"{name}-cautious": STYLES[name.partition("-")[0]] for name in MEASURED},
    "prodigy": STYLES["prodigy"],
}
TRAJECTORY_TASKS = ("mlp-digits", "conv-digits", "gpt-text", "rosenbrock-noise")


def write_figures(results: Path, docs: Path) -> None:
    """Draws the pictures and renews the tables.

    Raises:
        FileNotFoundError: the random walk was not simulated, or there is no text.
    """
    recorded = Recorded.read(results)
    for name, figure in (
        ("losses", draw_losses(recorded.full, STYLES)),
        ("trajectories", draw_trajectories(recorded.full, OURS)),
        ("measured_losses", draw_losses(recorded.measured, MEASURED_STYLES)),
        ("measured_trajectories", draw_trajectories(recorded.measured, MEASURED)),
        ("cautious_losses", draw_losses(recorded.cautious, CAUTIOUS_STYLES)),
        ("random_walk", draw_random_walk(recorded.walk)),
    ):
        figure.savefig(docs / "images" / f"learning_rate_{name}.png", dpi=110)
        plt.close(figure)
    text = docs / "learning_rate.md"
    text.write_text(with_tables(text.read_text(encoding="utf-8"), recorded), encoding="utf-8")


def read_walk(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "random_walk.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Recorded:
    """All results. Every study holds what it is compared with as well: `full`, and some `measured` too."""

    full: Study
    measured: Study
    cautious: Study
    sweep: Study
    candidates: Study
    walk: dict[str, Any]

    @classmethod
    def read(cls, results: Path) -> Recorded:
        full, measured, cautious, sweep, candidates = (
            list(read_records(results / f"{plan}.jsonl"))
            for plan in ("full", "measured", "cautious", "sweep", "candidates")
        )
        return cls(
            Study(full),
            Study([*full, *measured]),
            Study([*full, *measured, *cautious]),
            Study([*full, *measured, *sweep]),
            Study(record for record in (*full, *candidates) if TASKS[record["task"]] in FAST_TASKS),
            read_walk(results),
        )


# --- tables ----------------------------------------------------------------------------------------------------------


def with_tables(text: str, recorded: Recorded) -> str:
    """The text with its marked parts generated anew.

    Raises:
        KeyError: a mark names no table.
    """
    study, measured = recorded.full, recorded.measured
    tables: dict[str, Callable[[], str]] = {
        "coverage": lambda: coverage(study),
        "loss-gpt": lambda: loss_table(study, "gpt-text", "validation", MAIN).markdown(),
        "random-walk": lambda: walk_table(recorded.walk).markdown(),
        "published": lambda: summary_table(study, "validation", [*OURS, *PUBLISHED, *DEFERRED]).markdown(),
    }
    walks = [*MEASURED, *LOW_START]
    beside_candidates = [name for each in candidate_contenders() for name in (each.name.split(",")[0], each.name)]
    for kind in KINDS:
        tables[f"measured-{kind}"] = lambda kind=kind: summary_table(  # type: ignore[misc]
            measured, kind, ["adam", *OURS, *walks]
        ).markdown()
        tables[f"measured-span-{kind}"] = lambda kind=kind: span_table(  # type: ignore[misc]
            measured, kind, ["adam", *walks]
        ).markdown()
        tables[f"one-rate-{kind}"] = lambda kind=kind: one_rate_table(  # type: ignore[misc]
            recorded.cautious, kind, [*MAIN, *walks, *CAUTIOUS]
        ).markdown()
        tables[f"cautious-{kind}"] = lambda kind=kind: summary_table(  # type: ignore[misc]
            recorded.cautious, kind, ["adam", *OURS, *MEASURED, *CAUTIOUS]
        ).markdown()
        tables[f"cautious-span-{kind}"] = lambda kind=kind: span_table(  # type: ignore[misc]
            recorded.cautious, kind, ["adam", *CAUTIOUS]
        ).markdown()
        tables[f"candidates-{kind}"] = lambda kind=kind: summary_table(  # type: ignore[misc]
            recorded.candidates, kind, beside_candidates
        ).markdown()
        tables[f"summary-{kind}"] = lambda kind=kind: summary_table(study, kind, MAIN).markdown()  # type: ignore[misc]
        tables[f"span-{kind}"] = lambda kind=kind: span_table(  # type: ignore[misc]
            study, kind, [name for name in MAIN if name in study.optimizers]
        ).markdown()
    for base in SWEPT:
        tables[f"sweep-{base}"] = lambda base=base: sweep_table(recorded.sweep, base).markdown()  # type: ignore[misc]
    return MARKED.sub(lambda match: match[1] + tables[match[2]]() + match[4], text)


def coverage(study: Study) -> str:
    runs = sum(len(cell.records) for cell in study.cells.values())
    names = ", ".join(label(name) for name in study.optimizers)
    extent = f"{runs} runs on {len(study.tasks)} tasks, {seeds_text(study)} per setting"
    return f"Recorded so far: {extent}. Optimizers: {names}.\n"


def walk_table(walk: dict[str, Any]) -> Table:
    header = ["parameters", "Monte Carlo, paper", "Monte Carlo, this project", "closed form"]
    rows = [
        [f"{row['elements']:,}", f"{row['paper']:.4f}", f"{row['monte_carlo']:.4f}", f"{row['closed_form']:.4f}"]
        for row in walk["normalized"]
    ]
    return Table("normalized steps", header, rows)


# --- pictures --------------------------------------------------------------------------------------------------------


def grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.5), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for each in flat[:count]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, flat[:count]


def draw_losses(study: Study, styles: Styles) -> Figure:
    """Final loss over the initial rate, a panel per task; bands from the best to the worst seed."""
    figure, panels = grid(len(study.tasks), 4, 3.5, 2.6)
    for axes, task in zip(panels, study.tasks, strict=True):
        draw_task(axes, study, task, styles)
    handles = [
        Line2D([], [], color=color, linestyle=line, label=label(optimizer))
        for optimizer, (color, line) in styles.items()
        if optimizer in study.optimizers
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_task(axes: Axes, study: Study, task: str, styles: Styles) -> None:
    digits = TASKS[task].goal == "digits"
    sign = -1.0 if digits else 1.0
    shown: list[float] = []
    for optimizer, (color, line) in styles.items():
        lrs = [lr for lr in study.lrs(task, optimizer) if optimizer == "adam" or lr in DECADES]
        scores = [[sign * s for s in study.cells[task, optimizer, lr].scores("validation")] for lr in lrs]
        means = [sum(values) / len(values) for values in scores]
        axes.plot(lrs, means, line, color=color, linewidth=1.5)
        axes.fill_between(lrs, [min(s) for s in scores], [max(s) for s in scores], color=color, alpha=0.1, linewidth=0)
        shown += [value for values in scores for value in values if abs(value) != float("inf")]
    tuned = study.tuned_baseline(task, "validation")
    if tuned:
        bound = sign * tuned[1] * (1 - TOLERANCE if digits else 1 + TOLERANCE)
        axes.axhline(bound, color="#999999", linewidth=0.8, linestyle="--")
        if not digits:
            # Diverged runs, and seeds that got a small validation set right by luck, would press all else together.
            axes.set_ylim(max(0.8 * min(shown), tuned[1] / 10), min(1.2 * max(shown), 40 * tuned[1]))
            axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_title(f"{TASKS[task].label}: {'digits gained' if digits else 'validation loss'}", fontsize=9)


def draw_trajectories(study: Study, optimizers: Sequence[str]) -> Figure:
    """The median effective rate over the steps, a column per optimizer, a color per initial rate; seed 0."""
    tasks = [task for task in TRAJECTORY_TASKS if task in study.tasks]
    optimizers = [name for name in optimizers if all((task, name, DECADES[-1]) in study.cells for task in tasks)]
    figure, panels = grid(len(tasks) * len(optimizers), len(optimizers), 4.2, 2.4)
    colors = plt.get_cmap("viridis")
    for row, task in enumerate(tasks):
        for column, optimizer in enumerate(optimizers):
            axes = panels[row * len(optimizers) + column]
            for index, lr in enumerate(DECADES):
                cell = study.cells.get((task, optimizer, lr))
                if cell is None:
                    continue
                snapshots = cell.records[0]["snapshots"]
                steps, rates = [0, *snapshots["step"]], [lr, *snapshots["lr_median"]]
                axes.plot(steps, rates, color=colors(index / len(DECADES)), linewidth=1.4)
            axes.set_yscale("log")
            axes.set_title(f"{label(optimizer)}, {TASKS[task].label}", fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("effective learning rate, median over tensors")
    return figure


def draw_random_walk(walk: dict[str, Any]) -> Figure:
    """Expected squared path per element: recursion against paths of real Adam on noise, and their difference."""
    figure, (values, errors) = grid(2, 2, 5.5, 3.4)
    for color, row in zip(("#D55E00", "#0072B2", "#009E73"), walk["adam"], strict=True):
        steps = range(1, len(row["reference"]) + 1)
        name = f"smoothing {row['smoothing']:g}"
        values.plot(steps, row["reference"], color=color, label=name)
        values.plot(steps, row["monte_carlo"], ".", color=color, markersize=3)
        ratio = [100 * (m / r - 1) for m, r in zip(row["monte_carlo"], row["reference"], strict=True)]
        errors.plot(steps, ratio, color=color, label=name)
    values.set(title="recursion (lines) and Monte Carlo (dots)", xlabel="step", ylabel="expected path² per element")
    errors.set(title="Monte Carlo above recursion", xlabel="step", ylabel="%")
    values.legend(frameon=False)
    return figure



