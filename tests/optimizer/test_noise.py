"""Noise has nothing to teach, steps that agree or cancel have, at the defaults.

The cases and the program that prints them as a table are in study/noise.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from study import noise

pytestmark = pytest.mark.no_cover  # a hundred thousand steps of one kind: to trace their lines tells nothing new

# The back end in plain PyTorch takes a third of them; it is compared with the same formulas as the core at every step
# of other tests.
STEPS = {True: noise.STEPS, False: noise.STEPS // 3}


def assert_all_hold(outcomes: list[noise.Outcome]) -> None:
    failed = [f"{each.case.name}: {each}, not in {each.case.bounds}" for each in outcomes if not each.holds]
    assert not failed, "\n".join(["final scales:", *failed])


@pytest.mark.slow
@pytest.mark.parametrize("family", noise.FAMILIES)
def test_scales_stay_on_noise(family: str, variant: str, fused: bool) -> None:
    """Version 1 ended at 0.0006 for an embedding table, at 1.5e8 for an expert, at 1e-8 for a scalar."""
    cases = [case for case in noise.conditions() if case.family == family]
    assert_all_hold(noise.run_noise(variant, cases, fused, STEPS[fused]))


@pytest.mark.slow
def test_the_one_scale_of_a_single_small_tensor(fused: bool) -> None:
    """Global where a model is one logit scale, or one bias."""
    cases = [case for case in noise.conditions() if case.family == "few"]
    assert_all_hold(noise.run_noise("Global", cases, fused, STEPS[fused], alone=True))


def test_zero_gradients_teach_nothing(variant: str, fused: bool) -> None:
    """Version 1 went to 0.16 or 14,000 in 200 of such steps."""
    before, *after = noise.scales_over_zeros(variant, fused)
    assert all(scales == before for scales in after)


def test_climbs_from_a_rate_1000_times_too_small(variant: str, fused: bool) -> None:
    assert noise.climb(variant, fused) >= 1.04


def test_smoothed_climbs_at_least_as_fast(fused: bool) -> None:
    assert noise.climb("Smoothed", fused) >= 0.9999 * noise.climb("Local", fused)


@pytest.mark.parametrize(
    "gradients",
    [{}, {"numel": 64}, {"numel": 256, "spread": 0.75}, {"spread": 0.75}, {"growth": 0.9}],
    ids=["4096", "64", "256, uneven", "4096, uneven", "4096, shrinking"],
)
def test_falls_tenfold_where_gradients_alternate(gradients: dict[str, Any], variant: str, fused: bool) -> None:
    assert noise.steps_to_fall_tenfold(variant, fused, **gradients) <= 60
