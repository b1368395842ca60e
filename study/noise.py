"""What the learning-rate scales do where there is nothing to learn, and where there is: they rest on noise, climb
and fall fast, and zero gradients do not move them.

    python study/noise.py                                   all cases, all variants; exit status 1 if a condition fails
    python study/noise.py --variants Local --cases dense    some of them
    python study/noise.py --set damping=0.5 'clip=(0.5,2)'  under other options than the defaults

Gradients of pure noise must leave every scale where it is, in whatever pattern they come: the table shows the final
scale, as the geometric mean over eight tensors with noise of their own and as the range of the single ones.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import clara_fused

VARIANTS = {
    "Global": clara_fused.AdamClaraGlobal,
    "Local": clara_fused.AdamClaraLocal,
    "Smoothed": clara_fused.AdamClaraSmoothed,
}
STEPS = 1500
SEEDS = 8
NEUTRAL, NEARLY_NEUTRAL = (0.67, 1.5), (0.5, 2.0)
NO_TENSOR_BEYOND = (0.1, 10.0)  # where tensors have few elements
FEW_ELEMENTS = 64

# ---------------------------------------------------------------------------------------------------------------------
# Condition 1: cases


@dataclass(frozen=True)
class Case:
    """One kind of noise; `bounds` of the geometric mean of the final scales."""

    name: str
    family: str
    numel: int = 1024
    bounds: tuple[float, float] = NEUTRAL
    noise: str = "gauss"  # or "student", with long tails; "skewed", once in a while large and else a little negative
    dtype: torch.dtype = torch.float32
    betas: tuple[float, float] = (0.9, 0.999)
    element_share: float = 1.0  # of the steps in which an element has a gradient
    tensor_every: int = 1  # a tensor has a gradient in one of so many steps, zeros in the others
    at_random: bool = False  # ... at random instead of regularly
    inequality: float = 0.0  # standard deviation of the logarithm of the elements' sizes, which stay
    sources: int = 0  # the gradient is a sum of so many patterns that stay, each times a number; 0: as many as elements
    together: bool = False  # ... which are the same for all tensors
    growth: float = 0.0  # of the logarithm of the noise's size, a step
    swing: int = 0  # period in which this size goes up and down by nine tenths
    gap: range = range(0)  # steps of zero gradients
    adam_steps: int = 0  # of a torch.optim.Adam whose state is loaded first

    @property
    def few_elements(self) -> bool:
        return self.numel <= FEW_ELEMENTS

    def gradient(self, generator: torch.Generator, offset: int, step: int, seed: int) -> torch.Tensor:
        """A piece of a large pool of noise: as good as fresh, and free."""
        has_one = step % self.tensor_every == seed % self.tensor_every
        if self.at_random:
            has_one = float(torch.rand((), generator=generator)) < 1 / self.tensor_every
        if not has_one or step in self.gap:
            return torch.zeros(self.numel, dtype=self.dtype)
        if self.sources:
            source = torch.Generator().manual_seed(step) if self.together else generator
            return torch.randn(self.sources, generator=source) @ patterns(self.numel, self.sources, seed)
        values = pool(self.noise, self.dtype, self.element_share, self.pool_size)[offset : offset + self.numel]
        if self.inequality:
            values = values * sizes(self.numel, self.inequality, seed)
        if self.swing:
            values = values * (1.0 + 0.9 * math.sin(2.0 * math.pi * step / self.swing))
        return values * math.exp(self.growth * step) if self.growth else values

    @property
    def pool_size(self) -> int:
        return 1 << (24 if self.numel > 10_000 else 21)


@cache
def pool(noise: str, dtype: torch.dtype, share: float, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator)
    if noise == "student":  # three degrees of freedom
        squares = torch.randn(3, size, generator=generator).square_().mean(0)
        values /= squares.sqrt_()
    if noise == "skewed":  # of mean 0, and of standard deviation 10
        values = torch.where(torch.rand(size, generator=generator) < 1 / 101, 100.0, -1.0)
    if share < 1:
        values *= torch.rand(size, generator=generator) < share
    return values.to(dtype)


@cache
def sizes(numel: int, inequality: float, seed: int) -> torch.Tensor:
    return torch.exp(inequality * torch.randn(numel, generator=torch.Generator().manual_seed(seed)))


@cache
def patterns(numel: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, numel, generator=torch.Generator().manual_seed(seed))


def conditions() -> list[Case]:
    large = 65_536
    cases = [Case(f"{n} elements", "few", n) for n in (1, 4, 16, 64)]
    cases += [
        Case("1024 elements", "dense"),
        Case("Student-t", "dense", noise="student"),
        Case("skewed", "dense", noise="skewed"),
        Case("skewed, 64 elements", "dense", 64, noise="skewed"),
        Case("skewed, betas 0.9, 0.95", "dense", noise="skewed", betas=(0.9, 0.95)),
        Case("bfloat16", "dense", dtype=torch.bfloat16),
        Case("shrinking", "dense", growth=-1 / 150),
        Case("growing", "dense", growth=1 / 150),
    ]
    cases += [Case(f"swinging, betas {beta1}, 0.95", "dense", betas=(beta1, 0.95), swing=250) for beta1 in (0.9, 0.95)]
    cases += [
        Case(f"{n} elements, unequal e^{spread}", "unequal", n, NEARLY_NEUTRAL, inequality=spread)
        for n, spread in ((1, 3), (16, 1), (64, 1), (256, 2), (1024, 2), (1024, 3))
    ]
    cases += [
        Case(f"{n} elements, {k} source{'s' * (k > 1)}", "shared", n, NEARLY_NEUTRAL, sources=k)
        for n, k in ((1024, 1), (1024, 4), (1024, 16), (large, 4))
    ]
    cases += [Case("1 source for all tensors", "shared", bounds=NEARLY_NEUTRAL, sources=1, together=True)]
    cases += [
        Case(f"betas {beta1}, {beta2}", "betas", betas=(beta1, beta2))
        for beta1 in (0.0, 0.5, 0.9, 0.95)
        for beta2 in (0.0, 0.5, 0.95, 0.99, 0.999)
    ]
    cases += [
        Case(f"tensor in 1 of {n}{how}", "rare", bounds=NEARLY_NEUTRAL, tensor_every=n, at_random=bool(how))
        for n in (4, 20)
        for how in ("", ", at random")
    ]
    cases += [
        Case("gap of 200 steps", "rare", bounds=NEARLY_NEUTRAL, gap=range(300, 500)),
        Case("loaded Adam of 300 steps", "rare", bounds=NEARLY_NEUTRAL, adam_steps=300),
        Case("loaded Adam of 10000 steps", "rare", bounds=NEARLY_NEUTRAL, adam_steps=10_000),
    ]
    cases += [
        Case("65536 elements", "large", large),
        Case("65536 elements, bfloat16", "large", large, dtype=torch.bfloat16),
        Case("65536 elements, Student-t", "large", large, noise="student"),
        Case("elements in 1 of 20", "large", large, NEARLY_NEUTRAL, element_share=1 / 20),
        Case("elements in 1 of 500", "large", large, NEARLY_NEUTRAL, element_share=1 / 500),
        Case("65536 elements in 1 of 20", "large", large, NEARLY_NEUTRAL, tensor_every=20),
    ]
    return cases


FAMILIES = tuple(dict.fromkeys(case.family for case in conditions()))


@dataclass(frozen=True)
class Outcome:
    case: Case
    scales: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric."""
        return math.exp(sum(math.log(scale) for scale in self.scales) / len(self.scales))

    @property
    def holds(self) -> bool:
        low, high = self.case.bounds
        single_ones_hold = all(NO_TENSOR_BEYOND[0] <= scale <= NO_TENSOR_BEYOND[1] for scale in self.scales)
        return low <= self.mean <= high and (single_ones_hold or not self.case.few_elements)

    def __str__(self) -> str:
        text = f"{self.mean:.3g}"
        return f"{text} ({min(self.scales):.2g} to {max(self.scales):.2g})" if len(self.scales) > 1 else text


def run_noise(
    variant: str,
    cases: Sequence[Case],
    fused: bool | None = None,
    steps: int = STEPS,
    alone: bool = False,
    **options: Any,
) -> list[Outcome]:
    """The scales after `steps` of noise.

    Local and Smoothed run all cases in one optimizer. Global, with its one scale, takes one optimizer per case for all
    the case's tensors together, or, with `alone`, one per tensor.
    """
    if variant != "Global":
        return _run(variant, cases, range(SEEDS), fused, steps, options)
    if not alone:
        return [outcome for case in cases for outcome in _run(variant, [case], range(SEEDS), fused, steps, options)]
    outcomes = []
    for case in cases:
        runs = [_run(variant, [case], [seed], fused, steps, options)[0] for seed in range(SEEDS)]
        outcomes.append(Outcome(case, tuple(run.scales[0] for run in runs)))
    return outcomes


def _run(
    variant: str, cases: Sequence[Case], seeds: Sequence[int], fused: bool | None, steps: int, options: dict[str, Any]
) -> list[Outcome]:
    generator = torch.Generator().manual_seed(1 + seeds[0])
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(c.numel, dtype=c.dtype)) for _ in seeds], "betas": c.betas}
        for c in cases
    ]
    work = [
        (case, seed, param, torch.randint(case.pool_size - case.numel, (steps + case.adam_steps,), generator=generator))
        for case, group in zip(cases, groups, strict=True)
        for seed, param in zip(seeds, group["params"], strict=True)
    ]
    all_offsets = [offsets.tolist() for *_, offsets in work]
    optimizer = VARIANTS[variant](groups, lr=1e-3, fused=fused, **options)

    def take_steps(stepped: torch.optim.Optimizer, chosen: Callable[[Case], bool], first: int, count: int) -> None:
        for step in range(first, first + count):
            for (case, seed, param, _), offsets in zip(work, all_offsets, strict=True):
                param.grad = case.gradient(generator, offsets[step], step, seed) if chosen(case) else None
            stepped.step()

    loaded = sorted({case.adam_steps for case in cases} - {0})
    if loaded:
        adam = torch.optim.Adam([dict(group) for group in groups], lr=1e-3)
        for count in loaded:
            take_steps(adam, lambda case, count=count: case.adam_steps == count, steps, count)
        optimizer.load_state_dict(adam.state_dict())
    take_steps(optimizer, lambda case: True, 0, steps)
    scales = optimizer.lr_scales()
    one_scale = variant == "Global"
    return [
        Outcome(case, tuple(mine.tolist()[:1] if one_scale else mine.tolist()))
        for case, mine in zip(cases, scales, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Conditions 2 and 3


def scales_over_zeros(variant: str, fused: bool | None = None, zeros: int = 100, **options: Any) -> list[list[float]]:
    """The scales of four tensors at every step of a run of noise that stops for `zeros` steps, from that on."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 16, 1024, 65_536)]
    optimizer = VARIANTS[variant](params, lr=1e-3, fused=fused, **options)
    history = []
    for step in range(40 + zeros):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) if step < 40 else torch.zeros_like(param)
        optimizer.step()
        history.append(optimizer.lr_scales()[0].tolist())
    return history[39:]


def climb(
    variant: str, fused: bool | None = None, too_small: float = 1000.0, noise: float = 0.3, **options: Any
) -> float:
    """By which factor a step the scale climbs where the rate is that much too small: a quadratic with noisy gradients,
    whose right rate is about 1e-2; over steps 20 to 100."""
    generator, numel = torch.Generator().manual_seed(0), 4096
    param = torch.nn.Parameter(torch.randn(numel, generator=generator))
    optimizer = VARIANTS[variant]([param], lr=1e-2 / too_small, fused=fused, initial_scale=1.0, **options)
    scales = []
    for _ in range(100):
        param.grad = param.detach() + noise * torch.randn(numel, generator=generator)
        optimizer.step()
        scales.append(float(optimizer.lr_scales()[0][0]))
    return float((scales[-1] / scales[19]) ** (1 / 80))


def steps_to_fall_tenfold(
    variant: str,
    fused: bool | None = None,
    numel: int = 4096,
    most: int = 200,
    spread: float = 0.0,
    growth: float = 1.0,
    **options: Any,
) -> int:
    """Steps of gradients that alternate in sign until the scale is a tenth of what it was; `most`: later or never.

    Args:
        spread: each element's size is drawn anew at every step, within this share of its own.
        growth: factor a step of all sizes.
    """
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.ones(numel))
    optimizer = VARIANTS[variant]([param], lr=1e-3, fused=fused, initial_scale=1.0, **options)
    gradient = torch.randn(numel, generator=generator)
    for step in range(1, most):
        sizes = growth**step * (1.0 + spread * (2.0 * torch.rand(numel, generator=generator) - 1.0))
        param.grad = gradient * sizes if step % 2 else -gradient * sizes
        optimizer.step()
        if float(optimizer.lr_scales()[0][0]) <= 0.1:
            return step
    return most


# ---------------------------------------------------------------------------------------------------------------------
# The program


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--cases", nargs="+", default=["*"], help=f"names with wildcards, or families: {FAMILIES}")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--back-end", choices=["core", "torch", "any"], default="any")
    parser.add_argument("--alone", action="store_true", help="Global: one optimizer for each tensor")
    parser.add_argument("--set", nargs="+", type=option, default=[], metavar="OPTION=VALUE", dest="options")
    given = parser.parse_args(arguments)
    fused = {"core": True, "torch": False, "any": None}[given.back_end]
    options = dict(given.options)
    cases = [
        case
        for case in conditions()
        if any(fnmatch.fnmatch(case.name, pattern) or case.family == pattern for pattern in given.cases)
    ]
    started, all_hold = time.perf_counter(), True
    print(f"final scale after {given.steps} steps of noise, {SEEDS} tensors each\n")
    print(f"| {'noise':30} | bounds      |" + "".join(f" {variant:27} |" for variant in given.variants))
    print(f"|{'-' * 32}|-------------|" + f"{'-' * 29}|" * len(given.variants))
    columns = [run_noise(variant, cases, fused, given.steps, given.alone, **options) for variant in given.variants]
    for case, *row in zip(cases, *columns, strict=True):
        cells = "".join(f" {('' if outcome.holds else '✗ ') + str(outcome):27} |" for outcome in row)
        print(f"| {case.name:30} | {case.bounds[0]:4} to {case.bounds[1]:3} |{cells}")
        all_hold &= all(outcome.holds for outcome in row)
    if given.cases == ["*"]:
        print()
        for variant in given.variants:
            before, *after = scales_over_zeros(variant, fused, **options)
            still = all(scales == before for scales in after)
            rate, fall = climb(variant, fused, **options), steps_to_fall_tenfold(variant, fused, **options)
            uneven = steps_to_fall_tenfold(variant, fused, spread=0.75, **options)
            print(
                f"{variant}: {'rests' if still else '✗ MOVES'} on zero gradients; climbs {100 * (rate - 1):.1f}% a "
                f"step from a rate 1000 times too small{'' if rate >= 1.04 else ' ✗'}; falls tenfold in {fall} steps "
                f"of alternating gradients{'' if fall <= 60 else ' ✗'}, in {uneven}{'' if uneven <= 60 else ' ✗'} "
                "where their sizes vary by 75%"
            )
            all_hold &= still and rate >= 1.04 and max(fall, uneven) <= 60
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
