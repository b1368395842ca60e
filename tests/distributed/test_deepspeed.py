"""DeepSpeed's ZeRO, really run on the CPU: right where a flat vector has one scale, refused everywhere else.

DeepSpeed hands the optimizer one flat vector per rank and group. Gradients are given: DeepSpeed works in float32.
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

    def __init__(self, as_one: bool = False) -> None:
        super().__init__()
        # Multiples of 4: DeepSpeed pads what two ranks divide to that.
        parts = [torch.linspace(-1.0, 1.0, 28).view(4, 7), torch.linspace(0.5, 2.0, 20)]
        self.parts = nn.ParameterList([torch.cat([part.flatten() for part in parts])] if as_one else parts)

    def forward(self, grads: Tensor) -> Tensor:
        split = grads.split([part.numel() for part in self.parts])
        return sum((part.flatten() * grad).sum() for part, grad in zip(self.parts, split, strict=True))


def given(step: int, rank: int) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(10 * step + rank)) + 0.5


def initialized(variant: str, stage: int, groups: int = 1, **options: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine around a model and one of the optimizers, and that optimizer."""
    rank = str(dist.get_rank())
    world = str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for minutes
    model = GivenGradients()
    params = list(model.parameters())
    optimizer = VARIANTS[variant]([{"params": params[i::groups]} for i in range(groups)], **OPTIONS, **options)
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
    model = GivenGradients(as_one=True)
    alone = VARIANTS["Global"](model.parameters(), **OPTIONS)
    for step in range(STEPS):
        engine.backward(engine(given(step, dist.get_rank())))
        engine.step()
        alone.zero_grad()
        model(sum(given(step, rank) for rank in range(dist.get_world_size())) / dist.get_world_size()).backward()
        alone.step()
        scales = torch.cat(optimizer.lr_scales()).tolist()
        assert on_all_ranks(scales) == [scales] * dist.get_world_size()
        assert scales == pytest.approx(alone.lr_scales()[0].tolist(), rel=1e-5)
    assert 1.0 not in scales
    params, expected = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (engine.module, model))
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_partition_counts_as_one_tensor(world2: World, stage: int) -> None:
    world2.run(compare_with_one_process, stage)


def refusal(variant: str, stage: int, groups: int, with_group: bool) -> str:
    engine, _ = initialized(variant, stage, groups, process_group=dist.group.WORLD if with_group else None)
    engine.backward(engine(given(0, dist.get_rank())))
    with pytest.raises(ValueError) as caught:
        engine.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("variant", "stage", "groups", "with_group", "advice"),
    [
        ("Global", 1, 1, False, "pass process_group="),
        ("Global", 2, 2, True, "give all parameters in one group"),
        ("Local", 1, 1, True, "use AdamClaraGlobal"),
        ("Smoothed", 2, 1, False, "use AdamClaraGlobal"),
        ("Global", 3, 1, True, "use AdamClaraGlobal with stage 1 or 2, or FSDP2"),
    ],
)
def test_what_cannot_be_right_is_refused(
    world2: World, variant: str, stage: int, groups: int, with_group: bool, advice: str
) -> None:
    for message in world2.run(refusal, variant, stage, groups, with_group):
        assert "DeepSpeed" in message
        assert advice in message
