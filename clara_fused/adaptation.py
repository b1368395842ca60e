"""Adapt: how the learning-rate scale follows the path. The rule of csrc/adam_clara.h, written independently in PyTorch.

All arithmetic in float64, on the device, nothing is read by the host. Notation as in docs/algorithm.md. Source: Atamna,
Maus, Kievelitz, Glasmachers, "Cumulative Learning Rate Adaptation" (arXiv 2508.05408).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import GroupOptions

_SUM_BLOCK = 1024
_PEAK_MEMORY = 0.98  # of M that is left after a step of smaller gradients
_COSINE_MEMORY = 0.9  # of the averages of x that is left after a step


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Dtype of per-tensor scalars: a few numbers, so full precision wherever there is any."""
    return torch.float32 if device.type == "mps" else torch.float64


def path_gain(smoothing: float) -> float:
    """s: the weight of a new step in the path; makes unit white noise keep a unit path."""
    return math.sqrt(smoothing * (2.0 - smoothing))


def in_adams_metric(options: GroupOptions) -> bool:
    """Whether each element counts with its d in the sums; beside a fixed reference all count alike."""
    return not options.reference


def unit_walk(beta1: float, smoothing: float) -> float:
    """The expected path^2 of one element after many steps of unit white noise."""
    correlation = beta1 * (1.0 - smoothing)
    return (1.0 - beta1) / (1.0 + beta1) * (1.0 + correlation) / (1.0 - correlation)


def bias_correction(log_beta: float, steps: Tensor) -> Tensor:
    """1 - beta^t for step counts t >= 1; expm1 keeps its relative accuracy also in float32."""
    return -torch.expm1(steps * log_beta)


# Columns of the numbers that are handed around, one row per tensor.


class PathSums(NamedTuple):
    """Over the elements of a tensor that have a path, weighted with Adam's denominator d (with 1 under a fixed
    reference), times c = numel / (number of those)."""

    path_sq: Tensor  # N
    step_sq: Tensor  # U, of Adam's steps u
    grad_sq: Tensor  # G, of the gradients g~ in units of their own size
    path_before_sq: Tensor  # N', of the path before this step, with the weights of this step
    walk_moment_sq: Tensor  # V, of what m~^2 is expected to be, m~ = m/d
    path_grad: Tensor  # X, of the path before this step times g~
    weight: Tensor  # D, of the weights themselves
    weight_sq: Tensor  # D2, of their squares; times c^2
    numel: Tensor  # n, of all elements


class Walk(NamedTuple):
    """What N is expected to be if every new gradient is independent of the past; zeros at first.

    The weights d change with every step, and every length with them. So what is stored is what a length is expected to
    be over what it is, and the next step multiplies that with lengths by its own weights. And x, the cosine of the
    angle between the path and the gradient that comes next.
    """

    moment_sq: Tensor  # V / W: V the expected sum of d m~^2, W the sum itself
    path_moment: Tensor  # (C / n)^(1/2): C the expected sum of path m; it may itself leave the range of floats
    path_sq: Tensor  # P / N: P the expected sum of d path^2
    grad_peak: Tensor  # M, the largest G / D of the last dozens of steps
    cosine: Tensor  # x
    cosine_sq: Tensor  # an average of x^2 over some steps
    cosine_lag: Tensor  # and of x times the x before it


class Evidence(NamedTuple):
    """What the excess is computed from; additive over tensors."""

    path_sq: Tensor  # N
    walk_sq: Tensor  # P
    # What P would be if all gradients were as long as Adam remembers them (D), or as the longest of late (M D) if that
    # is less.
    long_walk_sq: Tensor
    step_sq: Tensor  # U
    step_walk_sq: Tensor  # what U is expected to be: U V / W
    weight: Tensor  # D
    weight_sq: Tensor  # D2: what varies independently has variances that add up
    shared_weight: Tensor  # D sqrt(h), of shared noise: what varies together has standard deviations that add up


def advanced_walks(walks: Tensor, sums: Tensor, options: GroupOptions, steps: Tensor, moves: Tensor) -> Tensor:
    """The walks after a step with these sums; as they were where a sum is not finite or nothing has moved.

    Args:
        walks: float32 [n, 7], columns of `Walk`.
        sums: float64 [n, 9], columns of `PathSums`.
        steps: float64 [n], number of the step, from 1.
        moves: whether lr is not 0, bool, 0-dim.

    Returns:
        float32 [n, 7].
    """
    old, new = Walk(*walks.to(sums.dtype).unbind(-1)), PathSums(*sums.unbind(-1))
    beta1, q = options.beta1, 1.0 - options.smoothing
    bias1 = bias_correction(options.log_beta1, steps)
    before, length_sq = new.path_before_sq, bias1 * bias1 * new.step_sq  # N', W
    # Without a path so far the moments may all the same be old (a checkpoint of Adam's): their squares as they are.
    # From a fresh start this is the recursion's own value.
    moment_sq = torch.where(
        before == 0.0,
        length_sq,
        torch.maximum(new.walk_moment_sq, (1.0 - beta1) ** 2 * new.grad_sq),
    )
    grad_peak = torch.maximum(_PEAK_MEMORY * old.grad_peak, new.grad_sq / new.weight)
    path_sq = old.path_sq * before
    # At most what lengths allow: elements that v's overflow has taken out of these are still in C.
    path_moment = torch.minimum(beta1 * old.path_moment**2 * new.numel, path_sq.sqrt() * moment_sq.sqrt())
    a = path_gain(options.smoothing) / bias1
    path_sq = torch.where(moves, q * q * path_sq + 2.0 * q * a * path_moment + a * a * moment_sq, path_sq)
    path_moment = torch.where(moves, q * path_moment + a * moment_sq, path_moment)  # else only m has moved
    moment_sq = torch.where(length_sq == 0.0, 0.0, moment_sq / length_sq)
    kept = torch.stack((moment_sq, torch.sqrt(path_moment / new.numel), path_sq / new.path_sq, grad_peak), -1)
    advanced = torch.cat((kept, _advanced_cosines(old, new)), -1).to(walks.dtype)
    return torch.where(torch.isfinite(advanced.sum(-1, keepdim=True)), advanced, walks)


def _advanced_cosines(old: Walk, new: PathSums) -> Tensor:
    """The last three columns of `Walk`; as they were where there is no angle."""
    before = torch.stack((old.cosine, old.cosine_sq, old.cosine_lag), -1)
    cosine = new.path_grad / (new.path_before_sq.sqrt() * new.grad_sq.sqrt())
    products = torch.stack((cosine * cosine, cosine * old.cosine), -1)
    averages = _COSINE_MEMORY * before[..., 1:] + (1.0 - _COSINE_MEMORY) * products
    none = (new.path_before_sq == 0.0) | (new.grad_sq == 0.0)
    return torch.where(none.unsqueeze(-1), before, torch.cat((cosine.unsqueeze(-1), averages), -1))


def expected_moment_sq(
    m_before: Tensor,
    d_before: Tensor,
    unit_m: Tensor,
    unit_grad: Tensor,
    walk_moment_sq: float | Tensor,
    beta1: float,
    out: Tensor,
) -> None:
    """What m~^2 = (m/d)^2 is expected to be if the gradient is independent of the past; `walk_moment_sq`: V / W so far.

    Of both parts of m~, what is kept and what is gained, the squares and twice the product. The product of m_before and
    the gradient has mean 0. Divided by d it has not: d depends on this gradient too, which shows where gradients are
    skewed. Divided by a number that was known before the gradient came it has: by the larger of d_before and
    abs(m_before), since d_before may be next to nothing where v forgets at once. Overwrites d_before.
    """
    # Without eps 0 / 0 at a first step, where nobody asks for it.
    known = torch.div(m_before, d_before, out=d_before).clamp_(-1.0, 1.0)
    kept = torch.sub(unit_m, unit_grad, alpha=1.0 - beta1, out=out)  # beta1 m_before / d
    # What is gained is (1 - beta1) unit_grad; its square and twice the product are (1 - beta1) unit_grad times this.
    rest = torch.add(unit_m, kept).sub_(known, alpha=2.0 * beta1)
    kept.square_().mul_(walk_moment_sq).addcmul_(rest, unit_grad, value=1.0 - beta1)


def evidence_of(sums: Tensor, walks: Tensor, options: GroupOptions, moves: Tensor) -> Tensor:
    """Columns of `Evidence`, float64 [n, 8], after `advanced_walks`; arguments as there.

    Zeros, so no vote, where nothing moves or the gradients are all zero.
    """
    s, walk = PathSums(*sums.unbind(-1)), Walk(*walks.to(sums.dtype).unbind(-1))
    long_walk_sq = unit_walk(options.beta1, options.smoothing) * walk.grad_peak.clamp(max=1.0) * s.weight
    walk_sq, step_walk_sq = walk.path_sq * s.path_sq, walk.moment_sq * s.step_sq
    shared_weight = _shared_noise(walk).sqrt() * s.weight
    row = Evidence(s.path_sq, walk_sq, long_walk_sq, s.step_sq, step_walk_sq, s.weight, s.weight_sq, shared_weight)
    votes = moves & (s.grad_sq != 0.0)
    return torch.where(votes.unsqueeze(-1), torch.stack(row, -1), 0.0)


def _shared_noise(walk: Walk) -> Tensor:
    """h = 1 / n' of noise that elements share: n' independent elements would tell as much as these do.

    x^2 is on average h, as long as gradients are independent of those before them. Where they are not, because steps
    agree or alternate, x times the x before it is as large on average, and is subtracted. A little is left wherever
    something is learned, so it counts from 1/40 on, and in full from 1/20.
    """
    shared = walk.cosine_sq - walk.cosine_lag.abs()
    return torch.minimum(shared, 2.0 * shared - 0.05).clamp(min=0.0)


def _with_prior(ratio: Tensor, count: Tensor, neutral: float) -> Tensor:
    """A ratio of sums over few elements says little: as if `neutral` more had shown the expected one."""
    return ratio + (1.0 - ratio) * neutral / (count + neutral)


def excess(e: Evidence) -> Tensor:
    """By how much the path is too long (or, negative, too short); see docs/algorithm.md, "The excess"."""
    count = e.weight * e.weight / torch.maximum(e.weight_sq, e.shared_weight * e.shared_weight)  # n'
    # Long, also with regard to steps of a size that Adam remembers: gradients of that size may return at once.
    above = _with_prior(e.path_sq / torch.maximum(e.walk_sq, e.long_walk_sq), count, 32.0)
    # Short, and more so than the momentum can tell within its few steps; or all of it cancelled within these.
    ratio = e.path_sq / e.walk_sq
    agreement = torch.where(e.step_sq == 0.0, 0.0, (e.step_sq / e.step_walk_sq).clamp(max=1.0))
    lost = 1.0 - agreement
    alternating = torch.maximum(0.2 * lost**4, lost * (ratio / agreement).clamp(max=1.0) ** 2)
    rest = torch.maximum(0.4 * agreement**4, alternating)
    below = torch.maximum(1.0 - 0.5 / _with_prior(ratio, count, 8.0), 1.0 - rest / _with_prior(ratio, count, 2.0))
    below = below.clamp(max=0.0)
    return torch.where(above > 1.35, 1.0 - 1.35 / above, below)


def adapted_scales(scales: Tensor, evidence: Tensor, options: GroupOptions) -> Tensor:
    """The learning-rate scales after one step.

    Args:
        scales: mu, float32, any shape.
        evidence: [..., 8], columns of `Evidence`.

    Returns:
        the new mu; as it was where adaptation is off, where a sum is not finite, and where nothing has moved.
    """
    if not options.adapt_lr:
        return scales
    e = Evidence(*evidence.unbind(-1))
    # As first published, for a fixed expectation of path^2 per element; or the walk's.
    value = e.path_sq / (e.weight * options.reference) - 1.0 if options.reference else excess(e)
    factor = torch.exp(options.smoothing / (2.0 * options.damping) * value)
    factor = factor.clamp(options.clip_low, options.clip_high)
    previous, b = scales.to(evidence.dtype), options.lr_smoothing
    following = b * previous + (1.0 - b) * (previous * factor)
    following = following.clamp(options.scale_low, options.scale_high)
    known = torch.isfinite(evidence.sum(-1)) & torch.isfinite(value)
    return torch.where(known & (e.path_sq != 0.0), following.to(scales.dtype), scales)


def fixed_order_sum(values: Tensor) -> Tensor:
    """Sum over dim 0, bitwise independent of the number of threads.

    PyTorch splits a long reduction to one number over its threads; rows of at most `_SUM_BLOCK` it does not.
    """
    while values.shape[0] > _SUM_BLOCK:
        whole = values.shape[0] // _SUM_BLOCK * _SUM_BLOCK
        blocks = values[:whole].view(-1, _SUM_BLOCK, *values.shape[1:]).sum(1)
        values = torch.cat([blocks, values[whole:].sum(0, keepdim=True)])
    return values.sum(0)


def total_evidence(evidence: Sequence[Tensor]) -> Tensor:
    """Add [n, 8] evidence of all tensors of all buckets, on the first accelerator among their devices.

    Sorted first, so that the result does not depend on the order of the parameters.

    Returns:
        [8], columns of `Evidence`.
    """
    if not evidence:
        return torch.zeros(len(Evidence._fields), dtype=torch.float64, device="cpu")
    device = next((part.device for part in evidence if part.device.type != "cpu"), evidence[0].device)
    rows = torch.cat([part.to(device, scalar_dtype(device), non_blocking=device.type != "cpu") for part in evidence])
    return fixed_order_sum(torch.sort(rows, dim=0).values)
