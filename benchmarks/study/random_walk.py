"""The random-walk reference against Monte Carlo: paths of real Adam, and of normalized steps, on pure noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from clara_fused import random_walk_reference

BETA1, BETA2 = 0.9, 0.999
SMOOTHINGS = (0.02, 0.05, 0.2)
STEPS = 150
ELEMENTS = 200_000

# Settings of the CLARA paper's own Monte Carlo study: path <- (1 - c) path + c u, every u of squared norm n.
PAPER_SMOOTHING = 0.2
PAPER_MEANS = {650: 0.6827, 235_146: 0.6825, 2_193_226: 0.6825}
NORMALIZED_STEPS = {650: 200_000, 235_146: 1_200, 2_193_226: 220}
NORMALIZED_BURN_IN = 100


def normalized_limit(beta1: float, smoothing: float) -> float:
    """Expected squared path per element for normalized momentum steps: c/(2-c) * (1+b(1-c)) / (1-b(1-c))."""
    correlation = beta1 * (1.0 - smoothing)
    return smoothing / (2.0 - smoothing) * (1.0 + correlation) / (1.0 - correlation)


def adam_path(smoothing: float, generator: torch.Generator) -> list[float]:
    """Mean squared path of Adam (eps = 0) after each step on unit Gaussian gradients."""
    m, v, path = (torch.zeros(ELEMENTS, dtype=torch.float64) for _ in range(3))
    means = []
    for t in range(1, STEPS + 1):
        g = torch.randn(ELEMENTS, generator=generator, dtype=torch.float64)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g.square()
        u = m / (1 - BETA1**t) / (v / (1 - BETA2**t)).sqrt()
        path = (1 - smoothing) * path + math.sqrt(smoothing * (2 - smoothing)) * u
        means.append(path.square().mean().item())
    return means


def normalized_path(elements: int, generator: torch.Generator) -> float:
    """Mean squared path per element of momentum steps scaled to squared norm n, over the steps after a burn-in."""
    m, path = torch.zeros(elements), torch.zeros(elements)
    total = 0.0
    for step in range(NORMALIZED_STEPS[elements]):
        m.mul_(BETA1).add_(torch.randn(elements, generator=generator), alpha=1 - BETA1)
        # In place and without copies: these are the longest loops of the study.
        path.mul_(1 - PAPER_SMOOTHING).add_(m, alpha=PAPER_SMOOTHING * math.sqrt(elements) / m.norm().item())
        if step >= NORMALIZED_BURN_IN:
            total += path.square().mean().item()
    return total / (NORMALIZED_STEPS[elements] - NORMALIZED_BURN_IN)


def simulate() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "beta1": BETA1,
        "beta2": BETA2,
        "elements": ELEMENTS,
        "adam": [
            {
                "smoothing": smoothing,
                "monte_carlo": [round(value, 6) for value in adam_path(smoothing, generator)],
                "reference": [round(random_walk_reference(t, BETA1, smoothing), 6) for t in range(1, STEPS + 1)],
            }
            for smoothing in SMOOTHINGS
        ],
        "normalized": [
            {
                "elements": elements,
                "smoothing": PAPER_SMOOTHING,
                "paper": mean,
                "monte_carlo": round(normalized_path(elements, generator), 5),
                "closed_form": round(normalized_limit(BETA1, PAPER_SMOOTHING), 5),
            }
            for elements, mean in PAPER_MEANS.items()
        ],
    }


def write_simulation(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(simulate(), indent=1) + "\n", encoding="utf-8")
