#!/usr/bin/env python3
"""The short tables that end device_pass.sh: how its parts ended, and what the benchmarks among them found.

python benchmarks/device_report.py DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A benchmark's results, or nothing where it did not run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def steps(document: dict[str, Any], title: str) -> Iterator[str]:
    for loops in document.get("bandwidths", [])[:1]:
        yield f"\ncopy bandwidth {loops['copy']['median'] / 1e9:.0f} GB/s"
    rows = document.get("results", [])
    if rows:
        head = ("dtype", "optimizer", "ms", "of Adam fused", "B/element", "of loop")
        yield "\n{:17} {:9} {:13} {:>9} {:>13} {:>9} {:>8}".format(title, *head)
    for row in rows:
        share = (row.get("bandwidth_share") or {}).get("median")
        yield (
            f"{row['model']:17} {row['dtype']:9} {row['optimizer']:13} {row['seconds']['median'] * 1e3:9.4f} "
            f"{row['ratio']['median']:13.3f} {row['bytes_per_element']:9.2f} "
            f"{'' if share is None else f'{share:.1%}':>8}"
        )


def host_times(document: dict[str, Any]) -> Iterator[str]:
    rows = document.get("results", [])
    if rows:
        head = ("optimizer", "us a step", "us a tensor", "of Adam fused")
        yield "\n{:7} {:9} {:13} {:>10} {:>11} {:>13}".format("tensors", "gradients", *head)
    for row in rows:
        seconds = row["seconds"]["median"] * 1e6
        yield (
            f"{row['tensors']:7} {row['gradients']:9} {row['optimizer']:13} {seconds:10.1f} "
            f"{seconds / row['stepped']:11.2f} {row['ratio']['median']:13.3f}"
        )


def traffic(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("ncu-*.json")):
        document = read(path)
        elements, must_move = document["elements"], document["bytes_per_element_that_must_move"]
        what = ", ".join(document[key] for key in ("model", "optimizer", "dtype"))
        yield f"\n{what}: {must_move:.2f} B/element must move"
        for kernel in document["kernels"]:
            moved = kernel["read_bytes"] + kernel["written_bytes"]
            yield (
                f"  {kernel['name'].partition('(')[0][-48:]:48} read {kernel['read_bytes'] / elements:6.2f} written "
                f"{kernel['written_bytes'] / elements:6.2f} B/element {moved / kernel['seconds'] / 1e9:6.0f} GB/s "
                f"{kernel['registers']:3} registers"
            )


def losses(document: dict[str, Any]) -> Iterator[str]:
    runs = document.get("runs", [])
    if runs:
        yield f"\nvalidation loss after {document['steps']} steps, {document['parameters'] / 1e6:.0f} M parameters"
        yield f"{'':22}" + "".join(f"{rate:>10.0e}" for rate in sorted({run["rate"] for run in runs}))
    for label in dict.fromkeys(run["label"] for run in runs):
        own = {run["rate"]: run["validation_loss"] for run in runs if run["label"] == label}
        cells = ("diverged" if own[rate] is None else f"{own[rate]:.4f}" for rate in sorted(own))
        yield f"{label:22}" + "".join(f"{cell:>10}" for cell in cells)


def report(folder: Path) -> Iterator[str]:
    yield from steps(read(folder / "step_time-cuda.json"), "model")
    yield from steps(read(folder / "step_time_graph-cuda.json"), "in a CUDA graph")
    yield from host_times(read(folder / "cpu_overhead-cuda.json"))
    yield from traffic(folder)
    yield from losses(read(folder / "train_gpt-cuda.json"))
    whole = read(folder / "device-pass.json")
    gpu = whole["machine"]["gpu"]
    yield f"\n{gpu['name']}, driver {gpu['driver']}, torch {whole['versions']['torch']}, commit {whole['commit']}"
    for row in whole["parts"]:
        yield f"{row['part']:12} {row['result']:24} {row['seconds']:4} s"


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1]))))
