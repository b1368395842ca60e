"""What sharding costs an optimizer step: collectives, bytes, and time, under FSDP2 on the CPU (gloo).

    torchrun --nproc-per-node 4 benchmarks/sharded_sums.py --tensors 148

Compares each optimizer's step with the same step of the same shards without the sum over ranks (the shards taken for
whole tensors), alternately, and prints medians over the steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from clara_fused import AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed


class CountingAllReduce:
    """Counts calls and bytes of torch.distributed.all_reduce while active."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    def __enter__(self) -> CountingAllReduce:
        self._original = dist.all_reduce
        dist.all_reduce = self._counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original

    def _counting(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self._original(tensor, *args, **kwargs)


def milliseconds(call: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=148, help="number of parameters (GPT-2 small has 148)")
    parser.add_argument("--elements", type=int, default=4096, help="elements per parameter and rank")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    shapes = [(ranks * arguments.elements,)] * arguments.tensors
    for variant in (AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed):
        sharded = [nn.Parameter(distribute_tensor(torch.zeros(s), mesh, [Shard(0)])) for s in shapes]
        for param in sharded:
            param.grad = distribute_tensor(torch.randn(param.shape), mesh, [Shard(0)])
        plain = [nn.Parameter(param.to_local().detach().clone()) for param in sharded]
        for param, other in zip(plain, sharded, strict=True):
            param.grad = other.grad.to_local().clone()
        optimizer, without = variant(sharded), variant(plain)
        for _ in range(5):
            optimizer.step()
            without.step()
        with CountingAllReduce() as counted:
            optimizer.step()
        pairs = [(milliseconds(optimizer.step), milliseconds(without.step)) for _ in range(arguments.steps)]
        with_sums, without_sums = (statistics.median(column) for column in zip(*pairs, strict=True))
        if dist.get_rank() == 0:
            print(
                f"{ranks} ranks, {arguments.tensors} tensors, {variant.__name__:18} {counted.calls} collective, "
                f"{counted.bytes} bytes; step {with_sums:.2f} ms, without the sum {without_sums:.2f} ms"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
