"""What the programs share around a measurement: options, what was found and what could not be, JSON, tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.clocks import Step
from harness.contenders import BASELINE, CONTENDERS, Contender, Unavailable
from harness.environment import REPOSITORY, OtherWork, describe_environment
from harness.memory import keep_freed_memory
from harness.statistics import Samples, all_seconds, ratios, summarize
from harness.tables import Document, Row, aligned

DEFAULT_RESULTS = REPOSITORY / "benchmarks" / "results"
NOTHING_MEASURED = 3
# Of all cores' time. Below it the medians were seen to stay where they are.
MUCH_OTHER_WORK = 0.05
WARM_UP_STEPS = 3


def benchmark_parser(documentation: str | None, optimizers: Sequence[str], seconds: float | None, per: str) -> Any:
    """The options that all benchmarks have. `seconds`: to measure per `per`; None: what suits the device."""
    summary, _, details = (documentation or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--out", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="for JSON; default: %(default)s")
    add("--optimizers", nargs="+", type=checked_choices("optimizer", CONTENDERS), default=list(optimizers),
        metavar="NAME", help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    add("--seconds", type=float, default=seconds, help=f"to measure per {per}; default: {seconds or 'by device'}")
    return parser


def checked_choices(kind: str, known: Any) -> Callable[[str], str]:
    """A type for argparse whose error names the known values."""

    def check(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(f"no {kind} {value!r}; there are {', '.join(map(str, known))}")
        return value

    return check


class Session:
    """One run of a program: the device, made current, and what is found there.

    Exits with status `NOTHING_MEASURED` if this machine lacks the device.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.benchmark, self.args = benchmark, args
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                print(f"skipped: --device {args.device}, but PyTorch finds no usable CUDA device")
                raise SystemExit(NOTHING_MEASURED)
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
        before = OtherWork()
        time.sleep(0.5)
        warn_of_other_work(before.share(), "is running here: the ratios may not repeat")
        self.other_work = OtherWork()
        self.keeps_freed_memory = keep_freed_memory()
        self.names = list(dict.fromkeys([BASELINE, *args.optimizers]))
        self.results: list[Row] = []
        self.skipped: list[dict[str, str]] = []

    def skip(self, optimizer: str, reason: str, where: str) -> None:
        self.skipped.append({"optimizer": optimizer, "reason": reason, "where": where})

    def warmed(
        self, names: Iterable[str], make: Callable[[Contender], Step], where: str, warm_up: int = WARM_UP_STEPS
    ) -> dict[str, Step]:
        """Steps that have run a few times; who cannot run here is skipped. Empty if the baseline cannot.

        Also tells the user where the measurement has got to.
        """
        print(f"measuring {where}", flush=True)
        steps: dict[str, Step] = {}
        for name in names:
            try:
                step = make(CONTENDERS[name])
                for _ in range(warm_up):
                    step()
            except (Unavailable, RuntimeError, NotImplementedError) as error:
                self.skip(name, str(error).strip().partition("\n")[0], where)
                continue
            steps[name] = step
        return steps if BASELINE in steps else {}

    def record(self, samples: Samples, name: str, place: Row, **more: Any) -> Row:
        """One line of the results: a contender at some place (a model, a number of tensors)."""
        row = {
            **place,
            "optimizer": name,
            "label": CONTENDERS[name].label,
            "seconds": summarize(all_seconds(samples, name)).as_json(),
            "ratio": summarize(ratios(samples, name, BASELINE)).as_json(),
            **more,
        }
        self.results.append(row)
        return row

    def finish(self, *tables: Callable[[Document], str], **content: Any) -> int:
        """Print what was found, and write it with all that it depends on; returns the program's exit status."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for each in self.skipped:
            reasons.setdefault((each["optimizer"], each["reason"]), []).append(each["where"])
        for (name, reason), places in reasons.items():
            print(f"not measured: {CONTENDERS[name].label}, {reason}: {', '.join(dict.fromkeys(places))}")
        if not self.results:
            print("nothing could be measured")
            return NOTHING_MEASURED
        other_work = self.other_work.share()
        document = {
            "benchmark": self.benchmark,
            "device": self.device.type,
            **describe_environment(self.device),
            "other_work": None if other_work is None else round(other_work, 3),
            "settings": {
                "seconds": self.args.seconds, "baseline": BASELINE, "keeps_freed_memory": self.keeps_freed_memory,
            },
            "results": self.results,
            "skipped": self.skipped,
            **content,
        }  # fmt: skip
        for table in tables:
            print(f"\n{aligned(table(document))}")
        path = self.args.out / f"{self.benchmark}-{self.device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"results: {path}")
        warn_of_other_work(other_work, "ran beside this: the ratios may not repeat")
        return 0


def warn_of_other_work(share: float | None, consequence: str) -> None:
    """Ratios survive a machine that slows now and then, but not one whose cores are taken all the time.

    Threads that wait for each other then wait for the scheduler: torch's fused Adam was seen a thousand times slower.
    """
    if share is not None and share > MUCH_OTHER_WORK:
        print(f"other work ({share:.0%} of the cores) {consequence}")
