"""What a check says. Knows no check."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How much it matters: nothing; good to know; a run will fail, or be slow or lost, for this."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's.

    Args:
        check: what was looked at, in a word or two.
        found: what there is.
        way_out: what to do about it; empty where there is nothing to do.
    """

    check: str
    level: Level
    found: str
    way_out: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready view."""
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, found=found)


def note(check: str, found: str, way_out: str = "") -> Finding:
    """Good to know."""
    return Finding(check=check, level=Level.NOTE, found=found, way_out=way_out)


def problem(check: str, found: str, way_out: str) -> Finding:
    """To be mended."""
    return Finding(check=check, level=Level.PROBLEM, found=found, way_out=way_out)
