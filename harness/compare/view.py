"""A comparison as people read it: aligned text for a terminal of a given width, and markdown.

Pure functions to text. Knows nothing of how it was worked out.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence

from flexllmgen.units import gib
from harness.compare.differences import told
from harness.compare.statistics import least_launches
from harness.compare.verdict import CellComparison, Comparison, Mark, MetricComparison

COLUMNS = ("metric", "base", "new", "change", "95% interval", "p", "verdict")
_GAP = "  "


def as_text(comparison: Comparison, width: int) -> str:
    """Everything, in lines no longer than `width` where words allow it."""
    lines = [*_sides(comparison), ""]
    for cell in comparison.cells:
        words = [*_heading(cell), *(f"  {note}" for note in _notes(cell))]
        lines += [line for one in words for line in wrapped(one, width)]
        lines += [*table(COLUMNS, [_row(one) for one in cell.metrics], width), ""]
    lines += [line for one in (*_unpaired(comparison), verdict(comparison)) for line in wrapped(one, width)]
    return "\n".join(lines)


def as_markdown(comparison: Comparison) -> str:
    """The same, for a pull request."""
    lines = [
        f"**base** {comparison.base[0]}: {comparison.base[1]}  ",
        f"**new** {comparison.new[0]}: {comparison.new[1]}",
        "",
    ]
    for cell in comparison.cells:
        first, *more = _heading(cell)
        lines += [f"### {first}", "", *(f"- {note.strip()}" for note in (*more, *_notes(cell))), ""]
        lines += [_pipes(COLUMNS), _pipes(["---", *["---:"] * 5, "---"])]
        lines += [_pipes(_row(one)) for one in cell.metrics]
        lines.append("")
    lines += [f"- {line}" for line in _unpaired(comparison) if line]
    lines += ["", f"**{verdict(comparison)}**"]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def verdict(comparison: Comparison) -> str:
    """One line: per metric how many setups got better, worse, or neither."""
    by_metric: dict[str, list[MetricComparison]] = {}
    for cell in comparison.cells:
        for one in cell.metrics:
            by_metric.setdefault(one.metric, []).append(one)
    if not by_metric:
        return "verdict: none; the two have none of these metrics in common"
    told_of = [(metric, _outcome(ones)) for metric, ones in by_metric.items()]
    known = [f"{metric} {outcome}" for metric, outcome in told_of if outcome]
    if known:
        return f"verdict: {', '.join(known)}"
    launches = next(iter(by_metric.values()))[0].launches
    least = least_launches()
    return (
        f"verdict: none; {launches[0]} against {launches[1]} launch{'es' if max(launches) > 1 else ''} cannot tell, "
        f"{least} against {least} can (harness benchmark --launches {least})"
    )


def value_text(metric: str, value: float) -> str:
    """A value with its unit, where the metric's name does not say enough."""
    if not math.isfinite(value):
        return str(value)
    if metric.endswith("_bytes"):
        return gib(value)
    if metric.endswith("_s") and not metric.endswith("tok_s"):
        shown, unit = (value * 1e3, "ms") if abs(value) < 1 else (value, "s")
        return f"{shown:#.4g}".rstrip(".") + f" {unit}"
    if metric in ("attainment", "prediction_error", "parity", "token_match_share"):
        return f"{value:.1%}"
    if metric.startswith("perplexity"):
        return f"{value:.4f}"
    return f"{value:,.2f}" if abs(value) < 1e5 else f"{value:.4g}"


def share_text(share: float | None) -> str:
    """A relative change with its sign.

    >>> share_text(0.0912), share_text(-0.00001), share_text(None)
    ('+9.1%', '0.0%', 'n/a')
    """
    if share is None:
        return "n/a"
    if share >= 10:
        return f"x{1 + share:.3g}"
    text = f"{share:+.1%}"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def wrapped(line: str, width: int) -> list[str]:
    """A line cut between words, what follows set in by two more; an empty one stays."""
    indent = len(line) - len(line.lstrip())
    return textwrap.wrap(
        line, width, subsequent_indent=" " * (indent + 2), break_long_words=False, break_on_hyphens=False
    ) or [""]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, left: int = 1) -> list[str]:
    """Aligned lines: the first `left` columns and the last flush left, figures flush right.

    Where the lines would be longer than `width`, gaps shrink and the first column loses its units and then its end.
    """
    if not rows:
        return []
    cells = [list(columns), *map(list, rows)]
    gap = _GAP
    if _length(cells, gap) > width:
        gap = " "
        for row in cells:
            row[0] = row[0].removesuffix("_bytes")
    first = max(len(row[0]) for row in cells)
    first = max(min(first, 12), first - max(0, _length(cells, gap) - width))
    for row in cells:
        row[0] = row[0] if len(row[0]) <= first else row[0][: first - 1] + "…"
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    last = len(columns) - 1
    return [
        gap.join(
            text.ljust(widths[at]) if at < left or at == last else text.rjust(widths[at])
            for at, text in enumerate(row)
        ).rstrip()
        for row in cells
    ]


def _length(cells: Sequence[Sequence[str]], gap: str) -> int:
    columns = range(len(cells[0]))
    return sum(max(len(row[at]) for row in cells) for at in columns) + len(gap) * (len(columns) - 1)


def _sides(comparison: Comparison) -> list[str]:
    return [
        f"{side:<4}  {name}" + (f": {what}" if what else "")
        for side, (name, what) in (("base", comparison.base), ("new", comparison.new))
    ]


def _heading(cell: CellComparison) -> list[str]:
    return [cell.label] if cell.against == cell.label else [cell.label, f"  against {cell.against}"]


def _notes(cell: CellComparison) -> Iterator[str]:
    base, new = cell.losses
    if base != new:
        yield f"not the same output: base is {_lossy(base)}, new is {_lossy(new)}"
    elif base:
        yield f"both are {_lossy(base)}"
    if cell.plan is not None:
        yield str(cell.plan)
    if cell.differs:
        yield f"forced, although these differ: {told(cell.differs)}"
    if cell.versions:
        yield f"what differs around it: {told(cell.versions, between=' -> ')}"


def _lossy(words: str) -> str:
    return f"lossy ({words})" if words else "lossless"


def _row(one: MetricComparison) -> list[str]:
    change = one.change
    if change.low is not None and change.high is not None:
        between = f"{share_text(change.low)} {share_text(change.high)}"
    elif not change.can_tell and any(spread is not None for spread in one.spreads):
        between = "spread " + " ".join("-" if spread is None else f"{spread:.1%}" for spread in one.spreads)
    else:
        between = "-"
    return [
        one.metric,
        value_text(one.metric, one.base),
        value_text(one.metric, one.new),
        share_text(change.change),
        between,
        "-" if change.p is None else f"{change.p:.3f}" if change.p >= 0.001 else "<.001",
        one.mark.value if one.mark is not Mark.UNKNOWN else f"? {one.launches[0]}v{one.launches[1]}",
    ]


def _outcome(ones: Sequence[MetricComparison]) -> str:
    """What became of a metric over all setups; empty where nothing can be told."""
    if all(one.mark is Mark.UNKNOWN for one in ones):
        return ""
    if len(ones) == 1:
        mark, change = ones[0].mark, share_text(ones[0].change.change)
        return "unchanged (~)" if mark is Mark.SAME else f"{mark.value} ({change})"
    counts = {mark: sum(one.mark is mark for one in ones) for mark in Mark}
    words = {Mark.SAME: "unchanged (~)", Mark.UNKNOWN: "too few launches"}
    return " / ".join(f"{count} {words.get(mark, mark.value)}" for mark, count in counts.items() if count)


def _unpaired(comparison: Comparison) -> list[str]:
    lines = [
        f"only in {'base' if one.side == 'base' else 'new'}: {one.label}: {one.reason}"
        for one in comparison.unpaired
    ]
    return [*lines, ""] if lines else []


def _pipes(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
