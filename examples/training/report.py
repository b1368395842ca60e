"""What the user sees: progress bars while training, a table at the end, one JSON file per run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .files import atomic_write
from .history import History


@dataclass
class Result:
    """One finished run."""

    name: str
    optimizer: str
    lr: float
    settings: dict[str, Any]
    history: History
    seconds: float  # of this process; a resumed run's earlier part is not in it

    def write_json(self, path: Path) -> None:
        curves = {
            name: [value if math.isfinite(value) else None for value in values]  # JSON has no NaN
            for name, values in self.history.state_dict().items()
        }
        log = {"run": self.name, **self.settings, "seconds": self.seconds, **curves}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:6.3f}"),
        TextColumn("effective lr {task.fields[lr]:8.2e}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        expand=True,
    )


def print_table(console: Console, results: list[Result]) -> None:
    table = Table(title="final lr: the effective one, median over the parameter tensors", box=SIMPLE)
    table.add_column("optimizer")
    for heading in ("initial lr", "training loss", "held-out loss", "accuracy", "final lr", "seconds"):
        table.add_column(heading, justify="right")
    for lr in dict.fromkeys(result.lr for result in results):
        runs = [result for result in results if result.lr == lr]
        best = min((final_loss(run) for run in runs if math.isfinite(final_loss(run))), default=math.nan)
        for run in runs:
            history = run.history
            loss = f"{final_loss(run):.3f}"
            table.add_row(
                run.optimizer,
                f"{run.lr:g}",
                f"{history.recent_training_loss():.3f}",
                f"[bold]{loss}[/bold]" if final_loss(run) == best else loss,
                f"{history.validation_accuracy[-1]:.1%}",
                f"{history.lr_median[-1]:.2e}",
                f"{run.seconds:.1f}",
            )
        table.add_section()
    console.print(table)


def final_loss(result: Result) -> float:
    return result.history.validation_loss[-1]
