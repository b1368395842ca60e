"""Everything a run needs to go on bit for bit: model, optimizer, random generators, curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import atomic_write
from .history import History


class CheckpointError(Exception):
    """A checkpoint that is missing, unreadable, or of another run."""


def save_checkpoint(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_generator: torch.Generator,
    history: History,
) -> None:
    """``settings`` says which run this is; ``load_checkpoint`` compares it. ``history`` tells the step."""
    checkpoint = {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history.state_dict(),
        "batch_generator": batch_generator.get_state(),
        "torch_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with atomic_write(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_generator: torch.Generator,
) -> History:
    """Restores all in place and returns the curves so far.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one made with other settings.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["settings"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise CheckpointError(f"{path} is not a checkpoint of this program: {error}") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            raise CheckpointError(f"{path} was made with {name} = {saved.get(name)!r}, this run has {value!r}")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    batch_generator.set_state(checkpoint["batch_generator"])
    torch.set_rng_state(checkpoint["torch_generator"])
    if torch.cuda.is_available() and checkpoint["cuda_generators"]:
        torch.cuda.set_rng_state_all(checkpoint["cuda_generators"])
    return History.from_state_dict(checkpoint["history"])
