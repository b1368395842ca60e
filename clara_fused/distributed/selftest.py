"""Compare sharded training with the same training on one process: `python -m clara_fused.distributed.selftest`.

Started by torchrun, it uses the ranks it is given, on their GPUs (nccl) or CPUs (gloo):

    torchrun --nproc-per-node 8 -m clara_fused.distributed.selftest

Started alone it makes a few ranks of its own on this machine's CPU. It shards a small model with FSDP2 (and, for an
even number of ranks from 4, with HSDP and with FSDP2 and tensor parallelism together), trains it with each optimizer,
and checks after every step that all ranks have bit for bit the same learning-rate scales, and that parameters and
scales are those of an unsharded copy. Exit status 0 means that everything agrees.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..optimizers import AdamClara, AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed

_VARIANTS: tuple[type[AdamClara], ...] = (AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed)
_INPUTS, _HIDDEN, _OUTPUTS, _ROWS_PER_RANK = 24, 32, 5, 4
# Of float64: in float32 a gradient of rounding noise, which Adam turns into a whole step, would be another one.
_TOLERANCE = 1e-6


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(_INPUTS, _HIDDEN)
        self.down = nn.Linear(_HIDDEN, _INPUTS)
        self.norm = nn.LayerNorm(_INPUTS)
        self.head = nn.Linear(_INPUTS, _OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))
        return logits


def _fsdp2(model: _Model, mesh: DeviceMesh) -> None:
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fsdp2_and_tensor_parallel(model: _Model, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    _fsdp2(model, mesh["data"])


@dataclass(frozen=True)
class _Layout:
    name: str
    mesh: DeviceMesh
    shard: Callable[[_Model, DeviceMesh], None]
    data_rank: int
    data_ranks: int


def _layouts(device_type: str) -> list[_Layout]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layouts = [_Layout("FSDP2", init_device_mesh(device_type, (ranks,)), _fsdp2, rank, ranks)]
    if ranks >= 4 and ranks % 2 == 0:
        replicas = init_device_mesh(device_type, (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        layouts.append(_Layout("HSDP", replicas, _fsdp2, rank, ranks))
        both = init_device_mesh(device_type, (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        data_rank = both.get_local_rank("data")
        layouts.append(_Layout("FSDP2 + tensor parallel", both, _fsdp2_and_tensor_parallel, data_rank, ranks // 2))
    return layouts


@dataclass(frozen=True)
class _Finding:
    largest_difference: float  # of a parameter, in units of the largest change of any
    scale_difference: float  # relative
    ranks_agree: bool

    @property
    def passed(self) -> bool:
        return self.ranks_agree and self.largest_difference < _TOLERANCE and self.scale_difference < _TOLERANCE


def _compare(layout: _Layout, variant: type[AdamClara], device: torch.device, steps: int) -> _Finding:
    torch.manual_seed(0)
    alone = _Model().to(device, torch.float64)
    sharded = _Model().to(device, torch.float64)
    sharded.load_state_dict(alone.state_dict())
    initial = [param.detach().clone() for param in alone.parameters()]
    layout.shard(sharded, layout.mesh)
    optimizers = [variant(model.parameters(), lr=3e-3, smoothing=0.2) for model in (sharded, alone)]
    difference = scale_difference = 0.0
    ranks_agree = True
    generator = torch.Generator("cpu").manual_seed(1)
    for _ in range(steps):
        rows = _ROWS_PER_RANK * layout.data_ranks
        x = torch.randn(rows, _INPUTS, generator=generator, dtype=torch.float64, device="cpu").to(device)
        y = torch.sin(x[:, :_OUTPUTS])
        mine = slice(_ROWS_PER_RANK * layout.data_rank, _ROWS_PER_RANK * (layout.data_rank + 1))
        for model, optimizer, batch in zip((sharded, alone), optimizers, (mine, slice(None)), strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        changes = max((p - p0).abs().max().item() for p, p0 in zip(alone.parameters(), initial, strict=True))
        for param, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
            whole = param.full_tensor() if isinstance(param, DTensor) else param
            difference = max(difference, (whole - expected).abs().max().item() / changes)
        scales, expected_scales = (optimizer.lr_scales()[0] for optimizer in optimizers)
        scale_difference = max(scale_difference, (scales / expected_scales - 1.0).abs().max().item())
        extremes = torch.cat([scales, -scales])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        ranks_agree &= bool((extremes[: len(scales)] == -extremes[len(scales) :]).all())
    return _Finding(difference, scale_difference, ranks_agree)


def run_on_this_rank(steps: int) -> bool:
    """Run all comparisons in the world torchrun has made; rank 0 prints. Returns whether everything agreed."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        with warnings.catch_warnings():
            # PyTorch's warning that FSDP2 and tensor parallelism together return views does not concern this model.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return _run_all(device, steps)
    finally:
        dist.destroy_process_group()


def _run_all(device: torch.device, steps: int) -> bool:
    rank = dist.get_rank()
    passed = True
    if rank == 0:
        print(f"clara_fused self-test: {dist.get_world_size()} ranks on {device.type}, {steps} steps each")
    for layout in _layouts(device.type):
        for variant in _VARIANTS:
            started = time.perf_counter()
            finding = _compare(layout, variant, device, steps)
            passed &= finding.passed
            if rank == 0:
                print(
                    f"{'ok  ' if finding.passed else 'FAIL'} {layout.name:24} {variant.__name__:18} parameters within "
                    f"{finding.largest_difference:.1e}, scales within {finding.scale_difference:.1e}, ranks "
                    f"{'agree' if finding.ranks_agree else 'DISAGREE'}  ({time.perf_counter() - started:.1f} s)"
                )
    if rank == 0:
        print("all agree" if passed else "sharded and unsharded training differ: please report this output")
    return passed


def main() -> int:
    """Entry point of ``python -m clara_fused.distributed.selftest``; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start when torchrun has started none")
    parser.add_argument("--steps", type=int, default=10, help="training steps per comparison")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return 0 if run_on_this_rank(arguments.steps) else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    command += ["--module", "clara_fused.distributed.selftest", "--steps", str(arguments.steps)]
    # Ranks of one machine need no more than its loopback interface, and none of its GPUs.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
