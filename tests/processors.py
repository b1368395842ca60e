"""Runs fast tests once more as on the nearest kind of processor that this one can stand for, other than itself.

    python tests/processors.py tests/optimizer tests/core

The compiled core and PyTorch choose their kernels by the processor; CLARA_CPU_ISA and ATEN_CPU_CAPABILITY narrow the
choice to what an older one would have made. Every test passes on every kind of processor, or it compares what it must
not, which the nearest kind shows. (A test of its own lets the loops of all kinds agree: tests/core/test_cpu.py.)
"""

from __future__ import annotations

import os
import subprocess
import sys

# What the core and what PyTorch call the same kind of processor; oldest first.
KINDS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512"}

KERNELS_IN_USE = """
import torch
from clara_fused.core import _core
print(_core.build_info()["cpu_instruction_set"], torch.backends.cpu.get_cpu_capability().lower())
"""


def kernels_in_use(**settings: str) -> tuple[str, str]:
    """Which the core and PyTorch take with these environment variables."""
    command = [sys.executable, "-c", KERNELS_IN_USE]
    answer = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True).stdout
    core, torch = answer.split()
    return core, torch


def main(paths: list[str]) -> None:
    own = kernels_in_use()
    print(f"this processor: {own[0]} kernels of the core, {own[1]} kernels of PyTorch", flush=True)
    # The core refuses a kind that this processor is not; PyTorch would crash.
    others = [kind for kind in KINDS.items() if kind != own and kernels_in_use(CLARA_CPU_ISA=kind[0])[0] == kind[0]]
    for core, torch in others[-1:]:
        settings = {"CLARA_CPU_ISA": core, "ATEN_CPU_CAPABILITY": torch}
        print(f"== as on a processor with {core} kernels: {settings}", flush=True)
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not slow", *paths]
        status = subprocess.run(pytest, env=os.environ | settings).returncode
        if status != 0:
            raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
