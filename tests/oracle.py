"""The optimizers in float64 scalars and NumPy arrays, formula by formula (docs/algorithm.md).

Shares no code with the package and knows no torch. One class per idea: `Sample` says which elements have a path, `Walk`
what its length is expected to be, `Evidence` what the scale follows, `TensorState` is one parameter tensor, `Oracle` a
whole optimizer. What is *stored* is rounded as the optimizers store it (parameters in their types, moments and path in
float32 or float64, walk and scale in float32); all between is float64.

The formulas are written once for plain numbers and for `Interval`s: run on intervals they enclose every result that
arithmetic of a given precision may give, which is how the tests bound the optimizers tightly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # roundoff of the arithmetic


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

    def square(self) -> Interval:
        ends = np.square(self.lo), np.square(self.hi)
        around_zero = (self.lo <= 0) & (self.hi >= 0)
        return self._widened(np.where(around_zero, 0.0, np.minimum(*ends)), np.maximum(*ends)).at_least(0)

    def sum(self) -> Interval:
        """Sums in blocks: some more roundings, each relative to the sum of magnitudes."""
        margin = 2 * self.SLACK * self.unit * float(np.sum(self.magnitude))
        return Interval(np.sum(self.lo) - margin, np.sum(self.hi) + margin, self.unit)

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


def square(x: Number) -> Number:
    return x.square() if isinstance(x, Interval) else np.square(x)


def absolute(x: Number) -> Number:
    return maximum(x, -x) if isinstance(x, Interval) else np.abs(x)


def total(x: Number) -> Number:
    return x.sum() if isinstance(x, Interval) else math.fsum(np.ravel(x).tolist())


def is_zero(x: Number) -> bool:
    return bool(x.hi == 0 and x.lo == 0) if isinstance(x, Interval) else bool(x == 0)


def may_be_zero(x: Number) -> bool:
    """Whether zero is among the values that rounding allows."""
    return bool(np.all(x.lo <= 0)) if isinstance(x, Interval) else bool(np.all(np.asarray(x) == 0))


def minimum(x: Number, y: Number) -> Number:
    return x.at_most(y) if isinstance(x, Interval) else np.minimum(x, y)


def where_zero(x: Number, y: Number, other: Number) -> Number:
    """y where x is 0, else other."""
    if not isinstance(x, Interval):
        return np.where(np.asarray(x) == 0, y, other)
    zero = (x.lo == 0) & (x.hi == 0)
    y, other = x._other(y), x._other(other)
    return Interval(np.where(zero, y.lo, other.lo), np.where(zero, y.hi, other.hi), x.unit)


def maximum(x: Number, y: Number) -> Number:
    return x.at_least(y) if isinstance(x, Interval) else np.maximum(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Which elements have a path

SAMPLED_FROM = 65_536  # elements of the whole tensor
SHORTEST_RUN, LONGEST_RUN = 64, 1024


@dataclass(frozen=True)
class Sample:
    """In storage order the first `kept` of every run of `run` elements; run = kept = 1: all of them."""

    run: int = 1
    kept: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], path_fraction: float, rows_outermost: bool = True) -> Sample:
        """The sample of a fresh tensor; `rows_outermost`: dimension 0 is the outermost in memory."""
        numel = math.prod(shape)
        if numel < SAMPLED_FROM or not rows_outermost:
            return cls()
        run = cls.longest_run(shape)
        if run < SHORTEST_RUN:
            return cls()
        # Nearest in the logarithm, ties up.
        kept = max(1, 2 ** math.floor(math.log2(run * path_fraction) + 0.5))
        return cls() if kept >= run else cls(run, kept)

    @staticmethod
    def longest_run(shape: Sequence[int]) -> int:
        inner = math.prod(shape) // shape[0] if len(shape) > 1 else math.prod(shape)
        run = 1
        while run < LONGEST_RUN and inner % (2 * run) == 0:
            run *= 2
        return run

    @property
    def whole(self) -> bool:
        return self.run == self.kept

    def path_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.whole:
            return tuple(shape)
        inner = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
        kept = inner // self.run * self.kept
        return (shape[0], kept) if len(shape) > 1 else (kept,)

    def take(self, flat: Number) -> Number:
        """Those elements of an array or Interval in storage order that have a path."""
        if self.whole:
            return flat
        if isinstance(flat, Interval):
            return Interval(self.take(flat.lo), self.take(flat.hi), flat.unit)
        return np.ascontiguousarray(flat.reshape(-1, self.run)[:, : self.kept]).reshape(-1)

    @property
    def weight(self) -> float:
        return self.run / self.kept


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
    initial_scale: str | float = "cautious"
    path_fraction: float = 1 / 16
    smoothing: float = 0.05
    damping: float = 0.5
    clip: tuple[float, float] | None = (0.5, 1.05)
    reference: str | float = "random_walk"
    scale_bounds: tuple[float, float] = (1e-8, 1e8)
    adapt_lr: bool = True
    lr_smoothing: float = 0.0  # Global and Local

    @property
    def path_decay(self) -> float:  # q
        return 1 - self.smoothing

    @property
    def path_gain(self) -> float:  # s
        return math.sqrt(self.smoothing * (2 - self.smoothing))

    @property
    def moves(self) -> bool:
        return self.lr != 0


@dataclass(frozen=True)
class AdamStep:
    """A step's new moments, effective gradient g, denominator d and step u of some elements, before storage."""

    expected_moment_sq: Number
    m: Number
    v: Number
    v_max: Number
    g: Number
    d: Number
    u: Number

    def of(self, sample: Sample) -> list[Number]:
        """What (m/d)^2 is expected to be, g/d, u and d of the elements that have a path."""
        return [sample.take(each) for each in (self.expected_moment_sq, self.g / self.d, self.u, self.d)]


def adam_step(
    options: Options,
    step: int,
    theta: Number,
    grad: Number,
    m: Number,
    v: Number,
    v_max: Number,
    grad_scale: float | None = None,
    walk_moment_sq: float = 0.0,
    stored: Callable[[Number], Number] = lambda moment: moment,
) -> AdamStep:
    """Step number `step` (from 1), on arrays or Intervals; `walk_moment_sq`: V/W before it."""
    beta1, beta2 = options.betas
    g = grad
    if grad_scale is not None:
        g = g / grad_scale
    if options.maximize:
        g = -g
    if options.weight_decay and not options.decoupled_weight_decay:
        g = g + theta * options.weight_decay
    m_before, m = m, m * beta1 + g * (1 - beta1)
    second_before, v = v_max if options.amsgrad else v, v * beta2 + square(g) * (1 - beta2)
    v_max = maximum(v_max, v)
    second = v_max if options.amsgrad else v
    d, d_before = (sqrt(x / bias_correction(beta2, step)) + options.eps for x in (stored(second), second_before))
    # The mean of m g over anything known before g is 0; over d, which is made of g, it need not be.
    known = m_before / where_zero(m_before, d, maximum(d_before, absolute(m_before)))
    gained = g / d * (1 - beta1)
    kept = m / d - gained  # beta1 m_before / d; so that an Interval allows for either way
    expected = square(kept) * walk_moment_sq + square(gained) + gained * (kept - known * beta1) * 2
    u = stored(m) / bias_correction(beta1, step) / d
    return AdamStep(expected, m, v, v_max, g, d, u)


def bias_correction(beta: float, step: int) -> float:
    """1 - beta^t: to full accuracy, of which a difference of numbers near 1 would lose four digits."""
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0


def extended_path(options: Options, path: Number, u: Number) -> Number:
    """Where nothing moves there is nothing to record."""
    return path * options.path_decay + u * options.path_gain if options.moves else path


def updated(options: Options, theta: Number, u: Number, rate: Number) -> Number:
    """The new parameter, before rounding to storage; `rate` is lr times the scale."""
    if options.weight_decay and options.decoupled_weight_decay:
        u = u + theta * options.weight_decay
    return theta - u * rate


# ---------------------------------------------------------------------------------------------------------------------
# Sums, walk, evidence: scalars of a tensor, floats or Intervals


@dataclass(frozen=True)
class Sums:
    path_sq: Number  # N
    step_sq: Number  # U, sum of u^2
    grad_sq: Number  # G
    path_before_sq: Number  # N', of the path before the step
    walk_moment_sq: Number  # V, of what (m/d)^2 is expected to be
    path_grad: Number  # X, of that path and the gradient
    weight: Number  # D
    weight_sq: Number  # D2


def sums_of(
    options: Options,
    sample: Sample,
    path_before: Number,
    path: Number,
    expected_moment_sq: Number,
    unit_grad: Number,
    u: Number,
    d: Number,
) -> Sums:
    """Of the elements that have a path, each weighted with d (not under a fixed reference), scaled to all."""

    weight = d if options.reference == "random_walk" else d * 0 + 1

    def length(x: Number) -> Number:
        return total(square(x) * weight) * sample.weight

    weights = total(weight) * sample.weight, total(square(weight)) * sample.weight**2
    path_grad = total(path_before * unit_grad * weight) * sample.weight
    expected = total(expected_moment_sq * weight) * sample.weight
    return Sums(*map(length, (path, u, unit_grad, path_before)), expected, path_grad, *weights)


@dataclass(frozen=True)
class Walk:
    """What N is expected to be if every gradient is independent of those before it: V = E sum(d (m/d)^2) over that sum
    itself, the root of C = E sum(path m) over n, P = E sum(d path^2) over N; and M, the largest sum(d (g/d)^2) over
    sum(d) of late. Then x, the cosine of the angle between the path and the next gradient, and averages of x^2 and of x
    times the last x."""

    moment_sq: Number = 0.0
    path_moment: Number = 0.0
    path_sq: Number = 0.0
    grad_peak: Number = 0.0
    cosine: Number = 0.0
    cosine_sq: Number = 0.0
    cosine_lag: Number = 0.0

    def values(self) -> tuple[Number, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def advanced(self, options: Options, step: int, sums: Sums, numel: int) -> Walk:
        if may_be_zero(sums.path_sq):
            return self
        beta1, q, s = options.betas[0], options.path_decay, options.path_gain
        bias1 = bias_correction(beta1, step)
        before, W = sums.path_before_sq, sums.step_sq * bias1**2  # u is m/d / bias1
        if may_be_zero(before):
            V = W  # No path so far. Moments may be older than it: then as they are.
        else:
            V = maximum(sums.walk_moment_sq, sums.grad_sq * (1 - beta1) ** 2)
        P = self.path_sq * before
        # What is left of C, at most what lengths allow.
        C = minimum(sqrt(P) * sqrt(V), square(self.path_moment) * numel * beta1)
        if options.moves:
            a = s / bias1
            C, P = C * q + V * a, P * q**2 + C * (2 * q * a) + V * a**2
        M = maximum(sums.grad_sq / sums.weight, self.grad_peak * 0.98)
        cosines = self.cosine, self.cosine_sq, self.cosine_lag
        if not may_be_zero(before) and not is_zero(sums.grad_sq):
            x = sums.path_grad / (sqrt(before) * sqrt(sums.grad_sq))
            cosines = x, self.cosine_sq * 0.9 + square(x) * 0.1, self.cosine_lag * 0.9 + x * self.cosine * 0.1
        V_over_W = 0.0 if may_be_zero(W) else V / W
        return Walk(V_over_W, sqrt(C / numel), P / sums.path_sq, M, *cosines)


def shared_noise(walk: Walk) -> Number:
    """h: one over the number of independent elements that noise which elements share is worth."""
    shared = walk.cosine_sq - absolute(walk.cosine_lag)
    return maximum(minimum(shared, shared * 2.0 - 0.05), 0.0)


@dataclass(frozen=True)
class Evidence:
    path_sq: Number = 0.0  # N
    walk_sq: Number = 0.0  # P
    long_walk_sq: Number = 0.0  # P of a walk of gradients as long as remembered
    step_sq: Number = 0.0  # U
    step_walk_sq: Number = 0.0  # what U is expected to be
    weight: Number = 0.0  # D
    weight_sq: Number = 0.0  # D2
    shared_weight: Number = 0.0  # D sqrt(h)

    @classmethod
    def of(cls, options: Options, sums: Sums, walk: Walk) -> Evidence:
        """None where nothing moves or all gradients are zero."""
        if not options.moves or is_zero(sums.grad_sq):
            return cls()
        beta1 = options.betas[0]
        correlation = beta1 * options.path_decay
        return cls(
            sums.path_sq,
            walk.path_sq * sums.path_sq,
            minimum(walk.grad_peak, 1.0)
            * sums.weight
            * ((1 - beta1) / (1 + beta1) * (1 + correlation) / (1 - correlation)),
            sums.step_sq,
            walk.moment_sq * sums.step_sq,
            sums.weight,
            sums.weight_sq,
            sums.weight * sqrt(shared_noise(walk)),
        )

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(mine + its for mine, its in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[Number, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def none(self) -> bool:
        return is_zero(self.path_sq)


def excess(e: Evidence) -> float:
    """How much longer the path is than a random walk's; of floats."""
    # Of independent elements of equal weight that had as much to say.
    count = e.weight**2 / max(e.weight_sq, e.shared_weight**2)
    above = (count * e.path_sq / max(e.walk_sq, e.long_walk_sq) + 32) / (count + 32)
    if above > 1.35:
        return 1 - 1.35 / above
    r = e.path_sq / e.walk_sq
    agreement = min(e.step_sq / e.step_walk_sq, 1.0) if e.step_sq else 0.0
    lost = 1 - agreement
    alternating = max(0.2 * lost**4, lost * (min(r / agreement, 1.0) if agreement else 1.0) ** 2)
    rest = max(0.4 * agreement**4, alternating)
    return min(0.0, max(1 - 0.5 * (count + 8) / (count * r + 8), 1 - rest * (count + 2) / (count * r + 2)))


def next_scale(options: Options, scale: float, e: Evidence) -> float:
    """The scale after a step with this evidence, of floats; before rounding to float32."""
    if not options.adapt_lr or e.path_sq == 0:
        return scale
    try:
        if options.reference == "random_walk":
            value = excess(e)
        else:
            value = e.path_sq / (e.weight * float(options.reference)) - 1
    except (ZeroDivisionError, ValueError, OverflowError):
        return scale
    if not math.isfinite(value):
        return scale
    exponent = options.smoothing / (2 * options.damping) * value
    factor = math.exp(exponent) if exponent < 700 else math.inf
    if options.clip is not None:
        factor = min(max(factor, options.clip[0]), options.clip[1])
    b = options.lr_smoothing
    following = b * scale + (1 - b) * scale * factor
    return min(max(following, options.scale_bounds[0]), options.scale_bounds[1])


def next_scale_bounds(options: Options, scale: Interval, e: Evidence) -> Interval:
    """`next_scale` over the ends of all intervals in the evidence: the rule may be any function, jumps included."""

    def ends(x: Number) -> list[float]:
        both = {float(x.lo), float(x.hi)} if isinstance(x, Interval) else {float(x)}
        return sorted({max(0.0, end) for end in both})

    corners = list(itertools.product(*(ends(getattr(e, name)) for name in e.__dataclass_fields__)))
    starts = ends(scale)
    scales = [next_scale(options, start, Evidence(*corner)) for corner in corners for start in starts]
    # Squares so small that they may be rounded to none, which is no evidence.
    if 0.0 in (ends(e.path_sq)[0], ends(e.step_sq)[0]):
        scales += starts
    low, high = min(scales), max(scales)
    return Interval(low * (1 - 4 * UNIT["float32"]), high * (1 + 4 * UNIT["float32"]), scale.unit)


def cautious_scale(options: Sequence[Options], groups: Sequence[Sequence[np.ndarray]]) -> float:
    """min(1, 0.01 RMS / lr) of the parameters of these groups and their largest lr."""
    square_sum = math.fsum(float(np.sum(np.square(p, dtype=np.float64))) for params in groups for p in params)
    count = sum(p.size for params in groups for p in params)
    lr = max(opt.lr for opt in options)
    if square_sum == 0 or lr == 0:
        return 1.0
    return min(1.0, 0.01 * math.sqrt(square_sum / count) / lr)


def initial_scale(options: Sequence[Options], groups: Sequence[Sequence[np.ndarray]]) -> float:
    own = options[0]
    if not own.adapt_lr:
        return 1.0
    if not isinstance(own.initial_scale, str):
        return float(np.float32(own.initial_scale))
    return min(max(cautious_scale(options, groups), own.scale_bounds[0]), own.scale_bounds[1])


# ---------------------------------------------------------------------------------------------------------------------
# A whole optimizer


@dataclass
class TensorState:
    """One parameter tensor with its state, in its storage types. Arrays are in storage order."""

    theta: np.ndarray
    dtype: str = "float64"
    rows_outermost: bool = True
    step: int = 0
    scale: float | None = None
    sample: Sample = Sample()
    walk: Walk = Walk()
    m: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    v_max: np.ndarray = field(init=False)
    path: np.ndarray = field(init=False)
    u: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.theta = round_to(self.dtype, self.theta)
        self.m, self.v, self.v_max, self.path, self.u = (np.zeros_like(self.theta) for _ in range(5))

    def create(self, options: Options, scale: float) -> None:
        self.scale = float(np.float32(scale))
        self.sample = Sample.of(self.theta.shape, options.path_fraction, self.rows_outermost)
        self.path = np.zeros(self.sample.path_shape(self.theta.shape))

    def measure(self, options: Options, grad: np.ndarray, grad_scale: float | None) -> Evidence:
        """Moments, path, count and walk after the step."""
        self.step += 1
        kept = moment_dtype(self.dtype)
        new = adam_step(
            options, self.step, self.theta, grad, self.m, self.v, self.v_max, grad_scale, self.walk.moment_sq,
            stored=lambda moment: round_to(kept, moment),
        )  # fmt: skip
        self.m, self.v, self.u = round_to(kept, new.m), round_to(kept, new.v), new.u
        if options.amsgrad:
            self.v_max = round_to(kept, new.v_max)
        parts = [part.reshape(self.path.shape) for part in new.of(self.sample)]
        before, self.path = self.path, round_to(kept, extended_path(options, self.path, parts[2]))
        sums = sums_of(options, self.sample, before, self.path, *parts)
        walk = self.walk.advanced(options, self.step, sums, self.theta.size)
        rounded = [float(np.float32(x)) for x in walk.values()]
        if all(map(math.isfinite, rounded)):
            self.walk = Walk(*rounded)
        return Evidence.of(options, sums, self.walk)

    def update(self, options: Options) -> None:
        assert self.scale is not None
        self.theta = round_to(self.dtype, updated(options, self.theta, self.u, options.lr * self.scale))


class Oracle:
    """`variant`: "Global", "Local" or "Smoothed". `groups`: per param group a list of TensorState. Options are given
    anew at every step, one per group; gradients one per parameter, None where there is none."""

    def __init__(self, variant: str, groups: Sequence[Sequence[TensorState]]):
        self.variant = variant
        self.groups = groups
        self.first_scales: dict[int, float] = {}  # by group; Global: 0

    def step(
        self,
        options: Sequence[Options],
        grads: Sequence[Sequence[np.ndarray | None]],
        grad_scale: float | None = None,
        found_inf: bool = False,
    ) -> None:
        if found_inf:
            return
        one_scale = self.variant == "Global"
        active = [
            (group_options, state, grad)
            for group_options, states, group_grads in zip(options, self.groups, grads, strict=True)
            for state, grad in zip(states, group_grads, strict=True)
            if grad is not None
        ]
        for index, group_grads in enumerate(grads):
            new = [s for s, g in zip(self.groups[index], group_grads, strict=True) if g is not None and s.scale is None]
            for state in new:
                state.create(options[index], self._scale_of_a_newcomer(options, index))
        evidence = [state.measure(group_options, grad, grad_scale) for group_options, state, grad in active]
        if one_scale and active:
            scale = next(state.scale for _, state, _ in active)
            together = sum(evidence, Evidence())
            scale = float(np.float32(next_scale(active[0][0], scale, together)))
            for state in (state for states in self.groups for state in states if state.scale is not None):
                state.scale = scale
        for (group_options, state, _), its_evidence in zip(active, evidence, strict=True):
            if not one_scale:
                state.scale = float(np.float32(next_scale(group_options, state.scale, its_evidence)))
            state.update(group_options)

    def _scale_of_a_newcomer(self, options: Sequence[Options], index: int) -> float:
        if self.variant != "Global":
            if index not in self.first_scales:
                values = [[s.theta for s in self.groups[index]]]
                self.first_scales[index] = initial_scale([options[index]], values)
            return self.first_scales[index]
        for states in self.groups:
            for state in states:
                if state.scale is not None:
                    return state.scale
        return initial_scale(options, [[s.theta for s in states] for states in self.groups])
