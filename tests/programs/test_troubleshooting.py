"""docs/troubleshooting.md quotes messages that the package really has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


@cache
def literals() -> str:
    """All strings of the package, its core and setup.py, one a line; of f-strings the parts between the values."""
    found = re.findall(r'"(.+)"', (ROOT / "csrc" / "cuda" / "absent.cpp").read_text(encoding="utf-8"))
    for path in (ROOT / "setup.py", *(ROOT / "clara_fused").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


HEADINGS = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
MESSAGES = [message for heading in HEADINGS for message in re.findall(r"`([^`]+)`", heading)]


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 15


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_packages_own(message: str) -> None:
    assert message in literals()
