"""Adapt: the random-walk reference, and how the learning-rate scale follows the path. In PyTorch, on the device.

Source: Atamna, Maus, Kievelitz, Glasmachers, "Cumulative Learning Rate Adaptation" (arXiv 2508.05408); the reference
for Adam's steps is derived in docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .batches import moved
from .options import GroupOptions, Variant

# Adam's bias correction 1/(1 - beta1^t) counts as 1 once beta1^t is below this.
_NEGLIGIBLE = 1e-12
_MAX_TABLE_LENGTH = 1 << 20  # enough for beta1 up to 0.99997
_SUM_BLOCK = 1024
# Where the learning rate is right, batches still pull back what the last ones overdid: the path is then shorter than a
# walk of the measured steps, but longer than this share of it. docs/learning_rate.md has the measurements behind it.
_RESTING_SHARE = 0.6


def _check_walk(beta1: float, smoothing: float) -> None:
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"beta1 must be in [0, 1), got {beta1}")
    if not 0.0 < smoothing <= 1.0:
        raise ValueError(f"smoothing must be in (0, 1], got {smoothing}")


def random_walk_limit(beta1: float, smoothing: float) -> float:
    """Limit of the random-walk reference for t to infinity: (1-b)/(1+b) * (1+bq)/(1-bq), b = beta1, q = 1-smoothing.

    Raises:
        ValueError: `beta1` is outside [0, 1) or `smoothing` outside (0, 1].
    """
    _check_walk(beta1, smoothing)
    correlation = beta1 * (1.0 - smoothing)
    return (1.0 - beta1) / (1.0 + beta1) * (1.0 + correlation) / (1.0 - correlation)


@lru_cache(maxsize=64)
def _reference_table(beta1: float, smoothing: float) -> tuple[float, ...]:
    """Values kappa_1 ... kappa_T of the recursion, up to where the bias correction has died out."""
    length = 1 if beta1 == 0.0 else math.ceil(math.log(_NEGLIGIBLE) / math.log(beta1))
    q = 1.0 - smoothing
    gain = math.sqrt(smoothing * (2.0 - smoothing))
    table = []
    # Variance of m, covariance of path and m, variance of the path, for unit white noise as gradients.
    variance = covariance = path_variance = 0.0
    beta1_power = 1.0
    for _ in range(min(length, _MAX_TABLE_LENGTH)):
        beta1_power *= beta1
        a = gain / (1.0 - beta1_power)
        variance = beta1 * beta1 * variance + (1.0 - beta1) ** 2
        path_variance = q * q * path_variance + 2.0 * q * a * beta1 * covariance + a * a * variance
        covariance = q * beta1 * covariance + a * variance
        table.append(path_variance)
    return tuple(table)


def _step_variance(beta1: float, power: float) -> float:
    """U_t for power = beta1^t: the expected square of one element of Adam's steps on pure-noise gradients."""
    return (1.0 - beta1) / (1.0 + beta1) * (1.0 + power) / (1.0 - power)


def _tail_decay(smoothing: float) -> float:
    """Logarithm of q^2: beyond the table the reference approaches its limit by this factor a step."""
    return 2.0 * math.log1p(-smoothing) if smoothing < 1.0 else -math.inf


def random_walk_reference(step: int, beta1: float, smoothing: float) -> float:
    """kappa_t: the expected squared path of one element after `step` Adam steps on pure-noise gradients.

    Args:
        step: t, from 1.
        beta1: decay of the first moment, in [0, 1).
        smoothing: weight of the path's decay, in (0, 1].

    Raises:
        ValueError: `step` is below 1, `beta1` outside [0, 1) or `smoothing` outside (0, 1].
    """
    _check_walk(beta1, smoothing)
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    table = _reference_table(beta1, smoothing)
    if step <= len(table):
        return table[step - 1]
    limit = random_walk_limit(beta1, smoothing)
    return limit + (table[-1] - limit) * math.exp((step - len(table)) * _tail_decay(smoothing))


@lru_cache(maxsize=64)
def _reference_table_on(
    beta1: float, smoothing: float, measured_walk: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    values: Sequence[float] = _reference_table(beta1, smoothing)
    if measured_walk:
        values = [k / _step_variance(beta1, beta1**t) for t, k in enumerate(values, 1)]
    table = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # From pinned memory the copy does not wait for the device.
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def reference_at(steps: Tensor, options: GroupOptions) -> Tensor:
    """kappa for a vector of step numbers (float, from 1), on their device and in their dtype.

    Under `measured_walk` it is kappa_t / U_t, the walk's squared length in units of a step's.
    """
    if options.fixed_reference is not None:
        return torch.full_like(steps, options.fixed_reference)
    table = _reference_table_on(options.beta1, options.smoothing, options.measured_walk, steps.device, steps.dtype)
    limit = random_walk_limit(options.beta1, options.smoothing)
    if options.measured_walk:
        limit /= _step_variance(options.beta1, 0.0)
    # As integers first: a NaN (a damaged checkpoint) stays a NaN if clamped, and would be no index.
    tabulated = table.index_select(0, (steps - 1.0).to(torch.int64).clamp(0, len(table) - 1))
    steps_beyond = (steps - len(table)).clamp(min=0.0)
    decay = _tail_decay(options.smoothing)
    # exp(-inf * 0) would be NaN, so smoothing = 1 is told apart on the host.
    tail = torch.exp(steps_beyond * decay) if math.isfinite(decay) else (steps_beyond == 0.0).to(steps.dtype)
    return torch.where(steps_beyond > 0.0, limit + (tabulated - limit) * tail, tabulated)


def _excess_over_measured_walk(walk: Tensor) -> Tensor:
    """By how much a path is too long or (negative) too short, from the walk's squared length in units of the path's.

    At most 1 however long the path, without bound where it is short, so that the scale climbs slowly and falls fast.
    Between the walk and the resting share of it the scale rests.
    """
    return (1.0 - walk).clamp(min=0.0) + (1.0 - _RESTING_SHARE * walk).clamp(max=0.0)


def adapted_scales(scales: Tensor, sums: Tensor, options: GroupOptions, variant: Variant) -> Tensor:
    """The learning-rate scales after one step.

    Args:
        scales: mu, any shape.
        sums: [..., 2], the path's squared norm N and its random-walk expectation.

    Returns:
        the new mu; unchanged where adaptation is off, the ratio is not finite, or nothing has moved yet.
    """
    if not options.adapt_lr:
        return scales
    path_sq, expected_path_sq = sums.unbind(-1)
    ratio = path_sq / expected_path_sq
    excess = _excess_over_measured_walk(expected_path_sq / path_sq) if options.measured_walk else ratio - 1.0
    factor = torch.exp(options.factor_gain * excess).clamp(*options.clip)
    previous = scales.to(sums.dtype)
    proposed = previous * factor if options.accumulate else factor
    if variant is Variant.SMOOTHED:
        assert options.lr_smoothing is not None
        proposed = options.lr_smoothing * previous + (1.0 - options.lr_smoothing) * proposed
    proposed = proposed.clamp(*options.scale_bounds)
    return torch.where(torch.isfinite(ratio) & (path_sq != 0.0), proposed.to(scales.dtype), scales)


def fixed_order_sum(values: Tensor) -> Tensor:
    """Sum over dim 0, bitwise independent of the number of threads.

    PyTorch splits a long reduction to one number over its threads; rows of at most `_SUM_BLOCK` it does not.
    """
    while values.shape[0] > _SUM_BLOCK:
        whole = values.shape[0] // _SUM_BLOCK * _SUM_BLOCK
        blocks = values[:whole].view(-1, _SUM_BLOCK, *values.shape[1:]).sum(1)
        values = torch.cat([blocks, values[whole:].sum(0, keepdim=True)])
    return values.sum(0)


def total_sums(sums: Sequence[Tensor]) -> Tensor:
    """Add [n, 2] sums over all tensors of all batches, on the first accelerator among their devices.

    Sorted first, so that the result does not depend on the order of the parameters.

    Returns:
        [2]: summed squared path norm and summed expectation.
    """
    device = next((part.device for part in sums if part.device.type != "cpu"), sums[0].device)
    gathered = torch.cat([moved(part, device) for part in sums])
    return fixed_order_sum(gathered.sort(dim=0).values)
