"""DeepSpeed's ZeRO, really run on the CPU: right where one scale for all makes it so, refused everywhere else.

DeepSpeed hands the optimizer one flat vector per rank and group. It is not among the packages that `make test` installs
(`pip install deepspeed`); without it these tests are skipped. Gradients are given: DeepSpeed works in float32.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from sharded_models import VARIANTS, on_all_ranks
from torch import Tensor, nn

pytestmark = [
    pytest.mark.slow,  # importing DeepSpeed takes longer than all of the training
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
OPTIONS: dict[str, Any] = {"lr": 0.02, "smoothing": 0.3, "initial_scale": 1.0}
STEPS = 5


class GivenGradients(nn.Module):
    """The gradient of its output is the input, split among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1.0, 1.0, 30).view(5, 6))
        self.second = nn.Parameter(torch.linspace(0.5, 2.0, 18))  # 48 elements in all: 24 for each of two ranks

    def forward(self, grads: Tensor) -> Tensor:
        parts = grads.split([self.first.numel(), self.second.numel()])
        return sum((p.flatten() * g).sum() for p, g in zip((self.first, self.second), parts, strict=True))


def given(step: int, rank: int) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(10 * step + rank)) + 0.5


def initialized(variant: str, stage: int, **options: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine around a model and one of the optimizers, and that optimizer."""
    rank = str(dist.get_rank())
    world = str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for minutes
    model = GivenGradients()
    optimizer = VARIANTS[variant](model.parameters(), **OPTIONS, **options)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def compare_with_one_process(stage: int) -> None:
    engine, optimizer = initialized("Global", stage, process_group=dist.group.WORLD)
    model = GivenGradients()
    alone = VARIANTS["Global"](model.parameters(), **OPTIONS)
    for step in range(STEPS):
        engine.backward(engine(given(step, dist.get_rank())))
        engine.step()
        alone.zero_grad()
        model(sum(given(step, rank) for rank in range(dist.get_world_size())) / dist.get_world_size()).backward()
        alone.step()
        scale = optimizer.lr_scales()[0][0].item()
        assert on_all_ranks(scale) == [scale] * dist.get_world_size()
        assert scale == pytest.approx(alone.lr_scales()[0][0].item(), rel=1e-4)
    assert scale != 1.0
    for param, expected in zip(engine.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(param.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_scale_for_all_partitions(world2: World, stage: int) -> None:
    world2.run(compare_with_one_process, stage)


def refusal(variant: str, stage: int, with_group: bool) -> str:
    engine, _ = initialized(variant, stage, process_group=dist.group.WORLD if with_group else None)
    engine.backward(engine(given(0, dist.get_rank())))
    with pytest.raises(ValueError) as caught:
        engine.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("variant", "stage", "with_group", "advice"),
    [
        ("Global", 1, False, "pass process_group="),
        ("Local", 1, True, "use AdamClaraGlobal"),
        ("Smoothed", 2, False, "use AdamClaraGlobal"),
        ("Global", 3, True, "use AdamClaraGlobal with stage 1 or 2, or FSDP2"),
    ],
)
def test_what_cannot_be_right_is_refused(
    world2: World, variant: str, stage: int, with_group: bool, advice: str
) -> None:
    for message in world2.run(refusal, variant, stage, with_group):
        assert "DeepSpeed" in message
        assert advice in message
