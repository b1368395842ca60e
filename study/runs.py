"""One run: a task, an optimizer, an initial learning rate and a seed; and the file that keeps what came out."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender
from .tasks import Evaluation, Task

SNAPSHOTS = 20  # moments at which loss and rates are recorded, evenly spaced
RECORD_FORMAT = 1


@dataclass(frozen=True)
class Run:
    task: Task
    contender: Contender
    lr: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "format": RECORD_FORMAT,
            "task": self.task.name,
            "steps": self.task.steps,
            "optimizer": self.contender.name,
            "options": dict(self.contender.options),
            "lr": self.lr,
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """Equal for equal settings, whatever the order or the session."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def perform(run: Run) -> dict[str, Any]:
    """Trains and returns a record that JSON can hold. Non-finite numbers are None there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers about torch's own deprecations
        return _perform(run)


def _perform(run: Run) -> dict[str, Any]:
    started = time.perf_counter()
    problem = run.task.make(run.seed)
    trainer = run.contender.build(problem.parameters, run.lr, run.task.steps)
    trainer.evaluation_mode(False)
    first = _evaluate(problem)
    every = max(1, run.task.steps // SNAPSHOTS)
    snapshots: dict[str, list[Any]] = {"step": [], "loss": [], "lr_min": [], "lr_median": [], "lr_max": []}
    optimizer_seconds, loss_since = 0.0, 0.0

    for step in range(1, run.task.steps + 1):
        loss = problem.next_loss()
        for parameter in problem.parameters:
            parameter.grad = None
        loss.backward()
        before = time.thread_time()
        trainer.step()
        optimizer_seconds += time.thread_time() - before
        loss_since += loss.item()
        if step % every == 0:
            rates = trainer.rates()
            snapshots["step"].append(step)
            snapshots["loss"].append(rounded(loss_since / every, 4))
            for name, value in zip(("min", "median", "max"), (rates.min(), rates.median(), rates.max()), strict=True):
                snapshots[f"lr_{name}"].append(rounded(value.item(), 4))
            loss_since = 0.0
            if not math.isfinite(loss.item()):
                break

    trainer.evaluation_mode(True)
    last = _evaluate(problem)
    return {
        "key": run.key,
        **run.settings,
        "initial_training_loss": rounded(first.training_loss),
        **{name: rounded(value) for name, value in asdict(last).items()},
        # Worse than not having trained at all.
        "diverged": not last.training_loss <= first.training_loss,
        "snapshots": snapshots,
        # CPU time, which other processes on the machine do not lengthen.
        "optimizer_seconds": rounded(optimizer_seconds),
        "seconds": rounded(time.perf_counter() - started),
        "torch": torch.__version__,
    }


@torch.no_grad()
def _evaluate(problem: Any) -> Evaluation:
    evaluation: Evaluation = problem.evaluate()
    return evaluation


def rounded(value: float | None, digits: int = 6) -> float | None:
    """To so many significant digits: results stay readable and small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


# --- the file --------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file of JSON lines; a last line cut off by a crash is skipped."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # After a line that a crash cut off, a new one must not be glued to it.
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")
        file.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def missing(runs: Iterable[Run], path: Path) -> list[Run]:
    """The runs that the file does not hold yet, each once."""
    done = {record["key"] for record in read_records(path)}
    return list({run.key: run for run in runs if run.key not in done}.values())
