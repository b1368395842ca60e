"""Tells a package index where the repository is, before sdist and wheels are built: README's links, and [project.urls].

    python .ci/name_repository.py https://github.com/OWNER/NAME COMMIT

The index shows README.md without the files that it links to. In the repository the links are relative, so that they
lead to the files beside them in every clone and fork.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(repository: str, commit: str) -> None:
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    text = readme.read_text(encoding="utf-8")
    # A link to a file, and with ! before it the file itself.
    text = re.sub(
        r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)",
        lambda link: f"{link[1]}[{link[2]}]({repository}/{'raw' if link[1] else 'blob'}/{commit}/{link[3]})",
        text,
    )
    readme.write_text(text, encoding="utf-8")
    urls = f'[project.urls]\nRepository = "{repository}"\nIssues = "{repository}/issues"\n'
    urls += f'Changelog = "{repository}/blob/{commit}/CHANGELOG.md"\n\n'
    text = project.read_text(encoding="utf-8")
    before = "[project.optional-dependencies]\n"
    project.write_text(text.replace(before, urls + before, 1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
