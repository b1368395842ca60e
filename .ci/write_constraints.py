"""Writes the versions that an environment holds as constraints for pip, to standard output.

    .venv-newest/bin/python .ci/write_constraints.py > constraints.txt       after `make test CONSTRAINTS=`

A package that no longer supports the oldest Python of pyproject.toml is left to pip there.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet

OLDEST_PYTHON = "3.10"
HEADER = """\
# Versions that were tested together: every make target and the pipelines install these.
#   make test CONSTRAINTS=             tries the newest of everything, in an environment of its own
# Written by .ci/write_constraints.py.
"""
NOT_PINNED = ("clara-fused", "pip")


def main() -> None:
    lines = []
    for found in distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        version = found.version.partition("+")[0]  # the same release for the CPU and for CUDA
        pythons = SpecifierSet(found.metadata.get("Requires-Python") or "")
        marker = "" if pythons.contains(f"{OLDEST_PYTHON}.99") else f'; python_version > "{OLDEST_PYTHON}"'
        # What torch's builds for CUDA bring is theirs to choose.
        if name not in NOT_PINNED and not name.startswith(("nvidia-", "cuda-", "triton")):
            lines.append(f"{name}=={version}{marker}")
    print(HEADER + "\n".join(sorted(set(lines))))


if __name__ == "__main__":
    main()
