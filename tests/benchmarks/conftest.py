"""The benchmarks are scripts, not a package: their folder is put where they find each other, beside what other tests share."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(_TESTS.parent / "benchmarks"), str(_TESTS / "flexllmgen"), str(_TESTS / "profiling")]
