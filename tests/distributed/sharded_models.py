"""A small model in every way to shard it, and the single-process run to compare with.

Sizes are chosen to hurt: nothing divides evenly among 4 ranks, and some shards are empty.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import clara_fused

VARIANTS: dict[str, type[clara_fused.AdamClara]] = {
    "Global": clara_fused.AdamClaraGlobal,
    "Local": clara_fused.AdamClaraLocal,
    "Smoothed": clara_fused.AdamClaraSmoothed,
}
INPUTS, HIDDEN, OUTPUTS, BATCH = 6, 10, 3, 16
# Scales move a lot within a few steps.
LIVELY: dict[str, Any] = {
    "lr": 0.02,
    "smoothing": 0.3,
    "damping": 0.7,
    "clip": (0.5, 1.6),
    "weight_decay": 0.1,
    "initial_scale": 1.0,
}
# Also those of tensors with a handful of elements, which say too little for the walk's rule to follow at once.
MOVING: dict[str, Any] = {**LIVELY, "reference": 0.5}


class Model(nn.Module):
    """Two matrices that tensor parallelism splits, and parameters that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INPUTS, HIDDEN)
        self.down = nn.Linear(HIDDEN, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, OUTPUTS)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(self.norm(self.down(torch.tanh(self.up(x)))))


def make_model(dtype: torch.dtype = torch.float64, seed: int = 3) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype)


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=dtype)
    return x, torch.sin(x[:, :OUTPUTS]) + 0.3 * torch.randn(BATCH, OUTPUTS, generator=generator, dtype=dtype)


MakeOptimizer = Callable[..., torch.optim.Optimizer]


@dataclass
class Sharded:
    """A model spread over ranks, its optimizer, and which slice of a batch this rank works on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data_rank: int
    data_ranks: int

    def step(self, step: int, dtype: torch.dtype = torch.float64) -> None:
        self.backward(step, dtype)
        self.optimizer.step()

    def backward(
        self, step: int, dtype: torch.dtype = torch.float64, scaled: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> None:
        x, y = (part.chunk(self.data_ranks)[self.data_rank] for part in data(step, dtype))
        self.optimizer.zero_grad()
        scaled(nn.functional.mse_loss(self.model(x), y)).backward()


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp2(model: Model, make: MakeOptimizer) -> Sharded:
    _shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Sharded(model, make(model.parameters()), dist.get_rank(), dist.get_world_size())


def fsdp2_flattened(model: Model, make: MakeOptimizer) -> Sharded:
    """Over all ranks of a mesh of two dimensions, made one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "ranks"))
    _shard(model, mesh["nodes", "ranks"]._flatten("all"))
    return Sharded(model, make(model.parameters()), dist.get_rank(), 4)


def fsdp2_columns(model: Model, make: MakeOptimizer) -> Sharded:
    """Matrices cut between columns, whose shards are not contiguous; the mesh is FSDP's default, made for each call."""

    def columns(param: nn.Parameter) -> Shard:
        return Shard(1 if param.ndim == 2 and param.shape[1] % dist.get_world_size() == 0 else 0)

    for module in (model.up, model.down, model):
        fully_shard(module, shard_placement_fn=columns)
    return Sharded(model, make(model.parameters()), dist.get_rank(), dist.get_world_size())


def fsdp1_in_halves(model: Model, make: MakeOptimizer) -> Sharded:
    """Each half of the ranks shards and trains a copy, apart from the other half."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = halves[dist.get_rank() // 2]
    wrapped = FullyShardedDataParallel(model, process_group=half, use_orig_params=True, device_id=torch.device("cpu"))
    return Sharded(wrapped, make(wrapped.parameters(), process_group=half), dist.get_rank() % 2, 2)


def hsdp(model: Model, make: MakeOptimizer) -> Sharded:
    _shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return Sharded(model, make(model.parameters()), dist.get_rank(), 4)


def tensor_parallel(model: Model, make: MakeOptimizer) -> Sharded:
    """DTensors and plain parameters in one optimizer; all ranks see the same data."""
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Sharded(model, make(model.parameters()), 0, 1)


def fsdp2_tensor_parallel(model: Model, make: MakeOptimizer) -> Sharded:
    """DTensors on the 2-D mesh, strided shards among them, and on its data-parallel dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(model, mesh["tp"])
    _shard(model, mesh["dp"])
    return Sharded(model, make(model.parameters()), mesh.get_local_rank("dp"), 2)


def fsdp1(model: Model, make: MakeOptimizer) -> Sharded:
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, **_: recurse or isinstance(module, nn.Linear),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
    )
    optimizer = make(wrapped.parameters(), process_group=dist.group.WORLD)
    return Sharded(wrapped, optimizer, dist.get_rank(), dist.get_world_size())


def fsdp1_ignoring(model: Model, make: MakeOptimizer) -> Sharded:
    """A part of the model stays whole on every rank; FSDP1 does not reduce its gradients, so all see the same data."""
    wrapped = FullyShardedDataParallel(
        model, ignored_modules=[model.down], use_orig_params=True, device_id=torch.device("cpu")
    )
    return Sharded(wrapped, make(wrapped.parameters(), process_group=dist.group.WORLD), 0, 1)


def zero1(model: Model, make: MakeOptimizer) -> Sharded:
    """Whole parameters, each on one rank: only AdamClaraGlobal has something to sum."""
    if make.func is clara_fused.AdamClaraGlobal:  # type: ignore[attr-defined]
        make = functools.partial(make, process_group=dist.group.WORLD)
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=make)
    return Sharded(wrapped, optimizer, dist.get_rank(), dist.get_world_size())


def ddp(model: Model, make: MakeOptimizer) -> Sharded:
    wrapped = DistributedDataParallel(model)
    return Sharded(wrapped, make(wrapped.parameters()), dist.get_rank(), dist.get_world_size())


LAYOUTS: dict[str, tuple[int, Callable[[Model, MakeOptimizer], Sharded]]] = {
    "fsdp2-2": (2, fsdp2),
    "fsdp2-4": (4, fsdp2),
    "hsdp-2x2": (4, hsdp),
    "tp-2": (2, tensor_parallel),
    "fsdp2-tp-2x2": (4, fsdp2_tensor_parallel),
    "fsdp1-4": (4, fsdp1),
    "zero1-2": (2, zero1),
    "ddp-2": (2, ddp),
}


# Further ways, tried with fewer variants.
MORE_LAYOUTS: dict[str, tuple[int, Callable[[Model, MakeOptimizer], Sharded]]] = {
    "fsdp2-flattened-2x2": (4, fsdp2_flattened),
    "fsdp2-columns-2": (2, fsdp2_columns),
    "fsdp1-in-halves": (4, fsdp1_in_halves),
    "fsdp1-ignoring": (2, fsdp1_ignoring),
}


def full_parameters(sharded: Sharded) -> dict[str, Tensor]:
    """Whole parameters by plain name, on every rank (a collective)."""
    model = sharded.model
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_plain(n): p.detach().clone() for n, p in model.named_parameters()}
    return {
        _plain(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def scales_by_name(sharded: Sharded) -> dict[str, float]:
    """mu of the parameters that this rank's optimizer has, by plain name."""
    optimizer = sharded.optimizer
    optimizer = getattr(optimizer, "optim", optimizer)
    names = {id(p): _plain(n) for n, p in sharded.model.named_parameters()}
    assert isinstance(optimizer, clara_fused.AdamClara)
    return {
        names[id(p)]: scale
        for group, scales in zip(optimizer.param_groups, optimizer.lr_scales(), strict=True)
        for p, scale in zip(group["params"], scales.tolist(), strict=True)
    }


def on_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
