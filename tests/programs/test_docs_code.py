"""The code on the pages of docs/ that show how to use the package runs as it stands there.

Blocks of Python on a page belong together and run in order, in one program. A block with a title is a program of its
own for several ranks, and runs under torchrun on two.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
# What a page needs beside the package.
PAGES = {
    "tutorial.md": None,
    "frameworks/plain.md": None,
    "frameworks/lightning.md": "lightning",
    "frameworks/transformers.md": "transformers",
    "frameworks/accelerate.md": "accelerate",
    "frameworks/deepspeed.md": "deepspeed",
}
BLOCK = re.compile(r'^```python(?: title="(?P<title>[\w.]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def blocks(page: str) -> tuple[str, dict[str, str]]:
    """The page's own program, and those with a title."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.count("```python") == len(BLOCK.findall(text)), f"{page}: a block that this test does not understand"
    found = list(BLOCK.finditer(text))
    program = "\n".join(block["code"] for block in found if not block["title"])
    return program, {block["title"]: block["code"] for block in found if block["title"]}


def needs(page: str) -> None:
    module = PAGES[page]
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")


def run(command: list[str], folder: Path) -> str:
    """What a program prints; one thread, as the models are tiny, and no GPU, so that it runs alike everywhere."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_no_page_with_code_is_left_out() -> None:
    pages = [DOCS / "tutorial.md", *(DOCS / "frameworks").glob("*.md")]
    with_code = {str(page.relative_to(DOCS)) for page in pages if "```python" in page.read_text(encoding="utf-8")}
    assert with_code == set(PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)[0]])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    needs(page)
    (tmp_path / "page.py").write_text(blocks(page)[0], encoding="utf-8")
    printed = run(["page.py"], tmp_path)
    if page == "tutorial.md":
        losses = [float(line.rpartition(": ")[2]) for line in printed.splitlines() if re.search(r": \d\.\d{3}$", line)]
        assert losses[-1] < losses[1] < losses[0], printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)[1]])
def test_programs_for_several_ranks_run(page: str, tmp_path: Path) -> None:
    needs(page)
    for name, code in blocks(page)[1].items():
        (tmp_path / name).write_text(code, encoding="utf-8")
        printed = run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name], tmp_path)
        assert "loss" in printed
