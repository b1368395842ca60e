"""The optimizers in float64 scalars and NumPy arrays, formula by formula (docs/algorithm.md).

Shares no code with the package and knows no torch. One class per idea: `RandomWalk` is the reference kappa_t,
`AdamState` one parameter tensor, `Oracle` a whole optimizer. What is *stored* is rounded as the optimizers store it
(parameters and path in their types, moments in float32 or float64, the scale in float32); all between is float64.

`measure` and `apply` are written once for plain arrays and for `Interval`s: run on intervals they enclose every result
that arithmetic of a given precision may give, which is how the tests bound the optimizers tightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Storage types


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, ties to even; returned as float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def round_to(storage: str, values: Any) -> np.ndarray:
    """What `storage` (a dtype's name) keeps of `values`, as float64. Narrow types are reached through float32, in which
    the arithmetic runs."""
    values = np.asarray(values, dtype=np.float64)
    if storage == "float64":
        return values.copy()
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        if storage == "bfloat16":
            single = _to_bfloat16(single)
        elif storage == "float16":
            single = single.astype(np.float16)
        elif storage != "float32":
            raise ValueError(f"unknown storage type {storage}")
    return single.astype(np.float64)


def moment_dtype(parameter_dtype: str) -> str:
    return "float64" if parameter_dtype == "float64" else "float32"


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


class Interval:
    """Arrays [lo, hi] that enclose what arithmetic with unit roundoff `unit` may compute.

    Every operation widens its result by SLACK units of its largest operand or result: an implementation may fuse,
    reorder, multiply by a reciprocal or round a constant first, and each of these costs a few units, no more.
    """

    SLACK = 8

    def __init__(self, lo: Any, hi: Any, unit: float):
        self.lo, self.hi, self.unit = np.asarray(lo, np.float64), np.asarray(hi, np.float64), unit

    @classmethod
    def exact(cls, values: Any, unit: float) -> Interval:
        return cls(values, values, unit)

    @property
    def magnitude(self) -> np.ndarray:
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    def _widened(self, lo: np.ndarray, hi: np.ndarray, *operands: Interval) -> Interval:
        size = np.maximum(np.abs(lo), np.abs(hi))
        for operand in operands:
            size = np.maximum(size, operand.magnitude)
        # Below the smallest normal float32 a result may be flushed to zero.
        tiny = 2.0**-126 if self.unit > 1e-10 else 2.0**-1022
        margin = self.SLACK * self.unit * size + tiny
        return Interval(lo - margin, hi + margin, self.unit)

    def _other(self, other: Any) -> Interval:
        return other if isinstance(other, Interval) else Interval.exact(other, self.unit)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo, self.unit)

    def __add__(self, other: Any) -> Interval:
        other = self._other(other)
        return self._widened(self.lo + other.lo, self.hi + other.hi, self, other)

    def __sub__(self, other: Any) -> Interval:
        return self + (-self._other(other))

    def __rsub__(self, other: Any) -> Interval:
        return self._other(other) - self

    def __mul__(self, other: Any) -> Interval:
        other = self._other(other)
        corners = [a * b for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return self._widened(np.minimum.reduce(corners), np.maximum.reduce(corners))

    def __truediv__(self, other: Any) -> Interval:
        other = self._other(other)
        assert not ((other.lo <= 0) & (other.hi >= 0)).any(), "division by an interval around zero"
        corners = [a / b for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return self._widened(np.minimum.reduce(corners), np.maximum.reduce(corners))

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self) -> Interval:
        return self._widened(np.sqrt(np.maximum(self.lo, 0)), np.sqrt(self.hi)).at_least(0)

    def exp(self) -> Interval:
        """Capped where it stays finite: the scale's bounds end far below."""
        return self._widened(*(np.exp(np.minimum(end, 600.0)) for end in (self.lo, self.hi)))

    def widened(self, relative: float) -> Interval:
        margin = relative * self.magnitude
        return Interval(self.lo - margin, self.hi + margin, self.unit)

    def at_least(self, other: Any) -> Interval:
        other = self._other(other)
        return Interval(np.maximum(self.lo, other.lo), np.maximum(self.hi, other.hi), self.unit)

    def at_most(self, other: Any) -> Interval:
        other = self._other(other)
        return Interval(np.minimum(self.lo, other.lo), np.minimum(self.hi, other.hi), self.unit)


Number = Any  # a float, an array or an Interval


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Interval) else np.sqrt(x)


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Interval) else np.exp(np.minimum(x, 600.0))


def maximum(x: Number, y: Number) -> Number:
    return x.at_least(y) if isinstance(x, Interval) else np.maximum(x, y)


def minimum(x: Number, y: Number) -> Number:
    return x.at_most(y) if isinstance(x, Interval) else np.minimum(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# The random walk


class RandomWalk:
    """kappa_t: the expected squared path of one element under pure-noise gradients, by its exact recursion."""

    def __init__(self, beta1: float, smoothing: float):
        self.beta1, self.smoothing = beta1, smoothing
        self.q = 1 - smoothing
        self.s = math.sqrt(smoothing * (2 - smoothing))

    def sequence(self, steps: int) -> list[float]:
        beta1, q, kappas = self.beta1, self.q, []
        V = C = P = 0.0
        for t in range(1, steps + 1):
            a = self.s / (1 - beta1**t)
            V = beta1 * beta1 * V + (1 - beta1) ** 2
            P = q * q * P + 2 * q * a * beta1 * C + a * a * V  # with the C of the step before
            C = q * beta1 * C + a * V
            kappas.append(P)
        return kappas

    @property
    def limit(self) -> float:
        beta1, q = self.beta1, self.q
        return (1 - beta1) / (1 + beta1) * (1 + beta1 * q) / (1 - beta1 * q)


@lru_cache(maxsize=4096)
def kappa(step: int, beta1: float, smoothing: float) -> float:
    return RandomWalk(beta1, smoothing).sequence(step)[-1]


@lru_cache(maxsize=4096)
def step_variance(step: int, beta1: float) -> float:
    """E[u^2] of Adam's step number `step` on pure noise, by the recursion of the first moment's variance."""
    V = 0.0
    for _ in range(step):
        V = beta1 * beta1 * V + (1 - beta1) ** 2
    return V / (1 - beta1**step) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# One parameter tensor


@dataclass(frozen=True)
class Options:
    """One group's hyperparameters at one step, by the names of the optimizers' arguments."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False
    smoothing: float = 0.05
    damping: float = 2.5
    reference: str | float = "random_walk"
    clip: tuple[float, float] | None = (0.5, 1.05)
    accumulate: bool = True
    deferred: bool = False
    initial_scale: float = 1.0
    scale_bounds: tuple[float, float] = (1e-4, 1e4)
    adapt_lr: bool = True
    path_dtype: str | None = None
    lr_smoothing: float = 0.9

    @classmethod
    def of(cls, variant: str, **given: Any) -> Options:
        defaults = {"damping": 0.5, "clip": (0.5, 2.0), "lr_smoothing": 0.9} if variant == "Smoothed" else {}
        return cls(**{**defaults, **given})

    def expected_path_norm(self, step: int, u: np.ndarray) -> float:
        """What the path norm is compared with, at step number `step` with the Adam step u."""
        if self.reference == "random_walk":
            return u.size * kappa(step, self.betas[0], self.smoothing)
        if self.reference == "measured_walk":
            walk_per_step = kappa(step, self.betas[0], self.smoothing) / step_variance(step, self.betas[0])
            return walk_per_step * math.fsum(float(x) ** 2 for x in u.ravel())
        return u.size * float(self.reference)


@dataclass(frozen=True)
class Measured:
    """A step's new moments, path and Adam step of one tensor, before rounding to storage."""

    m: Number
    v: Number
    v_max: Number
    u: Number
    path: Number


def measure(
    options: Options,
    step: int,
    theta: Number,
    grad: Number,
    m: Number,
    v: Number,
    v_max: Number,
    path: Number,
    grad_scale: float | None = None,
    stored: Callable[[Number], Number] = lambda moment: moment,
) -> Measured:
    """Step number `step` (from 1), Measure, on arrays or Intervals."""
    beta1, beta2 = options.betas
    g = grad
    if grad_scale is not None:
        g = g / grad_scale
    if options.maximize:
        g = -g
    if options.weight_decay and not options.decoupled_weight_decay:
        g = g + theta * options.weight_decay
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    v_max = maximum(v_max, v)
    second = v_max if options.amsgrad else v
    u = (stored(m) / (1 - beta1**step)) / (sqrt(stored(second) / (1 - beta2**step)) + options.eps)
    q, s = 1 - options.smoothing, math.sqrt(options.smoothing * (2 - options.smoothing))
    return Measured(m, v, v_max, u, path * q + u * s)


def apply(options: Options, theta: Number, u: Number, rate: Number) -> Number:
    """The new parameter, before rounding to storage; `rate` is lr times the scale."""
    if options.weight_decay and options.decoupled_weight_decay:
        u = u + theta * options.weight_decay
    return theta - u * rate


def adapted_scale(variant: str, options: Options, scale: Number, path_norm: Number, expected: Number) -> Number:
    """The new scale from the old one, the path norm (sum of path squared) and its random-walk reference."""
    ratio = path_norm / expected
    excess = ratio - 1
    if options.reference == "measured_walk":
        walk = expected / path_norm
        excess = maximum(1 - walk, 0) + minimum(1 - walk * 0.6, 0)
    factor = exp(excess * (options.smoothing / (2 * options.damping)))
    if options.clip is not None:
        factor = minimum(maximum(factor, options.clip[0]), options.clip[1])
    target = scale * factor if options.accumulate else factor
    if variant == "Smoothed":
        b = options.lr_smoothing
        target = scale * b + target * (1 - b)
    return minimum(maximum(target, options.scale_bounds[0]), options.scale_bounds[1])


def moves_scale(options: Options, path_norm: float, expected: float) -> bool:
    """Whether this path norm changes the scale at all."""
    return options.adapt_lr and expected > 0 and math.isfinite(path_norm / expected) and path_norm != 0


@dataclass
class AdamState:
    """One parameter tensor with its state, in its storage types."""

    theta: np.ndarray
    dtype: str = "float64"
    path_dtype: str | None = None
    step: int = 0
    scale: float | None = None
    m: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    v_max: np.ndarray = field(init=False)
    path: np.ndarray = field(init=False)
    u: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.theta = round_to(self.dtype, self.theta)
        self.m, self.v, self.v_max, self.path, self.u = (np.zeros_like(self.theta) for _ in range(5))

    def measure(self, options: Options, grad: np.ndarray, grad_scale: float | None) -> float:
        """Advances moments, path and step count; returns the path norm."""
        self.step += 1
        kept = moment_dtype(self.dtype)
        new = measure(
            options, self.step, self.theta, grad, self.m, self.v, self.v_max, self.path, grad_scale,
            stored=lambda moment: round_to(kept, moment),
        )  # fmt: skip
        self.m, self.v, self.u = round_to(kept, new.m), round_to(kept, new.v), new.u
        if options.amsgrad:
            self.v_max = round_to(kept, new.v_max)
        self.path = round_to(options.path_dtype or kept, new.path)
        return math.fsum(float(x) ** 2 for x in self.path.ravel())

    def apply(self, options: Options, scale: float) -> None:
        self.theta = round_to(self.dtype, apply(options, self.theta, self.u, options.lr * scale))


# ---------------------------------------------------------------------------------------------------------------------
# A whole optimizer


class Oracle:
    """`variant`: "Global", "Local" or "Smoothed". `groups`: per param group a list of AdamState. Options are given anew
    at every step, one per group; gradients one per parameter, None where there is none."""

    def __init__(self, variant: str, groups: Sequence[Sequence[AdamState]]):
        self.variant = variant
        self.groups = groups
        self.global_scale: float | None = None

    def step(
        self,
        options: Sequence[Options],
        grads: Sequence[Sequence[np.ndarray | None]],
        grad_scale: float | None = None,
        found_inf: bool = False,
    ) -> None:
        if found_inf:
            return
        active = [
            (group_options, state, grad)
            for group_options, states, group_grads in zip(options, self.groups, grads, strict=True)
            for state, grad in zip(states, group_grads, strict=True)
            if grad is not None
        ]
        if not active:
            return
        for group_options, state, _ in active:
            if state.scale is None:
                state.scale = float(np.float32(group_options.initial_scale))
        if self.variant == "Global":
            self._share_scale(active[0][0])
        before = [state.scale for _, state, _ in active]
        norms = [state.measure(group_options, grad, grad_scale) for group_options, state, grad in active]
        expected = [opt.expected_path_norm(state.step, state.u) for opt, state, _ in active]
        if self.variant == "Global":
            norms, expected = [math.fsum(norms)] * len(active), [math.fsum(expected)] * len(active)
        for (group_options, state, _), norm, walk, old in zip(active, norms, expected, before, strict=True):
            if moves_scale(group_options, norm, walk):
                new = adapted_scale(self.variant, group_options, old, norm, walk)
                state.scale = float(np.float32(new))
            state.apply(group_options, old if group_options.deferred else state.scale)
        if self.variant == "Global":
            self.global_scale = active[0][1].scale
            self._share_scale(active[0][0])

    def _share_scale(self, options: Options) -> None:
        """Global: one scale, in the state of every parameter that has one."""
        if self.global_scale is None:
            self.global_scale = float(np.float32(options.initial_scale))
        for states in self.groups:
            for state in states:
                if state.scale is not None:
                    state.scale = self.global_scale
