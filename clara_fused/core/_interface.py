"""Which interface the compiled core and the package talk through. Read by setup.py as well, so it imports no torch."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

# Next to the package's code wherever that is run from: in the source tree of an editable install as in a wheel.
_DECLARATION = Path(__file__).with_name("_core.pyi")


def interface_stamp() -> str | None:
    """A hash of the interface's declaration: setup.py compiles it into the core, and loading the core compares it.

    Returns:
        16 hexadecimal digits; None where the package has been stripped of its declaration (a frozen application).
    """
    if not _DECLARATION.is_file():
        return None
    return sha256(_DECLARATION.read_bytes()).hexdigest()[:16]
