"""Fused Adam optimizers that set their own learning rate (CLARA), for PyTorch."""

from ._version import __version__
from .optimizers import AdamClara, AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed

__all__ = ["AdamClara", "AdamClaraGlobal", "AdamClaraLocal", "AdamClaraSmoothed", "__version__"]
