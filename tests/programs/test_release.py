"""What a release does to the sources before it builds them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_index_gets_links_that_lead_somewhere(tmp_path: Path) -> None:
    """It shows README without the files beside it."""
    for name in ("README.md", "pyproject.toml", ".ci/name_repository.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    arguments = [".ci/name_repository.py", "https://example.org/owner/name", "0123abc"]
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    links = re.findall(r"\]\(([^)]*)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    assert "https://example.org/owner/name/blob/0123abc/docs/algorithm.md" in links
    assert "https://example.org/owner/name/raw/0123abc/docs/images/demo.png" in links
    assert all(link.startswith("https://") for link in links)
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    urls = project[project.index("[project.urls]") : project.index("[project.optional-dependencies]")]
    assert 'Issues = "https://example.org/owner/name/issues"' in urls
