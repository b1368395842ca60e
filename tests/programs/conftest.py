"""The programs of the repository can be imported; what is installed goes first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # study
