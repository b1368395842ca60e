"""Does the initial learning rate still matter? Trains small tasks from 1e-6 to 1 and compares optimizers.

    python -m study run quick            # minutes
    python -m study run                  # hours; stop it at any time, the same command goes on
    python -m study report               # tables, the targets and whether they are met
    python -m study figures              # pictures and tables of the docs
    python -m study forget local         # drop the records of an optimizer whose rule has changed

One JSON line per run is appended to study/records/<plan>.jsonl (quick: build/study-quick).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

# Set before torch is imported, here and in the workers: runs are spread over processes, not over threads.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "examples"))  # the character model and its data
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the workers

from rich.console import Console  # noqa: E402
from tqdm import tqdm  # noqa: E402

from .measures import Study  # noqa: E402
from .plans import FULL, PLANS  # noqa: E402
from .runs import Run, append_record, missing, perform, prepare_worker, read_records  # noqa: E402
from .tasks import TASKS  # noqa: E402

RECORDS = REPOSITORY / "study" / "records"
QUICK_RECORDS = REPOSITORY / "build" / "study-quick"


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.command == "forget":
        forget(args.records or RECORDS, args.names)
        return
    args.records = args.records or (QUICK_RECORDS if args.names == ["quick"] else RECORDS)
    if args.command == "run":
        unknown = set(args.names) - set(PLANS)
        if unknown:
            raise SystemExit(f"no plan {', '.join(unknown)}; there are {', '.join(PLANS)}")
        deadline = time.monotonic() + 60 * args.minutes
        for plan in args.names or FULL:
            # A plan may grow from what its first part found.
            while runs := waiting(plan, args):
                if time.monotonic() >= deadline:
                    break
                perform_all(runs, plan, args, deadline)
    from .figures import write_figures
    from .report import print_report

    if args.command == "figures":
        write_figures(Study(read_records(args.records)), REPOSITORY)
    else:
        print_report(Console(width=None if sys.stdout.isatty() else 200), Study(read_records(args.records)))


def build_parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m study", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=["run", "report", "figures", "forget"])
    add("names", nargs="*", metavar="NAME", help=f"plans, of {', '.join(PLANS)}; default: all but quick. "
        "forget: optimizers")  # fmt: skip
    add("--records", type=Path, metavar="FOLDER", help="default: study/records, of quick build/study-quick")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="NAME", help="only these tasks")
    add("--seeds", nargs="+", type=int, help="only these")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    add("--device", default="cpu", help="cpu, cuda, ...; default: %(default)s")
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    return parser


def waiting(plan: str, args: argparse.Namespace) -> list[Run]:
    records = list(read_records(args.records))
    return [
        run for run in missing(PLANS[plan](Study(records)), records)
        if (not args.tasks or run.task in args.tasks) and (args.seeds is None or run.seed in args.seeds)
    ]  # fmt: skip


def perform_all(runs: list[Run], plan: str, args: argparse.Namespace, deadline: float) -> None:
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    with workers, tqdm(total=len(runs), desc=plan, unit="run", smoothing=0.05) as progress:
        for record in results(workers, runs[::-1], args, deadline):
            append_record(args.records / f"{plan}.jsonl", record)
            progress.set_postfix_str(f"{record['task']} {record['optimizer']} {record['lr']:g}")
            progress.update()


def results(
    workers: ProcessPoolExecutor, runs: list[Run], args: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Any]]:
    """Records as they come; takes runs off the end of the list, as many at a time as there are jobs."""
    running: set[Future[dict[str, Any]]] = set()
    while running or (runs and time.monotonic() < deadline):
        while runs and len(running) < args.jobs and time.monotonic() < deadline:
            running.add(workers.submit(perform, runs.pop(), args.device))
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()


def forget(folder: Path, optimizers: list[str]) -> None:
    for path in folder.glob("*.jsonl"):
        kept = [record for record in read_records(path) if record["optimizer"].partition(",")[0] not in optimizers]
        path.unlink()
        for record in kept:
            append_record(path, record)


if __name__ == "__main__":
    main()
