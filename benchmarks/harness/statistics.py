"""Robust statistics of interleaved samples: other work on the machine must not decide a comparison."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from harness.clocks import Clock, Step

MAX_STEPS_PER_SAMPLE = 200
# A contender this many times slower than the baseline takes part in every fourth round only: its ratio needs less
# precision, and the time is better spent on those that are close.
SLOW = 5.0
SLOW_EVERY = 4


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


Samples = dict[str, dict[int, float]]
"""Seconds per step by contender and round."""


def measure_interleaved(
    steps: Mapping[str, Step],
    clock: Clock,
    baseline: str,
    *,
    max_seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    seed: int = 0,
) -> Samples:
    """Time all contenders in rounds, in random order within each round.

    What slows the machine for a while slows a whole round, and drops out of the ratios within it. Expects warm steps.

    Returns:
        seconds per step; a slow contender misses rounds, the baseline never.
    """
    steps_per_sample = {}
    once = {}
    for name, step in steps.items():
        once[name] = clock.seconds_per_step(step, 1)
        if once[name] < clock.min_sample_seconds:
            once[name] = min(once[name], clock.seconds_per_step(step, 3))
        fitting = math.ceil(clock.min_sample_seconds / max(once[name], 1e-7))
        steps_per_sample[name] = min(max(fitting, 1), MAX_STEPS_PER_SAMPLE)
    slow = {name for name in steps if once[name] > SLOW * once[baseline] and once[name] > clock.min_sample_seconds}

    order = list(steps)
    shuffler = random.Random(seed)
    samples: Samples = {name: {} for name in steps}
    started = perf_counter()
    for round_index in range(max_rounds):
        if round_index >= min_rounds and perf_counter() - started > max_seconds:
            break
        shuffler.shuffle(order)
        for name in order:
            if name not in slow or round_index % SLOW_EVERY == 0:
                samples[name][round_index] = clock.seconds_per_step(steps[name], steps_per_sample[name])
    return samples


def ratios(samples: Samples, name: str, baseline: str) -> list[float]:
    """Time relative to the baseline's, round by round."""
    base = samples[baseline]
    return [seconds / base[index] for index, seconds in samples[name].items()]
