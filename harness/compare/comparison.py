"""The verbs `compare` and `compare --strategies` from names to exit code."""

from collections.abc import Sequence

from flexllmgen.errors import UsageError
from harness import exit_codes
from harness.compare.pairing import pair_strategies, pair_up
from harness.compare.select import Records, Selection
from harness.compare.verdict import (
    DEFAULT_METRICS,
    Comparison,
    compare_pairs,
    failures,
    parse_gate,
)
from harness.compare.view import as_markdown, as_text
from harness.report import Report


def compare_names(
    records: Records,
    names: Sequence[str],
    *,
    strategies: bool,
    metrics: Sequence[str],
    fail_on: Sequence[str],
    force: bool,
) -> tuple[Comparison, list[str]]:
    """Hold base against new, or the strategies of one benchmark against its baseline; and what fails the checks.

    Raises:
        UsageError: a name that stands for nothing, a store that is unreachable, two that cannot be compared, a metric
            that is not there.
    """
    gates = [parse_gate(text) for text in fail_on]
    asked = list(dict.fromkeys((*metrics, *(gate.metric for gate in gates))))
    shown = list(dict.fromkeys((*(metrics or DEFAULT_METRICS), *asked)))
    comparison = (
        _strategies(records, names, shown, asked)
        if strategies
        else _sides(records, names, shown, asked, force=force)
    )
    return comparison, failures(comparison, gates)


def show(
    comparison: Comparison, failed: Sequence[str], report: Report, *, as_json: bool, markdown: bool
) -> int:
    """Print it; the exit code says whether the checks hold."""
    if as_json:
        report.json({**comparison.as_dict(), "failures": list(failed)})
    elif markdown:
        report.text(as_markdown(comparison))
    else:
        report.text(as_text(comparison, report.width))
    for line in failed:
        report.error(f"--fail-on: {line}")
    return exit_codes.CHECK_FAILED if failed else 0


def _sides(
    records: Records, names: Sequence[str], metrics: Sequence[str], asked: Sequence[str], *, force: bool
) -> Comparison:
    if len(names) != 2:
        raise UsageError(
            "name what to compare, A and B: commits, branches, tags, run ids, @latest~1 @latest, result files"
        )
    base, new = (records.select(name) for name in names)
    if base.run_uuids == new.run_uuids:
        records.warn(
            f"{base.name} and {new.name} stand for the same results, so that no figure can differ; measure at another "
            "commit (`harness history` lists what has results), or name two runs"
        )
    pairs, unpaired = pair_up(
        base.measured, new.measured, base_failed=base.failed, new_failed=new.failed, force=force
    )
    return Comparison(
        base=_told(base),
        new=_told(new),
        cells=compare_pairs(pairs, metrics, named=asked),
        unpaired=tuple(unpaired),
    )


def _strategies(
    records: Records, names: Sequence[str], metrics: Sequence[str], asked: Sequence[str]
) -> Comparison:
    if len(names) > 1:
        raise UsageError("--strategies compares within one benchmark: name one, or none for the latest")
    chosen = records.select(names[0] if names else "@latest")
    baseline = next((one.baseline for one in chosen.measured if one.baseline), "")
    pairs, unpaired = pair_strategies(chosen.measured, baseline)
    name, what = _told(chosen)
    bases = list(dict.fromkeys(pair.base.result.strategy for pair in pairs))
    others = list(dict.fromkeys(pair.new.result.strategy for pair in pairs))
    return Comparison(
        base=(", ".join(bases), f"{name}: {what}"),
        new=(", ".join(others), "the same benchmark"),
        cells=compare_pairs(pairs, metrics, named=asked, plans=False),
        unpaired=tuple(unpaired),
    )


def _told(selection: Selection) -> tuple[str, str]:
    runs = len(selection.measured)
    return selection.name, f"{selection.title} ({runs} result{'s' if runs != 1 else ''})"
