"""Starting from a learning rate that is far too large."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import VARIANTS
from torch import nn

from clara_fused import cautious_initial_scale


def root_mean_square(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).square().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_step_is_a_fraction_of_the_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((30, 20), (7,), (), (0, 3))]
    scale = cautious_initial_scale(iter(params), lr=2.0, relative_step=0.05)
    assert scale == pytest.approx(0.05 * root_mean_square(params) / 2.0, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_step_taken_is_as_small_as_promised(variant: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(3.0 * torch.randn(40, 50)), nn.Parameter(torch.zeros(50))]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    VARIANTS[variant](params, lr=10.0, initial_scale=cautious_initial_scale(params, 10.0), adapt_lr=False).step()
    step = root_mean_square([after.detach() - start for after, start in zip(params, before, strict=True)])
    assert step == pytest.approx(0.01 * root_mean_square(before), rel=1e-3)


def test_a_rate_that_is_not_too_large_stays_as_it_is() -> None:
    assert cautious_initial_scale([torch.ones(5)], lr=1e-3) == 1.0
    assert cautious_initial_scale([torch.ones(5)], lr=torch.tensor(0.01, dtype=torch.float64)) == 1.0
    assert cautious_initial_scale([torch.ones(5)], lr=torch.tensor(0.02)) == pytest.approx(0.5)


def test_parameters_that_are_all_zero_say_nothing() -> None:
    assert cautious_initial_scale([torch.zeros(5), torch.zeros(2, 2)], lr=1.0) == 1.0


def test_norms_beyond_float16_count() -> None:
    param = torch.full((10_000,), 6e4, dtype=torch.float16)
    assert cautious_initial_scale([param], lr=1e4) == pytest.approx(0.06, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rate_a_thousand_times_too_large_is_survived(variant: str) -> None:
    def final_loss(cautious: bool) -> float:
        torch.manual_seed(0)
        inputs = torch.randn(256, 16)
        targets = torch.sin(inputs @ torch.randn(16, 1))
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        scale = cautious_initial_scale(model.parameters(), 3.0) if cautious else 1.0
        optimizer = VARIANTS[variant](model.parameters(), lr=3.0, initial_scale=scale)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    # The variance of the targets, which the careless run hardly gets below, is about 0.5.
    assert final_loss(cautious=True) < 0.1
    assert final_loss(cautious=False) > 0.3


@pytest.mark.parametrize(
    ("params", "lr", "relative_step", "words"),
    [
        ([], 1.0, 0.01, "no parameter has an element"),
        ([torch.ones(0)], 1.0, 0.01, "no parameter has an element"),
        ([torch.tensor([1.0, math.nan])], 1.0, 0.01, "not finite"),
        ([torch.tensor([1.0, math.inf])], 1.0, 0.01, "not finite"),
        ([torch.ones(2)], 0.0, 0.01, "Invalid lr"),
        ([torch.ones(2)], math.inf, 0.01, "Invalid lr"),
        ([torch.ones(2)], 1.0, -0.01, "Invalid relative_step"),
        ([torch.ones(2)], 1.0, math.nan, "Invalid relative_step"),
    ],
)
def test_what_has_no_answer_is_an_error(
    params: list[torch.Tensor], lr: float, relative_step: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cautious_initial_scale(params, lr, relative_step)
