"""The same bits whatever the run, the number of threads, the order or the company of the tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LIVELY, VARIANTS, results, snapshot, why_not_core

from clara_fused.adaptation import total_evidence

SHAPES = [(1000, 37), (5,), (0,), (70_001,), (64, 64), (), (130, 3), (96, 1024)]


def run(variant: str, fused: bool, dtype: torch.dtype, order: list[int], **options: Any) -> torch.optim.Optimizer:
    """Four steps over SHAPES in `order`; values and gradients belong to the shape, not to the place in the order."""
    params: dict[int, torch.nn.Parameter] = {}
    for index in order:
        generator = torch.Generator().manual_seed(index)
        params[index] = torch.nn.Parameter(torch.randn(SHAPES[index], generator=generator).to(dtype))
    optimizer = VARIANTS[variant](list(params.values()), fused=fused, **{**LIVELY[variant], **options})
    for step in range(4):
        for index, param in params.items():
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = torch.randn(SHAPES[index], generator=generator).to(dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(variant: str, dtype: torch.dtype, fused: bool) -> None:
    if fused and (reason := why_not_core("cpu", dtype)):
        pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")
    order = list(range(len(SHAPES)))
    torch.set_num_threads(1)
    expected = snapshot(run(variant, fused, dtype, order))
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert snapshot(run(variant, fused, dtype, order)) == expected, f"{threads} threads"


def test_same_bits_for_any_order_of_tensors(variant: str, fused: bool) -> None:
    """Global's sum over tensors included: it must be exact enough, or ordered, not to show the order."""
    order = list(range(len(SHAPES)))
    expected = dict(zip(order, zip(*results(run(variant, fused, torch.float32, order)), strict=True), strict=True))
    for shuffled in (order[::-1], [3, 0, 7, 6, 2, 5, 1, 4]):
        actual = zip(*results(run(variant, fused, torch.float32, shuffled)), strict=True)
        for index, result in zip(shuffled, actual, strict=True):
            assert result == expected[index], f"shape {SHAPES[index]} in order {shuffled}"


def test_the_sum_over_tensors_is_the_same_in_its_last_bit() -> None:
    """The scale is a float32, which hides most, but not all, of what an order leaves in a float64 sum."""
    generator = torch.Generator().manual_seed(0)
    evidence = torch.rand(500, 6, dtype=torch.float64, generator=generator)
    orders = [torch.randperm(500, generator=generator) for _ in range(5)]
    assert len({tuple(total_evidence(list(evidence[order].split(99))).tolist()) for order in orders}) == 1


def test_same_bits_for_any_split_into_groups(variant: str, fused: bool) -> None:
    """Groups with the same options are one list of tensors."""
    expected = results(run(variant, fused, torch.float32, list(range(len(SHAPES)))))
    params = []
    for index, shape in enumerate(SHAPES):
        params.append(torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(index))))
    groups = [{"params": params[:2]}, {"params": params[2:5]}, {"params": params[5:]}]
    split = VARIANTS[variant](groups, fused=fused, **LIVELY[variant])
    for step in range(4):
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = torch.randn(SHAPES[index], generator=generator)
        split.step()
    assert results(split) == expected
