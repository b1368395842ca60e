"""Processes that stay up for many tests: each runs, as one rank of a gloo world on loopback, what the test sends it.

Starting a process costs seconds (it imports torch), a call milliseconds. A call that fails or takes too long ends the
whole world; the next test starts a fresh one. A world also ends by itself when the process that started it is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# In seconds, for ranks that hang: no machine should be so busy that it gets there, and pytest's own limit is 300.
COLLECTIVE_TIMEOUT = 200.0  # until a rank that waits for the others gives up
CALL_TIMEOUT = 240.0
START_TIMEOUT = 240.0
GRACE_AFTER_FAILURE = 3.0  # seconds the other ranks get to report after one has failed


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message has what every rank reported."""


class World:
    """`size` processes that form one torch.distributed world."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """Call a module-level function on every rank at once; return what it returned, by rank.

        Raises:
            RankError: a rank raised, died, or took longer than `timeout` seconds.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function.__module__, function.__qualname__, args))
        replies = self._replies(timeout)
        if all(reply is not None and reply[0] for reply in replies):
            return [reply[1] for reply in replies if reply is not None]
        self.stop(at_once=True)
        words = [f"rank {r}: " + ("no answer" if reply is None else str(reply[1])) for r, reply in enumerate(replies)]
        raise RankError("\n".join(words))

    def _replies(self, timeout: float) -> list[tuple[bool, Any] | None]:
        replies: list[tuple[bool, Any] | None] = [None] * self.size
        deadline = time.monotonic() + timeout
        waiting = set(range(self.size))
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if not self._connections[rank].poll(0.002):
                    continue
                waiting.discard(rank)
                try:
                    replies[rank] = self._connections[rank].recv()
                except EOFError:
                    replies[rank] = (False, "the process died")
                if not replies[rank][0]:  # type: ignore[index]
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        return replies

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="clara_world_")
        for rank in range(self.size):
            mine, theirs = socket.socketpair()
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno()), str(rank), str(self.size), self._directory.name],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "GLOO_SOCKET_IFNAME": _loopback(), "OMP_NUM_THREADS": "1"},
                )
            )
            theirs.close()
            self._connections.append(Connection(mine.detach()))
        if any(reply is None or not reply[0] for reply in self._replies(START_TIMEOUT)):
            self.stop(at_once=True)
            raise RankError(f"a world of {self.size} ranks did not start within {START_TIMEOUT} s")

    def stop(self, at_once: bool = False) -> None:
        """End all processes and wait until they are gone."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if at_once:
                process.kill()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes, self._connections = [], []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def serve(connection: Connection, rank: int, size: int, directory: str) -> None:
    """Join the world and call what is asked for until the connection closes."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    connection.send((True, None))
    while True:
        try:
            module, name, args = connection.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            result = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception:
            result = (False, traceback.format_exc())
        connection.send(result)
    # Ranks leave one by one; what is left of the groups must not wait for the others.
    signal.alarm(15)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    descriptor, own_rank, world_size, folder = sys.argv[1:]
    serve(Connection(int(descriptor)), int(own_rank), int(world_size), folder)
