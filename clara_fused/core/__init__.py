"""The compiled core: loading it, and handing it what a step works on."""

from .loading import core_status, describe_installation

__all__ = ["core_status", "describe_installation"]
