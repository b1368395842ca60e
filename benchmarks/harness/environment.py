"""What a result depends on beside the program: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PEER_PACKAGES = ("apex", "transformer-engine", "bitsandbytes")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit as JSON; names no host and no user."""
    return {"machine": describe_machine(device), "versions": versions(), "commit": commit()}


def describe_machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": driver_version(),
        }
    return machine


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None where nvidia-smi does not tell."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def short_name(machine: dict[str, Any]) -> str:
    """One line for captions."""
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['threads']} threads"


def cpu_name() -> str:
    """Model name, from the kernel where it tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class OtherWork:
    """What other processes, and other users of the machine's cores, take of these from its creation on."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self._seconds = self._seconds_so_far()

    def share(self) -> float | None:
        """Of all cores' time since; None where the kernel does not tell."""
        seconds = self._seconds_so_far()
        if seconds is None or self._seconds is None:
            return None
        available = (perf_counter() - self._started) * (os.cpu_count() or 1)
        return max(0.0, (seconds - self._seconds) / available)

    @staticmethod
    def _seconds_so_far() -> float | None:
        """Core seconds of everybody but this process and its finished children, since the system started."""
        try:
            line = Path("/proc/stat").read_text().partition("\n")[0]
        except OSError:
            return None
        user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, line.split()[1:9])
        ticks = user + nice + system + irq + softirq + stolen
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - (own.user + own.system + own.children_user + own.children_system)


def total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total_memory() // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in ("clara-fused", *PEER_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """CLARA_COMMIT, or the checked-out commit, `-dirty` if tracked files were changed; None outside a git checkout."""
    if told := os.environ.get("CLARA_COMMIT"):  # a copy of a checkout may be a checkout of something else
        return told[:12]
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()
