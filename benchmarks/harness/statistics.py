"""Robust statistics of interleaved samples: other work on the machine must not decide a comparison."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from harness.clocks import Clock, Step

MAX_STEPS_PER_SAMPLE = 200
# Every ratio has the baseline's time in it, whose noise would otherwise be the larger part of each.
BASELINE_SAMPLES = 3


@dataclass(frozen=True)
class Summary:
    """Median and spread of samples; `error` is half the width of the median's 95% interval, from order statistics."""

    median: float
    quartile_low: float
    quartile_high: float
    minimum: float
    error: float
    samples: int

    def as_json(self) -> dict[str, Any]:
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()} | {"samples": self.samples}


def summarize(values: Sequence[float]) -> Summary:
    """Summarize at least one sample.

    Raises:
        ValueError: no samples.
    """
    if not values:
        raise ValueError("no samples")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    # The rank of the true median among n samples is binomial(n, 1/2), about normal with deviation sqrt(n)/2.
    reach = 1.96 * math.sqrt(count) / 2
    low = ordered[max(0, math.floor(count / 2 - reach))]
    high = ordered[min(count - 1, math.ceil(count / 2 + reach) - 1)]
    quartile_low, median, quartile_high = np.quantile(ordered, [0.25, 0.5, 0.75])
    return Summary(
        float(median), float(quartile_low), float(quartile_high), float(ordered[0]), float(high - low) / 2, count
    )


Samples = dict[str, list[list[float]]]
"""Seconds per step by contender and round; the baseline has several samples in each round, the others one."""


def measure_interleaved(
    steps: Mapping[str, Step],
    clock: Clock,
    baseline: str,
    *,
    max_seconds: float,
    min_rounds: int = 12,
    max_rounds: int = 200,
    seed: int = 0,
) -> Samples:
    """Time all contenders in rounds, in random order within each round, the baseline several times in each.

    What slows the machine for a while slows a whole round, and drops out of the ratios within it. Expects warm steps.
    """
    steps_per_sample = {}
    for name, step in steps.items():
        once = clock.seconds_per_step(step, 1)
        if once < clock.min_sample_seconds:
            once = min(once, clock.seconds_per_step(step, 3))
        fitting = math.ceil(clock.min_sample_seconds / max(once, 1e-7))
        steps_per_sample[name] = min(max(fitting, 1), MAX_STEPS_PER_SAMPLE)

    order = [*steps, *[baseline] * (BASELINE_SAMPLES - 1)]
    shuffler = random.Random(seed)
    samples: Samples = {name: [] for name in steps}
    started = perf_counter()
    for round_index in range(max_rounds):
        if round_index >= min_rounds and perf_counter() - started > max_seconds:
            break
        shuffler.shuffle(order)
        for rounds in samples.values():
            rounds.append([])
        for name in order:
            samples[name][-1].append(clock.seconds_per_step(steps[name], steps_per_sample[name]))
    return samples


def all_seconds(samples: Samples, name: str) -> list[float]:
    """A contender's seconds per step, of all rounds."""
    return [seconds for of_round in samples[name] for seconds in of_round]


def ratios(samples: Samples, name: str, baseline: str) -> list[float]:
    """Time relative to another's, round by round."""
    rounds = zip(samples[name], samples[baseline], strict=True)
    return [statistics.median(own) / statistics.median(base) for own, base in rounds]
