#!/usr/bin/env python3
"""How much does the initial learning rate matter? Trains small tasks from 1e-6 to 1 and compares optimizers.

    python benchmarks/lr_robustness.py run quick        # minutes
    python benchmarks/lr_robustness.py run full         # hours; stop it at any time, the same command goes on
    python benchmarks/lr_robustness.py report full      # tables to the terminal
    python benchmarks/lr_robustness.py random-walk      # Monte Carlo of the reference, minutes
    python benchmarks/lr_robustness.py figures          # pictures and tables of docs/learning_rate.md

One JSON line per run is appended to the plan's file under benchmarks/results/learning_rate.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

# Set before torch is imported, here and in the workers: runs are spread over processes, not over threads.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "examples"))  # the character model and its data

from rich.console import Console  # noqa: E402
from study.plans import PLANS  # noqa: E402
from study.runs import Run, append_record, missing, perform  # noqa: E402
from study.tasks import TASKS  # noqa: E402
from tqdm import tqdm  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "learning_rate"
ROUND_SECONDS = 20.0
PAUSE_SECONDS = 0.5


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    path = args.results or RESULTS / f"{args.plan}.jsonl"
    if args.command == "run":
        perform_all(missing(PLANS[args.plan](), path), path, args)
    if args.command in ("run", "report"):
        from study.report import print_report

        print_report(Console(), path)
    if args.command == "random-walk":
        from study.random_walk import write_simulation

        write_simulation(RESULTS / "random_walk.json")
    if args.command == "figures":
        from study.figures import write_figures

        write_figures(RESULTS, REPOSITORY / "docs")


def build_parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=["run", "report", "random-walk", "figures"])
    add("plan", choices=list(PLANS), nargs="?", default="full", help="default: %(default)s")
    add("--results", type=Path, metavar="FILE", help="instead of the plan's own file")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="NAME", help="only these tasks")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    add("--lock", type=Path, metavar="FILE",
        help="hold a shared lock on FILE while computing, released between rounds of seconds, for those who time "
             "something on the same machine under an exclusive lock")  # fmt: skip
    return parser


def perform_all(runs: list[Run], path: Path, args: argparse.Namespace) -> None:
    """Performs the runs and appends their records, in rounds, as many at a time as there are jobs."""
    waiting = [run for run in runs if args.tasks is None or run.task.name in args.tasks][::-1]
    deadline = time.monotonic() + 60 * args.minutes
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    with workers, tqdm(total=len(waiting), unit="run", smoothing=0.05) as progress:
        while waiting and time.monotonic() < deadline:
            with shared_lock(args.lock):
                for record in one_round(workers, args.plan, waiting, args.jobs):
                    append_record(path, record)
                    progress.set_postfix_str(f"{record['task']} {record['optimizer']} {record['lr']:g}")
                    progress.update()
            if args.lock:
                time.sleep(PAUSE_SECONDS)


def one_round(workers: ProcessPoolExecutor, plan: str, waiting: list[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Performs the last of `waiting` and takes them off it, until the round's time is over."""
    end = time.monotonic() + ROUND_SECONDS
    running: set[Future[dict[str, Any]]] = set()
    while running or (waiting and time.monotonic() < end):
        while waiting and len(running) < jobs and time.monotonic() < end:
            # A run holds functions, which do not travel between processes; names do.
            running.add(workers.submit(perform_planned, plan, waiting.pop().key))
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()


def prepare_worker() -> None:
    import torch

    torch.set_num_threads(1)
    os.nice(19)  # a study is long; whoever works on the machine goes first


def perform_planned(plan: str, key: str) -> dict[str, Any]:
    return perform(planned_runs(plan)[key])


@lru_cache(maxsize=1)
def planned_runs(plan: str) -> dict[str, Run]:
    return {run.key: run for run in PLANS[plan]()}


@contextmanager
def shared_lock(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


if __name__ == "__main__":
    main()
