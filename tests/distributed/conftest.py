"""Worlds of ranks, shared by all tests of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from ranks import World


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, World]]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    all_worlds = {size: World(size) for size in (1, 2, 4)}
    yield all_worlds
    for world in all_worlds.values():
        world.stop()


@pytest.fixture
def world1(worlds: dict[int, World]) -> World:
    return worlds[1]


@pytest.fixture
def world2(worlds: dict[int, World]) -> World:
    return worlds[2]


@pytest.fixture
def world4(worlds: dict[int, World]) -> World:
    return worlds[4]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes many seconds; left out by `pytest -m 'not slow'`")
