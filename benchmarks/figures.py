#!/usr/bin/env python3
"""Bring the tables and plots of README.md and docs/ up to date with the recorded benchmark results.

    python benchmarks/figures.py          rewrite what differs
    python benchmarks/figures.py --check  exit with status 1 if anything differs

What stands between `<!-- figure: NAME -->` and `<!-- end of figure -->` is generated from benchmarks/results/*.json; no
number there is typed by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from harness import plots, tables
from harness.environment import REPOSITORY, short_name
from harness.report import DEFAULT_RESULTS
from harness.tables import Document, load

IMAGES = "docs/images"
MARKED = re.compile(r"(<!-- figure: (\S+) -->\n)(.*?)(<!-- end of figure -->)", re.DOTALL)

PLOTS: dict[str, tuple[str, str, Callable[[Document], Figure]]] = {
    "step-time-float32": ("step_time", "Time per optimizer step, float32", lambda d: plots.bars(d, "float32")),
    "cpu-overhead": ("cpu_overhead", "Host time per step over the number of tensors", plots.cpu_overhead),
}
TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "table-headline": ("step_time", tables.headline_table),
    "table-step-time": ("step_time", tables.step_time_tables),
    "table-ratios": ("step_time", tables.ratio_table),
    "table-host-cost": ("cpu_overhead", tables.host_cost_table),
    "table-training": ("train_gpt", tables.loss_table),
    "table-state": ("state_bytes", tables.state_table),
}
DEVICES = ("cpu", "avx512", "cuda")  # avx512: results of a CPU with AVX-512, renamed by hand
# Of no device, and from no result.
CONSTANTS: dict[str, Callable[[], str]] = {"table-bytes": tables.bytes_table}
NAMES = [*CONSTANTS, *(f"{name}-{device}" for device in DEVICES for name in (*PLOTS, *TABLES))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Figures:
    """Generates figures by name from the results in a folder."""

    def __init__(self, results: Path, repository: Path) -> None:
        self.results, self.repository = results, repository

    def source(self, benchmark: str, device: str) -> Path:
        return self.results / f"{benchmark}-{device}.json"

    def generate(self, name: str, folder: Path) -> str:
        """Markdown for a figure in a file of `folder`.

        Raises:
            KeyError: no figure has that name.
        """
        if name in CONSTANTS:
            return CONSTANTS[name]()
        kind, _, device = name.rpartition("-")
        if device not in DEVICES or kind not in (*PLOTS, *TABLES):
            raise KeyError(f"no figure {name!r}; there are {', '.join(NAMES)}")
        source = self.source((PLOTS.get(kind) or TABLES[kind])[0], device)
        if not source.exists():
            return f"*Not yet measured on {'a GPU' if device == 'cuda' else 'a CPU'}.*\n"
        if kind in TABLES:
            return TABLES[kind][1](load(source))
        up = "../" * len(folder.relative_to(self.repository).parts)
        link = (up + f"{IMAGES}/{name}.png").replace("../docs/", "", 1)
        return f"![{PLOTS[kind][1]}, {short_name(load(source)['machine'])}]({link})\n"

    def is_drawn(self, name: str) -> bool:
        """Whether the picture of a plot was drawn from the results as they are."""
        kind, _, device = name.rpartition("-")
        if kind not in PLOTS or not self.source(PLOTS[kind][0], device).exists():
            return True
        picture = self.repository / IMAGES / f"{name}.png"
        if not picture.exists():
            return False
        with Image.open(picture) as image:
            return image.info.get(plots.SOURCE_DIGEST) == digest(self.source(PLOTS[kind][0], device))

    def draw(self, name: str) -> None:
        kind, _, device = name.rpartition("-")
        source = self.source(PLOTS[kind][0], device)
        picture = self.repository / IMAGES / f"{name}.png"
        plots.save(PLOTS[kind][2](load(source)), picture, source_digest=digest(source))

    def update(self, check: bool = False) -> list[str]:
        """Rewrite texts and pictures that differ, or with `check` only tell; returns their paths."""
        changed: list[str] = []
        for path in sorted([*self.repository.glob("*.md"), *(self.repository / "docs").glob("**/*.md")]):
            before = path.read_text(encoding="utf-8")
            text = MARKED.sub(lambda match: match[1] + self.generate(match[2], path.parent) + match[4], before)  # noqa: B023
            if text != before:
                changed.append(str(path.relative_to(self.repository)))
                if not check:
                    path.write_text(text, encoding="utf-8")
            for name in (match[2] for match in MARKED.finditer(before)):
                if not self.is_drawn(name):
                    changed.append(f"{IMAGES}/{name}.png")
                    if not check:
                        self.draw(name)
        return list(dict.fromkeys(changed))


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    args = parser.parse_args(arguments)
    changed = Figures(DEFAULT_RESULTS, REPOSITORY).update(check=args.check)
    for path in changed:
        print(f"{'out of date' if args.check else 'renewed'}: {path}")
    if not changed:
        print("all figures are up to date")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
