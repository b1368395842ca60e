"""Fixtures that every test may ask for, and how hypothesis runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import VARIANTS, why_not_core

sys.path.append(str(Path(__file__).resolve().parent.parent))  # study

# Derandomized everywhere: a failure seen once is seen by everybody. HYPOTHESIS_PROFILE=search looks for new examples.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,  # `fused` and `variant` only name a case
    ],
)
hypothesis.settings.register_profile(
    "search", hypothesis.settings.get_profile("repeatable"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # One thread each: OpenMP's threads wait by spinning, and several teams on the same cores run five times slower.
        os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
        torch.set_num_threads(1)


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["torch", "core"])
def fused(request: pytest.FixtureRequest) -> bool:
    """Both back ends. Where the compiled core is not built, its half is skipped with the reason it gives itself."""
    if request.param and (reason := why_not_core("cpu", torch.float32)):
        pytest.skip(f"the compiled core cannot serve: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _restore_torch_settings() -> Iterator[None]:
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None)
