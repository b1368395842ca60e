"""Pictures and tables of docs/learning_rate.md and README.md, from recorded results alone.

What stands between `<!-- study: NAME -->` and `<!-- end of study -->` in the texts is generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .contenders import CONTENDERS, OURS
from .measures import KINDS, TOLERANCE, Study, score
from .plans import DECADES
from .report import (
    Table,
    coverage,
    label,
    long_table,
    one_rate_table,
    peer_table,
    sampling_table,
    summary_table,
    target_table,
)
from .targets import MAIN
from .tasks import TASKS

MARKED = re.compile(r"(<!-- study: (\S+) -->\n)(.*?)(<!-- end of study -->)", re.DOTALL)
# Okabe and Ito's colors, told apart by color-blind readers as well.
STYLES = {
    "adam": ("#000000", "-"),
    "adamw-cosine": ("#000000", ":"),
    "global": ("#0072B2", "-"),
    "local": ("#D55E00", "-"),
    "smoothed": ("#009E73", "-"),
    "schedulefree": ("#56B4E9", "--"),
}
TRAJECTORY_TASKS = ("words", "gpt-text", "conv-digits", "rosenbrock-noise")
NOT_YET = "*Not yet recorded.*\n"
TEXTS = ("README.md", "docs/learning_rate.md")


def write_figures(study: Study, repository: Path) -> None:
    """Draws the pictures and renews the tables of the texts; pictures only of what is recorded."""
    docs = repository / "docs"
    for name, figure in (("losses", draw_losses(study)), ("trajectories", draw_trajectories(study))):
        if figure is not None:
            figure.savefig(docs / "images" / f"learning_rate_{name}.png", dpi=110)
            plt.close(figure)
    for text in (repository / name for name in TEXTS):
        text.write_text(with_tables(text.read_text(encoding="utf-8"), study, docs), encoding="utf-8")


def with_tables(text: str, study: Study, docs: Path) -> str:
    """The text with its marked parts generated anew.

    Raises:
        KeyError: a mark names no table.
    """

    def picture(name: str, title: str) -> str:
        link = f"images/learning_rate_{name}.png"
        return f"![{title}]({link})\n" if (docs / link).exists() else NOT_YET

    def markdown(table: Table) -> str:
        return table.markdown() if table.rows else NOT_YET

    tables: dict[str, Callable[[], str]] = {
        "coverage": lambda: coverage(study) if study.cells else NOT_YET,
        "summary": lambda: markdown(summary_table(study)),
        "targets": lambda: markdown(target_table(study)),
        "sampling": lambda: markdown(sampling_table(study)),
        "long": lambda: markdown(long_table(study)),
        "losses": lambda: picture("losses", "Final loss over the initial learning rate, a panel per task"),
        "trajectories": lambda: picture("trajectories", "Effective learning rate over the steps"),
    }
    for kind in KINDS:
        for name, table in (("one-rate", one_rate_table), ("peers", peer_table)):
            tables[f"{name}-{kind}"] = lambda table=table, kind=kind: markdown(table(study, kind))  # type: ignore[misc]
    return MARKED.sub(lambda match: match[1] + (tables[match[2]]() if study.cells else NOT_YET) + match[4], text)


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


def draw_losses(study: Study) -> Figure | None:
    """Final loss over the initial rate, a panel per task; bands from the best to the worst seed. None: no records."""
    tasks = [task for task in MAIN if any(study.rates(task, name) for name in STYLES)]
    if not tasks:
        return None
    figure, panels = grid(len(tasks), 4, 3.5, 2.6)
    for axes, task in zip(panels, tasks, strict=True):
        draw_task(axes, study, task)
    shown = [name for name in STYLES if name in study.optimizers]
    handles = [Line2D([], [], color=STYLES[n][0], linestyle=STYLES[n][1], label=CONTENDERS[n].label) for n in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_task(axes: Axes, study: Study, task: str) -> None:
    digits = TASKS[task].goal == "digits"
    sign = -1.0 if digits else 1.0
    shown: list[float] = []
    for optimizer, (color, line) in STYLES.items():
        rates = study.rates(task, optimizer)
        scores = [[sign * score(r, "validation") for r in study.cells[task, optimizer, lr]] for lr in rates]
        axes.plot(rates, [sum(values) / len(values) for values in scores], line, color=color, linewidth=1.5)
        low, high = [min(s) for s in scores], [max(s) for s in scores]
        axes.fill_between(rates, low, high, color=color, alpha=0.1, linewidth=0)
        shown += [value for values in scores for value in values if abs(value) != float("inf")]
    best = study.best(task, "adam", "validation")
    if best:
        axes.axhline(sign * best[1] * (1 - TOLERANCE if digits else 1 + TOLERANCE), color="#999999", linewidth=0.8,
                     linestyle="--")  # fmt: skip
        if not digits:
            # Lost runs, and seeds that got a small validation set right by luck, would press all else together.
            axes.set_ylim(max(0.8 * min(shown), best[1] / 10), min(1.2 * max(shown), 40 * best[1]))
            axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_title(f"{TASKS[task].label}: {'digits gained' if digits else 'validation loss'}", fontsize=9)


def draw_trajectories(study: Study, optimizers: Sequence[str] = tuple(OURS)) -> Figure | None:
    """The median effective rate over the steps, a column per optimizer, a color per initial rate; the first seed."""
    tasks = [task for task in TRAJECTORY_TASKS if any(study.rates(task, name) for name in optimizers)]
    if not tasks:
        return None
    figure, panels = grid(len(tasks) * len(optimizers), len(optimizers), 4.2, 2.4)
    colors = plt.get_cmap("viridis")
    for axes, (task, optimizer) in zip(panels, ((t, o) for t in tasks for o in optimizers), strict=True):
        for index, lr in enumerate(DECADES):
            for record in study.cells.get((task, optimizer, lr), ())[:1]:
                snapshots = record["snapshots"]
                axes.plot(snapshots["step"], snapshots["lr_median"], color=colors(index / len(DECADES)), linewidth=1.4)
        if axes.lines:
            axes.set_yscale("log")
        axes.set_title(f"{label(optimizer)}, {TASKS[task].label}", fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("effective learning rate, median over tensors")
    return figure
