"""One run: a task, an optimizer, an initial learning rate and a seed; and the files that keep what came out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender
from .problem import Evaluation
from .tasks import TASKS

SNAPSHOTS = 20  # moments at which loss and rates are recorded, evenly spaced
RECORD_FORMAT = 2


@dataclass(frozen=True)
class Run:
    """Holds names and values alone, so that it travels between processes. `steps`: in place of the task's."""

    task: str
    contender: Contender
    lr: float
    seed: int
    steps: int | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "format": RECORD_FORMAT,
            "task": self.task,
            "steps": self.steps or TASKS[self.task].steps,
            "optimizer": self.contender.name,
            "options": self.contender.settings,
            "lr": self.lr,
            "seed": self.seed,
        }

    @cached_property
    def key(self) -> str:
        """Equal for equal settings, whatever the order or the session."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def prepare_worker() -> None:
    """Of a process that performs runs. Here, because a package's `__main__` cannot be imported by name."""
    torch.set_num_threads(1)
    os.nice(19)  # a study is long; whoever works on the machine goes first


def perform(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Trains and returns a record that JSON can hold. Non-finite numbers are None there."""
    with warnings.catch_warnings(), run.contender.sampling():
        warnings.simplefilter("ignore")  # of peers about torch's own deprecations
        return _perform(run, torch.device(device))


def _perform(run: Run, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    task, steps = TASKS[run.task], run.settings["steps"]
    problem = task.make(run.seed, device)
    params = list(problem.parameters)
    trainer = run.contender.build(params, run.lr, steps)
    trainer.evaluation_mode(False)
    first = _evaluate(problem)
    every = max(1, steps // SNAPSHOTS)
    snapshots: dict[str, list[Any]] = {"step": [], "loss": [], "lr_min": [], "lr_median": [], "lr_max": []}
    loss_since = torch.zeros((), device=device)

    for step in range(1, steps + 1):
        for parameter in params:
            parameter.grad = None
        for _ in range(task.micro_batches):
            loss = problem.next_loss() / task.micro_batches
            loss.backward()
            loss_since += loss.detach()
        if task.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, task.max_grad_norm)
        trainer.step()
        if step % every == 0:
            mean, rates = loss_since.item() / every, trainer.rates()
            snapshots["step"].append(step)
            snapshots["loss"].append(rounded(mean, 4))
            for name, value in zip(("min", "median", "max"), (rates.min(), rates.median(), rates.max()), strict=True):
                snapshots[f"lr_{name}"].append(rounded(value.item(), 3))
            loss_since.zero_()
            if not math.isfinite(mean):
                break

    trainer.evaluation_mode(True)
    last = _evaluate(problem)
    return {
        "key": run.key,
        **run.settings,
        "parameters": sum(parameter.numel() for parameter in params),
        "initial_training_loss": rounded(first.training_loss),
        **{name: rounded(value) for name, value in asdict(last).items()},
        # Worse than not having trained at all.
        "diverged": not last.training_loss <= first.training_loss,
        "snapshots": snapshots,
        "seconds": rounded(time.perf_counter() - started, 3),
        "device": device.type,
        "torch": torch.__version__,
    }


@torch.no_grad()
def _evaluate(problem: Any) -> Evaluation:
    evaluation: Evaluation = problem.evaluate()
    return evaluation


def rounded(value: float | None, digits: int = 6) -> float | None:
    """To so many significant digits: results stay readable and small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


# --- the files -------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file of JSON lines, or of all such files in a folder; a line cut off by a crash is skipped."""
    if path.is_dir():
        for file in sorted(path.glob("*.jsonl")):
            yield from read_records(file)
        return
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":  # after a line that a crash cut off, a new one must not be glued to it
                file.write(b"\n")
        file.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n")


def missing(runs: Iterable[Run], records: Iterable[dict[str, Any]]) -> list[Run]:
    """The runs that are not recorded yet, each once."""
    done = {record["key"] for record in records}
    return list({run.key: run for run in runs if run.key not in done}.values())
