"""The benchmarks are scripts, not a package: their folder is put where they find each other."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
