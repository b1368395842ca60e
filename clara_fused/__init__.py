"""Fused Adam optimizers that set their own learning rate (CLARA), for PyTorch."""

from ._version import __version__
from .adaptation import random_walk_limit, random_walk_reference
from .initial_scale import cautious_initial_scale
from .optimizers import AdamClara, AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed

__all__ = [
    "AdamClara",
    "AdamClaraGlobal",
    "AdamClaraLocal",
    "AdamClaraSmoothed",
    "__version__",
    "cautious_initial_scale",
    "random_walk_limit",
    "random_walk_reference",
]
