#!/usr/bin/env python3
"""Compare the ratios of two runs of the benchmarks, for example of two versions, or of one to see what repeats.

    python benchmarks/compare_runs.py bench benchmarks/results
    python benchmarks/compare_runs.py bench other-bench --within 0.05

Status 1 if a ratio of the second run differs from the first's by more than `--within`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.plots import load
from harness.report import console, table

# What tells the rows of a benchmark apart.
KEYS = ("model", "dtype", "tensors", "size", "optimizer")


def ratios_of(document: dict[str, Any]) -> dict[tuple[str, ...], float]:
    return {
        (document["benchmark"], *(str(row[key]) for key in KEYS if key in row)): row["ratio"]["median"]
        for row in document["results"]
    }


def compare(first: Path, second: Path) -> dict[tuple[str, ...], tuple[float, float]]:
    """Ratios of both runs for everything that both measured."""
    found: dict[tuple[str, ...], tuple[float, float]] = {}
    for path in sorted(first.glob("*-c*.json")):
        other = second / path.name
        if other.exists():
            before, after = ratios_of(load(path)), ratios_of(load(other))
            found |= {key: (before[key], after[key]) for key in before if key in after}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="folder of a run")
    parser.add_argument("second", type=Path, help="folder of another")
    parser.add_argument("--within", type=float, default=0.10, help="largest relative difference; default: %(default)s")
    args = parser.parse_args(arguments)
    pairs = compare(args.first, args.second)
    if not pairs:
        parser.error("the two folders share no result")
    apart = {key: pair for key, pair in pairs.items() if abs(pair[1] / pair[0] - 1) > args.within}
    made = table(f"ratios more than {args.within:.0%} apart", "what", "first", "second", "change")
    for key, (before, after) in apart.items():
        made.add_row(" ".join(key), f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    if apart:
        console.print(made)
    console.print(f"{len(pairs) - len(apart)} of {len(pairs)} ratios are within {args.within:.0%}")
    return 1 if apart else 0


if __name__ == "__main__":
    raise SystemExit(main())
