"""Train a small character-level GPT with FSDP2 and AdamClara; save, and resume where it stopped.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 60
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 90       # goes on from step 60, on any number of ranks

Runs on GPUs (nccl) where every rank has one, else on the CPU (gloo). The text is Python's own documentation strings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clara_fused import AdamClaraSmoothed
from tiny_text import CONTEXT, TinyGPT, batch, encoded_text

BATCH_SIZE = 16  # over all ranks


def join_world() -> torch.device:
    """Take part in the world torchrun has made, on this rank's GPU if there is one for each."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cuda:nccl,cpu:gloo", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


class Checkpoint:
    """Model, optimizer and step for torch.distributed.checkpoint: sharded, and loadable on another number of ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder

    def _state(self, step: int) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}

    def save(self, step: int) -> None:
        dcp.save(self._state(step), storage_writer=dcp.FileSystemWriter(self.folder, overwrite=True))

    def load(self) -> int:
        """Returns the step to go on from; 0 without a checkpoint."""
        if not (self.folder / ".metadata").exists():
            return 0
        state = self._state(0)
        dcp.load(state, checkpoint_id=self.folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="train up to this step")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fsdp2"), help="folder to save to and resume from")
    parser.add_argument("--lr", type=float, default=3e-4)
    arguments = parser.parse_args()

    device = join_world()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = TinyGPT().to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After sharding: the optimizer is to see the sharded parameters. Nothing else is special.
    optimizer = AdamClaraSmoothed(model.parameters(), lr=arguments.lr, weight_decay=0.1, decoupled_weight_decay=True)

    checkpoint = Checkpoint(model, optimizer, arguments.checkpoint)
    first = checkpoint.load()
    if rank == 0:
        print(f"{ranks} ranks on {device.type}, from step {first} to {arguments.steps}")
    text = encoded_text()
    for step in range(first, arguments.steps):
        inputs, targets = (part.chunk(ranks)[rank].to(device) for part in batch(text, BATCH_SIZE, step))
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            dist.all_reduce(loss.detach())
            if rank == 0:
                scales = optimizer.lr_scales()[0]
                print(
                    f"step {step + 1:4}  loss {loss.item() / ranks:.3f}  learning-rate scale "
                    f"{scales.min().item():.2f} to {scales.max().item():.2f}"
                )
    if arguments.steps > first:
        checkpoint.save(arguments.steps)
        if rank == 0:
            print(f"saved to {arguments.checkpoint} (context of {CONTEXT} characters)")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
