"""What the study is to show of each variant at its defaults, nothing set but the initial rate, and whether it does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .measures import BASELINES, KINDS, Kind, Study, best_single
from .plans import DECADES
from .tasks import MAIN_TASKS, TASKS

ONE_RATE = 1e-3
WIDE_SPAN = 6
WIDE_SHARE: dict[Kind, float] = {"training": 0.80, "validation": 0.70}
NEAR_SHARE = 0.85
NETWORK_PARAMETERS = 10_000
NETWORK_REGRET = 0.05
MAIN = tuple(task.name for task in MAIN_TASKS)


@dataclass(frozen=True)
class Verdict:
    """met: None where too little is recorded to tell."""

    found: str
    met: bool | None


UNKNOWN = Verdict("–", None)


def never_diverges(study: Study, optimizer: str) -> Verdict:
    found = [r for task in MAIN for lr in DECADES for r in study.cells.get((task, optimizer, lr), ())]
    if not found:
        return UNKNOWN
    lost = sum(record["diverged"] for record in found)
    return Verdict(f"{lost} of {len(found)}", lost == 0)


def wide(kind: Kind) -> Callable[[Study, str], Verdict]:
    def verdict(study: Study, optimizer: str) -> Verdict:
        spans = [span for task in MAIN if (span := study.span(task, optimizer, kind, DECADES)) is not None]
        return share(sum(span >= WIDE_SPAN for span in spans), len(spans), WIDE_SHARE[kind])

    return verdict


def near_best(kind: Kind) -> Callable[[Study, str], Verdict]:
    def verdict(study: Study, optimizer: str) -> Verdict:
        tasks = [t for t in MAIN if not math.isnan(study.regret(t, optimizer, ONE_RATE, kind, BASELINES))]
        close = sum(study.near(task, optimizer, ONE_RATE, kind, BASELINES) for task in tasks)
        return share(close, len(tasks), NEAR_SHARE)

    return verdict


def one_rate_regret(kind: Kind) -> Callable[[Study, str], Verdict]:
    return lambda study, optimizer: at_most(
        0.0, median(study.regret(task, optimizer, ONE_RATE, kind, BASELINES) for task in MAIN)
    )


def ahead_of_single(kind: Kind) -> Callable[[Study, str], Verdict]:
    """In the number of tasks near the best of tuned Adam and AdamW, and in the median regret to these."""

    def verdict(study: Study, optimizer: str) -> Verdict:
        ranked = best_single(study)
        if not ranked:
            return UNKNOWN
        lr = next(lr for _, name, lr in study.cells if name == ranked[0])
        both = ((optimizer, ONE_RATE), (ranked[0], lr))
        regrets = [[study.regret(task, name, rate, kind, BASELINES) for name, rate in both] for task in MAIN]
        known = [(task, pair) for task, pair in zip(MAIN, regrets, strict=True) if not any(map(math.isnan, pair))]
        if not known:
            return UNKNOWN
        close = [sum(study.near(task, name, rate, kind, BASELINES) for task, _ in known) for name, rate in both]
        medians = [statistics.median(pair[index] for _, pair in known) for index in (0, 1)]
        text = f"{close[0]} : {close[1]} of {len(known)}, {percent(medians[0])} : {percent(medians[1])}"
        return Verdict(text, close[0] > close[1] and medians[0] < medians[1])

    return verdict


def at_tuned_rate(study: Study, task: str, optimizer: str, kind: Kind) -> float:
    """The regret from tuned Adam's own rate."""
    best = study.best(task, "adam", kind)
    return study.regret(task, optimizer, best[0], kind) if best else math.nan


def tuned_regret(kind: Kind) -> Callable[[Study, str], Verdict]:
    return lambda study, optimizer: at_most(0.0, median(at_tuned_rate(study, t, optimizer, kind) for t in MAIN))


def network_regret(kind: Kind) -> Callable[[Study, str], Verdict]:
    def verdict(study: Study, optimizer: str) -> Verdict:
        regrets = {task: at_tuned_rate(study, task, optimizer, kind) for task in MAIN if is_network(study, task)}
        known = {task: regret for task, regret in regrets.items() if not math.isnan(regret)}
        if not known:
            return UNKNOWN
        worst = max(known, key=lambda task: known[task])
        above = sum(regret > NETWORK_REGRET for regret in known.values())
        return Verdict(f"{above} of {len(known)} above; {worst} {percent(known[worst])}", above == 0)

    return verdict


def is_network(study: Study, task: str) -> bool:
    sizes = (found[0]["parameters"] for (name, _, _), found in study.cells.items() if name == task)
    return TASKS[task].goal == "loss" and next(sizes, 0) > NETWORK_PARAMETERS


def share(count: int, total: int, needed: float) -> Verdict:
    return Verdict(f"{count} of {total}", count >= needed * total) if total else UNKNOWN


def at_most(limit: float, value: float) -> Verdict:
    return UNKNOWN if math.isnan(value) else Verdict(percent(value), value <= limit)


def median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def percent(fraction: float) -> str:
    if math.isnan(fraction):
        return "–"
    return f"{100 * fraction:+.1f}%" if abs(fraction) < 10 else "> 1000%"


TARGETS: dict[str, Callable[[Study, str], Verdict]] = {
    "no run of the seven decades diverges": never_diverges,
    **{f"within 10% of tuned Adam from {WIDE_SPAN} of 7 decades on {WIDE_SHARE[kind]:.0%} of the tasks, {kind}":
       wide(kind) for kind in KINDS},
    **{f"from 1e-3 within 10% of tuned Adam and AdamW on {NEAR_SHARE:.0%} of the tasks, {kind}":
       near_best(kind) for kind in KINDS},
    **{f"from 1e-3 median regret to these at most 0, {kind}": one_rate_regret(kind) for kind in KINDS},
    **{f"from 1e-3 ahead of the best single AdamW (tasks within 10%, median regret), {kind}":
       ahead_of_single(kind) for kind in KINDS},
    **{f"from tuned Adam's rate median regret at most 0, {kind}": tuned_regret(kind) for kind in KINDS},
    **{f"from tuned Adam's rate at most {NETWORK_REGRET:.0%} on networks of more than {NETWORK_PARAMETERS:,}, {kind}":
       network_regret(kind) for kind in KINDS},
}  # fmt: skip
