"""The grid while it runs: a table that is redrawn in a terminal, plain lines anywhere else.

Redrawn twice a second at most: the drawing must not take the processor from what is measured. Prints through
report.py's console alone.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from flexllmgen.units import gib
from harness.benchmark.record import Benchmark, Cell, CellStatus
from harness.report import Report
from harness.results import RunResult

_REDRAWN_PER_S = 2
_TIERS = {"gpu": "GPU", "cpu": "host", "disk": "disk"}
# Lines of a terminal that are not the table's rows.
_MARGIN = 5


class LiveGrid:
    """Shows how each cell stands; a context manager around the launches."""

    def __init__(self, report: Report, benchmark: Benchmark) -> None:
        self.report = report
        self.launches = benchmark.launches
        self.order = [cell.name for cell in benchmark.cells]
        self.states: dict[str, str] = {}
        self.speeds: dict[str, float] = {}
        self.memory: dict[str, dict[str, float]] = {}
        self.running: str | None = None
        self._told: set[str] = set()
        self._pass: tuple[str, int] = ("", 0)
        self._live: Live | None = None
        for cell in benchmark.cells:
            self._settle(cell)

    def __enter__(self) -> Self:
        # With -v the workers' logs have the terminal.
        if self.report.err.is_terminal and not self.report.quiet and not self.report.verbose:
            self._live = Live(
                console=self.report.err,
                refresh_per_second=_REDRAWN_PER_S,
                transient=True,
                get_renderable=self._table,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, cell: str, launch: int) -> None:
        """A process of a cell starts."""
        self.running = cell
        self.states[cell] = "starting"
        if self._live is None:
            number = self.order.index(cell) + 1
            which = f", launch {launch + 1} of {self.launches}" if self.launches > 1 else ""
            self.report.say(f"cell {number} of {len(self.order)}: {cell}{which} ...")

    def event(self, cell: str, event: Mapping[str, Any]) -> None:
        """The cell's process says something."""
        match event["event"]:
            case "phase":
                self.states[cell] = event["name"]
                self._pass = (event["name"], event.get("total") or 0)
            case "progress":
                name, total = self._pass
                self.states[cell] = f"{name}, {event['tokens'] / total:.0%}" if total else name
                # Anew: the thread that draws may be going through the old one.
                self.memory[cell] = {**self.memory.get(cell, {}), **(event.get("memory") or {})}
                if event.get("tok_s"):
                    self.speeds[cell] = event["tok_s"]
            case "passed":
                self.speeds[cell] = event["tok_s"]
                if self._live is None and self.report.verbose is False:
                    self.report.say(f"  {event['name']}: {event['tok_s']:.2f} tok/s")
            case "planned":
                for warning in event["warnings"]:
                    self.warn(cell, warning)
            case "warning":
                self.warn(cell, event["message"])

    def warn(self, cell: str, message: str) -> None:
        """A warning, once, however many cells it is true of."""
        if message not in self._told:
            self._told.add(message)
            self.report.warn(f"{cell}: {message}")

    def end(self, cell: Cell, result: RunResult | None) -> None:
        """A process of the cell has ended, and this is what the cell came to."""
        self.running = None
        if result is not None and "generation_tok_s" in result.metrics:
            self.speeds[cell.name] = result.metrics["generation_tok_s"]
        self._settle(cell)
        if self._live is None and cell.status is CellStatus.FAILED and cell.error is not None:
            self.report.say(f"  FAILED: {cell.error.message}")

    def _settle(self, cell: Cell) -> None:
        if cell.status is CellStatus.PENDING:
            done = f"{len(cell.launches)} of {self.launches} launches" if cell.launches else "waiting"
            self.states[cell.name] = done
        else:
            self.states[cell.name] = cell.status.value

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for title in ("cell", "state", "tok/s", "memory"):
            table.add_column(title, no_wrap=True, justify="right" if title == "tok/s" else "left")
        for name in self._window():
            speed = self.speeds.get(name)
            table.add_row(
                escape(name),
                escape(self.states[name]),
                "" if speed is None else f"{speed:,.2f}",
                ", ".join(
                    f"{_TIERS[tier]} {gib(size)}" for tier, size in self.memory.get(name, {}).items() if size
                ),
                style={"FAILED": "red", "waiting": "dim"}.get(
                    self.states[name], "bold" if name == self.running else ""
                ),
            )
        return table

    def _window(self) -> list[str]:
        """The cells that the terminal has room for, with the running one among them."""
        room = max(1, self.report.err.height - _MARGIN)
        # Read once: the cell may end while this thread draws.
        running = self.running
        at = self.order.index(running) if running is not None else 0
        first = max(0, min(at - room // 2, len(self.order) - room))
        return self.order[first : first + room]
