"""Tests that need a CUDA device; skipped, with the reason, where there is none or the core cannot use it.

CLARA_REQUIRE_GPU=1: an error in place of the skip, on a machine that is there to run them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import why_not_core


def why_no_gpu() -> str:
    """Empty if the compiled core serves a CUDA device here, else the reason."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable CUDA device"
    return why_not_core("cuda", torch.float32)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    reason = why_no_gpu()
    if reason and os.environ.get("CLARA_REQUIRE_GPU"):
        pytest.exit(reason, returncode=1)
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
