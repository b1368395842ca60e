#!/usr/bin/env python3
"""Ends device_pass.sh: records how its parts ended, and prints the tables of what they found.

    echo 'build|passed|14' | python benchmarks/device_report.py DIR

Reads a line per part (its name, how it ended, seconds) and what the benchmarks left in DIR. Writes
DIR/device-pass.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from harness import tables
from harness.environment import describe_environment

TABLES = (
    ("step_time-cuda.json", tables.step_time_tables),
    ("cpu_overhead-cuda.json", tables.overhead_table),
    ("ncu-*.json", tables.traffic_table),
    ("train_gpt-cuda.json", tables.loss_table),
)


def tables_of(folder: Path) -> Iterator[str]:
    """Of what is there: parts that did not run leave nothing."""
    for files, table in TABLES:
        for path in sorted(folder.glob(files)):
            yield table(tables.load(path))


def main() -> None:
    folder = Path(sys.argv[1])
    rows = [line.rstrip("\n").split("|") for line in sys.stdin]
    record = {
        **describe_environment(torch.device("cuda", torch.cuda.current_device())),
        "parts": [{"part": part, "result": result, "seconds": int(seconds)} for part, result, seconds in rows],
    }
    (folder / "device-pass.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    ends = tables.markdown_table(["part", "how it ended", "seconds"], rows)
    try:
        for text in tables_of(folder):
            print(tables.aligned(text))
    finally:  # also where a part has left half a file
        print(tables.aligned(f"{tables.provenance(record)}\n{ends}"))


if __name__ == "__main__":
    main()
