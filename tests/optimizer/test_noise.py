"""kappa_t, the reference that the path norm is compared with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import VARIANTS, StepCheck, clones, parameters, set_gradients
from hypothesis import given
from hypothesis import strategies as st
from oracle import RandomWalk

import clara_fused
from clara_fused import random_walk_limit, random_walk_reference

# docs/algorithm.md lists these for beta1 = 0.9, rounded to the digits given.
LISTED = {
    0.05: {1: 0.0975, 2: 0.2246, 5: 0.5530, 10: 0.8549, 20: 0.9536, 40: 0.7747},
    0.2: {1: 0.36, 2: 0.6837, 5: 0.9988, 10: 0.7922, 20: 0.4640, 40: 0.3383},
}
LISTED_LIMIT = {0.05: 0.673321, 0.2: 0.323308}


@pytest.mark.parametrize("smoothing", LISTED)
def test_listed_values(smoothing: float) -> None:
    for step, value in LISTED[smoothing].items():
        assert random_walk_reference(step, 0.9, smoothing) == pytest.approx(value, abs=5.1e-5)
        assert RandomWalk(0.9, smoothing).sequence(step)[-1] == pytest.approx(value, abs=5.1e-5)
    assert random_walk_limit(0.9, smoothing) == pytest.approx(LISTED_LIMIT[smoothing], abs=5e-7)


@given(
    beta1=st.one_of(st.just(0.0), st.floats(0.0, 0.999)),
    smoothing=st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
    step=st.integers(1, 400),
)
def test_recursion(beta1: float, smoothing: float, step: int) -> None:
    expected = RandomWalk(beta1, smoothing).sequence(step)[-1]
    assert random_walk_reference(step, beta1, smoothing) == pytest.approx(expected, rel=1e-9)


def test_first_step_is_smoothing_alone() -> None:
    """u at the first step is plus or minus one whatever beta1 is."""
    for beta1 in (0.0, 0.5, 0.9, 0.999):
        assert random_walk_reference(1, beta1, 0.1) == pytest.approx(0.1 * 1.9, rel=1e-12)


def test_without_momentum_and_memory_the_walk_is_its_last_step() -> None:
    for step in (1, 2, 50):
        assert random_walk_reference(step, 0.0, 1.0) == pytest.approx(1.0, rel=1e-12)
        # Independent steps: the smoothed path's square tends to one, as 1 - q^(2t).
        assert random_walk_reference(step, 0.0, 0.2) == pytest.approx(1 - 0.8 ** (2 * step), rel=1e-12)


@pytest.mark.parametrize(("beta1", "smoothing"), [(0.9, 0.05), (0.9, 0.2), (0.0, 0.1), (0.99, 0.5), (0.5, 1.0)])
def test_limit_is_reached(beta1: float, smoothing: float) -> None:
    limit = random_walk_limit(beta1, smoothing)
    assert limit == pytest.approx(RandomWalk(beta1, smoothing).limit, rel=1e-12)
    assert RandomWalk(beta1, smoothing).sequence(5000)[-1] == pytest.approx(limit, rel=1e-9)
    assert random_walk_reference(10**9, beta1, smoothing) == pytest.approx(limit, rel=1e-9)


@pytest.mark.parametrize(("beta1", "smoothing"), [(0.9, 1e-5), (0.0, 1e-5), (0.9, 1e-4), (0.9999, 1e-3), (0.5, 3e-6)])
def test_far_beyond_any_table(beta1: float, smoothing: float) -> None:
    """Small smoothing: the walk still grows long after Adam's bias correction is over, where no table reaches."""
    sequence = RandomWalk(beta1, smoothing).sequence(400_000)
    for step in (1, 1000, 65_535, 65_536, 65_537, 70_000, 131_072, 400_000):
        assert random_walk_reference(step, beta1, smoothing) == pytest.approx(sequence[step - 1], rel=1e-7), step


def test_rejects_what_is_no_walk() -> None:
    for step in (0, -1):
        with pytest.raises(ValueError):
            random_walk_reference(step, 0.9, 0.1)
    for beta1, smoothing in [(1.0, 0.1), (-0.1, 0.1), (0.9, 0.0), (0.9, 1.1)]:
        with pytest.raises(ValueError):
            random_walk_limit(beta1, smoothing)
        with pytest.raises(ValueError):
            random_walk_reference(1, beta1, smoothing)


# What real Adam on unit Gaussian gradients may differ by: v is noisy at first, and u its quotient.
AGREEMENT = {1: 0.055, 2: 0.055, 5: 0.055, 10: 0.055, 20: 0.03, 40: 0.006, 80: 0.006, 150: 0.006}


@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_monte_carlo(smoothing: float) -> None:
    """torch.optim.Adam's steps on pure noise, 10^6 elements: the mean squared path is kappa_t."""
    elements, rate = 1_000_000, 1.0
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(elements))
    adam = torch.optim.Adam([param], lr=rate)
    path = torch.zeros(elements)
    q, s = 1 - smoothing, math.sqrt(smoothing * (2 - smoothing))
    param.grad = torch.empty(elements)
    for step in range(1, max(AGREEMENT) + 1):
        with torch.no_grad():
            param.zero_()
        param.grad.normal_(generator=generator)
        adam.step()
        path = q * path - (s / rate) * param.detach()
        if step in AGREEMENT:
            measured = path.double().square().mean().item()
            # Sampling error of the mean of 10^6 squares: about 0.15%.
            allowed = AGREEMENT[step] + 0.0015
            assert measured == pytest.approx(random_walk_reference(step, 0.9, smoothing), rel=allowed), step


def test_the_optimizer_holds_its_scale_on_noise(variant: str, fused: bool) -> None:
    """What the reference is for: on pure noise nothing pushes the rate up or down for long."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = VARIANTS[variant]([param], lr=1e-3, fused=fused)
    param.grad = torch.empty_like(param)
    for _ in range(200):
        param.grad.normal_(generator=generator)
        optimizer.step()
    assert optimizer.lr_scales()[0].item() == pytest.approx(1.0, abs=0.03)


def test_reference_follows_betas_that_change(variant: str, fused: bool) -> None:
    """OneCycleLR rewrites betas each step: kappa_t is taken for the current beta1, as Adam's bias correction is."""
    params = parameters()
    optimizer = VARIANTS[variant](params, clip=None, damping=0.1, smoothing=0.2, fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(12):
        set_gradients(params, step)
        optimizer.param_groups[0]["betas"] = (0.95 - 0.05 * step, 0.99)
        optimizer.param_groups[0]["smoothing"] = 0.2 + 0.02 * (step % 3)
        check.step()


@pytest.mark.parametrize("step", [65_000, 65_536, 200_000, 10_000_000])
def test_reference_late_in_a_run(step: int, variant: str, fused: bool) -> None:
    """A checkpoint of a long run with small smoothing: kappa beyond the table, in the step itself."""
    params = parameters([(50,)])
    optimizer = VARIANTS[variant](params, smoothing=1e-5, damping=1e-5, clip=None, fused=fused)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    state["step"].fill_(step - 1)
    limit = random_walk_limit(0.9, 1e-5)
    expected = random_walk_reference(step, 0.9, 1e-5)
    state["path"].normal_(generator=torch.Generator().manual_seed(0)).mul_(math.sqrt(expected))
    old = state["lr_scale"].item()
    set_gradients(params, 1)
    optimizer.step()
    norm = state["path"].double().square().sum().item()
    factor = math.exp(0.5 * (norm / (50 * expected) - 1))
    weight = 0.1 if variant == "Smoothed" else 1.0
    assert state["lr_scale"].item() == pytest.approx(old * (1 + weight * (factor - 1)), rel=1e-5)
    assert expected <= limit * 1.001


@pytest.mark.parametrize("count", [1e30, math.inf, math.nan, -5.0])
def test_a_count_of_steps_that_is_none(count: float, variant: str, fused: bool) -> None:
    """A damaged checkpoint: no look-up outside of the table. Endless steps are at its limit; else nothing adapts."""

    def scale_after_a_step(steps_before: float) -> float:
        (param,) = parameters([(8,)])
        optimizer = VARIANTS[variant]([param], fused=fused)
        for _ in range(2):
            param.grad = torch.ones(8)
            optimizer.step()
            optimizer.state[param]["step"].fill_(steps_before)
        return float(optimizer.lr_scales()[0])

    assert scale_after_a_step(count) == (scale_after_a_step(1e6) if count > 0 else 1.0)


def test_float_reference_counts_elements(variant: str, fused: bool) -> None:
    """reference=1.0 compares the path with the number of elements, from the first step on."""
    param = torch.nn.Parameter(torch.zeros(10))
    param.grad = torch.ones(10)
    optimizer = VARIANTS[variant]([param], reference=1.0, smoothing=0.1, damping=0.5, clip=None, fused=fused)
    optimizer.step()
    factor = math.exp(0.1 * (0.1 * 1.9 - 1))  # u is one, so the path norm is s^2 an element
    expected = 0.9 + 0.1 * factor if variant == "Smoothed" else factor
    assert optimizer.lr_scales()[0].item() == pytest.approx(expected, rel=1e-6)


def test_numpy_free_public_functions_return_floats() -> None:
    assert type(clara_fused.random_walk_reference(3, 0.9, 0.05)) is float
    assert type(clara_fused.random_walk_limit(0.9, 0.05)) is float
    assert np.isfinite(random_walk_reference(1, 0.9, 1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# reference="measured_walk"

# By smoothing / (2 damping) = 0.05 a step the logarithm of the scale follows the path's excess.
MEASURED_WALK = {"reference": "measured_walk", "smoothing": 0.05, "damping": 0.5, "clip": None}


def measured_walk_optimizer(variant: str, params: list[torch.nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    at_once = {"lr_smoothing": 0.0} if variant == "Smoothed" else {}
    return VARIANTS[variant](params, lr=1e-3, fused=fused, **MEASURED_WALK, **at_once)


def mean_excess(optimizer: torch.optim.Optimizer, scale_before: float, steps: int) -> float:
    scale = optimizer.lr_scales()[0][0].item()
    return math.log(scale / scale_before) / (0.05 * steps)


def test_measured_walk_on_noise(variant: str, fused: bool) -> None:
    """On pure noise the path is a walk, and the scale rests, also in the first steps."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = measured_walk_optimizer(variant, [param], fused)
    param.grad = torch.empty_like(param)
    scale, done = 1.0, 0
    for until, allowed in [(10, 0.04), (40, 0.02), (300, 0.01)]:
        for _ in range(until - done):
            param.grad.normal_(generator=generator)
            optimizer.step()
        assert mean_excess(optimizer, scale, until - done) == pytest.approx(0.0, abs=allowed), until
        scale, done = optimizer.lr_scales()[0][0].item(), until


def test_measured_walk_does_not_mistake_remembered_gradients(variant: str, fused: bool) -> None:
    """Noise that has become weaker makes shorter steps, not steps that cancel; Adam's v remembers for long."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(20_000))]
    optimizer = measured_walk_optimizer(variant, params, fused)
    misled = VARIANTS[variant](clones(params), lr=1e-3, fused=fused)
    for step in range(400):
        noise = torch.randn(20_000, generator=generator) * (1.0 if step < 100 else 0.1)
        for each in (optimizer, misled):
            each.param_groups[0]["params"][0].grad = noise.clone()
            each.step()
        if step == 199:
            scale, misled_scale = (each.lr_scales()[0][0].item() for each in (optimizer, misled))
    assert mean_excess(optimizer, scale, 200) == pytest.approx(0.0, abs=0.01)
    assert misled.lr_scales()[0][0].item() < 0.5 * misled_scale


def test_measured_walk_counts_no_idle_elements(variant: str, fused: bool) -> None:
    """Elements whose gradient is always zero change nothing."""
    params = parameters([(300,)])
    with_idle = [torch.nn.Parameter(torch.cat([params[0].detach(), torch.ones(700)]))]
    optimizers = [measured_walk_optimizer(variant, each, fused) for each in (params, with_idle)]
    for step in range(30):
        set_gradients(params, step)
        with_idle[0].grad = torch.cat([params[0].grad, torch.zeros(700)])
        for optimizer in optimizers:
            optimizer.step()
    busy, both = (optimizer.lr_scales()[0][0].item() for optimizer in optimizers)
    assert busy != 1.0
    assert both == pytest.approx(busy, rel=1e-5)


@pytest.mark.parametrize("step", [65_536, 10_000_000])
def test_measured_walk_late_in_a_run(step: int, variant: str, fused: bool) -> None:
    """Beyond the table of the walk, in the step itself."""
    params = parameters([(50,)])
    smoothing = 1e-5
    optimizer = VARIANTS[variant](
        params, reference="measured_walk", smoothing=smoothing, damping=smoothing, clip=None, fused=fused
    )
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    state["step"].fill_(step - 1)
    # About as long as the walk. Adam's v is far from corrected so late, and its steps are long.
    state["path"].normal_(std=30.0, generator=torch.Generator().manual_seed(0))
    old = state["lr_scale"].item()
    set_gradients(params, 1)
    optimizer.step()
    # No bias correction is left so late, and noise makes steps of variance (1 - beta1) / (1 + beta1).
    u = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    walk = random_walk_reference(step, 0.9, smoothing) / (0.1 / 1.9) * u.double().square().sum().item()
    excess = 1 - walk / state["path"].double().square().sum().item()
    assert 0.1 < excess < 0.9
    factor = math.exp(0.5 * excess)
    weight = 0.1 if variant == "Smoothed" else 1.0
    assert state["lr_scale"].item() == pytest.approx(old * (1 + weight * (factor - 1)), rel=1e-4)


# Squared length of every element's path in units of the walk's, and what it exceeds that by.
MEASURED_WALK_EXCESSES = {
    1e6: 1 - 1e-6,
    1.1: 1 - 1 / 1.1,
    0.99: 0.0,
    0.61: 0.0,
    0.5: 1 - 0.6 / 0.5,
    0.03: 1 - 0.6 / 0.03,
}


@pytest.mark.parametrize(("length_sq", "excess"), MEASURED_WALK_EXCESSES.items())
def test_measured_walk_climbs_slowly_rests_and_falls_fast(
    length_sq: float, excess: float, variant: str, fused: bool
) -> None:
    params = parameters([(50,)])
    optimizer = measured_walk_optimizer(variant, params, fused)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    old = state["lr_scale"].item()
    # With the same gradient again Adam steps by its sign, which has the length 1.
    walk = random_walk_reference(2, 0.9, 0.05) / (0.1 / 1.9 * 1.81 / 0.19)
    sign = params[0].grad.sign()
    state["path"].copy_((math.sqrt(length_sq * walk) - math.sqrt(1 - 0.95**2)) / 0.95 * sign)
    optimizer.step()
    assert state["lr_scale"].item() == pytest.approx(old * math.exp(0.05 * excess), rel=1e-5)
