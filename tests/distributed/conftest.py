"""Worlds of ranks, shared by all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import World

HERE = Path(__file__).parent
WORLDS = {size: World(size) for size in (1, 2, 4)}


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the ranks with the last test of the folder: such as wait still take several percent of a core each."""
    if nextitem is None or HERE not in nextitem.path.parents:
        for world in WORLDS.values():
            world.stop()


@pytest.fixture
def worlds() -> dict[int, World]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    return WORLDS


@pytest.fixture
def world1(worlds: dict[int, World]) -> World:
    return worlds[1]


@pytest.fixture
def world2(worlds: dict[int, World]) -> World:
    return worlds[2]


@pytest.fixture
def world4(worlds: dict[int, World]) -> World:
    return worlds[4]
