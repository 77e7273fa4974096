"""How the rows of a benchmark read: columns with one unit each, as text for a terminal, as markdown.

A column has the unit that suits its largest value, so that figures compare down the column. A column that is unknown
for every cell is left out. Pure; report.py prints.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.benchmark.merge import PEAKS
from harness.benchmark.table import Row
from profiling.contention import SHOWS_FROM_SHARE

MIB, GIB = 2.0**20, 2.0**30
UNKNOWN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its title with the unit, a text per row, and what it means for those who ask."""

    key: str
    title: str
    cells: Sequence[str]
    meaning: str = ""


def number(value: float) -> str:
    """A figure in three significant digits, with all digits before the point.

    >>> number(12345.6), number(412.3), number(41.23), number(40), number(0.01234), number(0)
    ('12,346', '412', '41.2', '40.0', '0.0123', '0')
    """
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{value:#.3g}".rstrip(".")


def percent(share: float) -> str:
    """A share as percent; one decimal below ten.

    >>> percent(0.6789), percent(0.0123), percent(1), percent(0.99996)
    ('68%', '1.2%', '100%', '<100%')
    """
    if 0.995 <= share < 1:
        return f"{share:.1%}" if share < 0.9995 else "<100%"
    return f"{share:.1%}" if 0 < abs(share) < 0.0995 else f"{share:.0%}"


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The table, most telling column first; the first names the cells."""
    columns = [Column(key="name", title="cell", cells=[row.name for row in rows])]
    for key, title, text, meaning in _plain():
        columns += _column(key, title, [text(row) for row in rows], meaning)
        if key == "predicted_tok_s":
            columns += _measures(rows)
    return columns


def blocks_of(columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Fold the columns into tables no wider than `width` characters, each of which begins with the cells' names.

    The names take at most two fifths of the width; the rest of a longer one wraps.
    """
    names, rest = columns[0], columns[1:]
    gap = 2
    name_width = min(_width(names), name_limit(width))
    block, used = [names], name_width
    for column in rest:
        needed = gap + _width(column)
        if len(block) > 1 and used + needed > width:
            yield block
            block, used = [names], name_width
        block.append(column)
        used += needed
    yield block


def name_limit(width: int) -> int:
    """The most characters that cells' names take of a terminal of this width."""
    return max(12, width * 2 // 5)


def failures(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Cells that failed, and why, with predicted and actual peak where either is known and the reason does not say so."""
    for row in rows:
        if row.reason:
            more = () if PEAKS in row.reason else peaks(row)
            yield row.name, "; ".join([row.reason, *more])


def peaks(row: Row) -> Iterator[str]:
    """Predicted against actual peak of each tier, where one is known."""
    for tier, predicted, actual in (
        ("device", row.predicted_peak_device_bytes, row.peak_device_bytes),
        ("host", row.predicted_peak_host_bytes, row.peak_host_bytes),
        ("disk", row.predicted_disk_bytes, row.disk_bytes),
    ):
        if not predicted and not actual:
            continue
        words = [
            f"{how} {size(value)}" for how, value in (("predicted", predicted), ("actual", actual)) if value
        ]
        yield f"{tier} peak {', '.join(words)}"


def size(num_bytes: float | None) -> str:
    """Bytes where a sentence holds them.

    >>> size(3 * GIB), size(200 * MIB), size(None)
    ('3.00 GiB', '200 MiB', 'unknown')
    """
    if num_bytes is None:
        return "unknown"
    return f"{number(num_bytes / GIB)} GiB" if num_bytes >= GIB else f"{number(num_bytes / MIB)} MiB"


def seconds(value: float) -> str:
    """Seconds where a sentence holds them.

    >>> seconds(0.0123), seconds(123.4)
    ('12.3 ms', '123 s')
    """
    return f"{number(value)} s" if value >= 1 else f"{number(value * 1e3)} ms"


def markdown(rows: Sequence[Row]) -> str:
    """The table in GitHub's markdown, failures below; it ends with a line break."""
    columns = columns_of(rows)
    lines = [
        _line([column.title for column in columns]),
        _line(["---", *("---:" for _ in columns[1:])]),
        *(_line([_escaped(column.cells[index]) for column in columns]) for index in range(len(rows))),
    ]
    failed = [f"- **{_escaped(name)}** failed: {_escaped(why)}" for name, why in failures(rows)]
    return "\n".join([*lines, *(["", *failed] if failed else [])]) + "\n"


def _plain() -> tuple[tuple[str, str, Callable[[Row], str | None], str], ...]:
    return (
        (
            "generation_tok_s",
            "tok/s",
            _throughput,
            "generated tokens / (prefill + decode)",
        ),
        ("spread", "spread", lambda row: _maybe(row.spread, percent), "(max - min) / median"),
        (
            "ratio_to_baseline",
            "vs base",
            lambda row: _maybe(row.ratio_to_baseline, lambda ratio: f"{number(ratio)}x"),
            "tok/s / that of the baseline with the same workload",
        ),
        (
            "limit_tok_s",
            "limit",
            lambda row: _maybe(row.limit_tok_s, number),
            "tok/s that the measured rates allow",
        ),
        ("attainment", "attained", lambda row: _maybe(row.attainment, percent), "measured / limit"),
        (
            "predicted_tok_s",
            "predicted",
            lambda row: _maybe(row.predicted_tok_s, number),
            "tok/s that the strategy expected",
        ),
        ("parity", "parity", _parity, "sequences whose tokens all equal the baseline's"),
        (
            "token_match_share",
            "tokens",
            lambda row: _maybe(row.token_match_share, percent),
            "of a lossy cell: generated tokens equal to the lossless model's, position by position",
        ),
        (
            "perplexity_ratio",
            "perplexity",
            lambda row: _maybe(row.perplexity_ratio, lambda ratio: f"{ratio - 1:+.2%}"),
            "of a lossy cell: perplexity on real text over the lossless model's, less 1",
        ),
        ("runs", "runs", _runs, "launches x repeats of each"),
        (
            "others_share",
            "CPU taken",
            _others,
            "share of the processors that other processes kept busy meanwhile, from a tenth on: the CPU was slower for it",
        ),
    )


def _measures(rows: Sequence[Row]) -> Iterator[Column]:
    times = (
        ("ttft_s", "TTFT", "time to first token"),
        ("tpot_s", "TPOT", "time per output token after the first"),
        ("load_s", "load", "loading the model"),
    )
    for key, title, meaning in times:
        unit, factor = ("s", 1.0) if _largest(rows, key) >= 10 else ("ms", 1e3)
        yield from _scaled(rows, key, f"{title} {unit}", factor, meaning)
    memory = (
        ("peak_device_bytes", "device", "most device memory allocated"),
        ("peak_host_bytes", "host", "most resident host memory of the process"),
        ("disk_bytes", "disk", "offload files"),
    )
    for key, title, meaning in memory:
        if not _largest(rows, key):
            continue
        unit, factor = ("GiB", 1 / GIB) if _largest(rows, key) >= GIB else ("MiB", 1 / MIB)
        yield from _scaled(rows, key, f"{title} {unit}", factor, meaning)


def _scaled(rows: Sequence[Row], key: str, title: str, factor: float, meaning: str) -> list[Column]:
    values = [getattr(row, key) for row in rows]
    return _column(
        key, title, [None if value is None else number(value * factor) for value in values], meaning
    )


def _column(key: str, title: str, texts: Sequence[str | None], meaning: str) -> list[Column]:
    if not any(texts):
        return []
    return [Column(key=key, title=title, cells=[text or UNKNOWN for text in texts], meaning=meaning)]


def _largest(rows: Sequence[Row], key: str) -> float:
    return max((value for row in rows if (value := getattr(row, key)) is not None), default=0.0)


def _maybe(value: float | None, text: Callable[[float], str]) -> str | None:
    return None if value is None else text(value)


def _throughput(row: Row) -> str | None:
    figure = _maybe(row.generation_tok_s, number)
    if row.status == "FINISHED":
        return figure
    # A cell that failed in a later launch keeps the figure of the others.
    return f"{figure} ({row.status.lower()})" if figure else row.status.lower()


def _parity(row: Row) -> str | None:
    if row.parity is None:
        return None
    where = "" if row.first_divergence is None else f" from {row.first_divergence}"
    lossy = " (lossy)" if row.lossy else ""
    return f"{percent(row.parity)}{where}{lossy}"


def _runs(row: Row) -> str | None:
    if not row.repeats:
        return None
    each, rest = divmod(row.repeats, max(row.launches, 1))
    # Launches that were cut short leave fewer repeats: only the sum is then true.
    return f"{max(row.launches, 1)}x{each}" if not rest else f"{row.repeats} in {row.launches}"


def _others(row: Row) -> str | None:
    taken = row.others_share or 0.0
    return percent(taken) if taken >= SHOWS_FROM_SHARE else None


def _width(column: Column) -> int:
    from rich.cells import cell_len

    return max(cell_len(text) for text in (column.title, *column.cells))


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|<>~])", r"\\\1", " ".join(text.split()))
