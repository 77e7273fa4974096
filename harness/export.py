"""The verb `export`: runs as one flat table, a row per run, for spreadsheets and notebooks.

Rows come from the store (`store_runs.py`) or from result folders, benchmarks' cells among them, under the same names:
`params.<name>`, `metrics.<name>` (with `_spread` and `_cold`, as MLflow shows them), `tags.<name>`, and where the run
comes from. Knows nothing of MLflow. pandas is imported when a table is made.
"""

import io
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, CellStatus, cell_folder, read_cells
from harness.config import EvalConfig
from harness.report import Report
from harness.results import RunResult
from harness.words import counted

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FORMATS = (".csv", ".parquet", ".json")
# What tells runs apart stands first, then where they come from, then figures and settings by name.
_FIRST = (
    "run_name", "strategy", "model", "status", "experiment", "kind", "started_at", "ended_at",
    "run_uuid", "run_id", "parent_run_id", "benchmark_uuid", "benchmark", "cell", "launches", "folder",
)  # fmt: skip
_ORIGIN = (
    "git_commit", "git_branch", "git_dirty", "git_remote", "command", "host", "user",
    "hardware_fingerprint", "workload_key", "prompts_digest", "error", "exit_code",
)  # fmt: skip
_GROUPS = ("metrics.", "params.", "tags.", "dataset.", "versions.")
# Options that may be unset, which a store can only keep as the word.
_MAY_BE_UNSET = {f"params.{name}" for name, field in EvalConfig.model_fields.items() if field.default is None}
_UNSET = {"none", None}


def export(rows: Sequence[Mapping[str, Any]], output: Path | None, report: Report) -> int:
    """Write rows as a table to `output`, in the format of its suffix; without one as CSV to standard output.

    A file appears whole or not at all.

    Raises:
        UsageError: no row, a format that is none of ours, a file that cannot be written.
    """
    if not rows:
        raise UsageError("no run matches; see what there is with `harness export` alone, or `harness ui`")
    table = make_table(rows)
    if output is None:
        sys.stdout.write(table.to_csv(index=False))
        return 0
    try:
        _write(table, output.expanduser())
    except OSError as error:
        raise UsageError(
            f"--output {output}: cannot be written ({error.strerror or error}); name another file"
        ) from error
    report.say(f"{counted(len(table), 'run')}, {len(table.columns)} columns: {output}")
    return 0


def check_format(output: Path) -> None:
    """Refuse a suffix that names no format, before anything is read.

    Raises:
        UsageError: it is none of FORMATS.
    """
    if output.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--output {output}: the suffix names the format; use one of {', '.join(FORMATS)}, "
            "or - for CSV on standard output"
        )


def folder_rows(results_dir: Path, report: Report) -> list[dict[str, Any]]:
    """The runs under a folder of result folders, oldest first, cells of benchmarks included.

    A benchmark's launches are in their cell's row together. A record that cannot be read costs a warning, not the table.

    Raises:
        UsageError: there is no such folder, or no result in it.
    """
    folders = [results_dir, *sorted(results_dir.glob("*/"))] if results_dir.is_dir() else []
    rows: list[dict[str, Any]] = []
    found = 0
    for folder in folders:
        is_run, is_benchmark = (folder / "result.json").exists(), (folder / "benchmark.json").exists()
        found += is_run or is_benchmark
        try:
            if is_benchmark:
                rows += _cell_rows(folder)
            elif is_run:
                rows.append(result_row(RunResult.read(folder), folder))
        except UsageError as error:
            report.warn(f"left out: {error}")
    if not found:
        if not results_dir.exists():
            raise UsageError(
                f"there is no folder {results_dir}; name results/ or a folder results/<uuid> in it"
            )
        raise UsageError(f"{results_dir} holds no result; name results/ or a folder results/<uuid> in it")
    return sorted(rows, key=lambda row: row["started_at_ms"])


def _cell_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A benchmark's cells: those with a result, and those that failed before they could leave one."""
    from harness.benchmark.summary import lost_result

    benchmark = Benchmark.read(folder)
    results = read_cells(folder, benchmark)
    for cell in benchmark.cells:
        if cell.name in results:
            yield result_row(results[cell.name], cell_folder(folder, cell.name), benchmark)
        elif cell.status is CellStatus.FAILED:
            yield result_row(lost_result(benchmark, cell), folder, benchmark)


def result_row(result: RunResult, folder: Path, benchmark: Benchmark | None = None) -> dict[str, Any]:
    """A run as one flat row."""
    origin, data, error = result.provenance, result.dataset, result.error
    row: dict[str, Any] = {
        "run_uuid": result.run_uuid,
        "experiment": result.experiment,
        "run_name": result.run_name,
        "status": result.status.value,
        "strategy": result.strategy,
        "model": result.model,
        "started_at_ms": result.started_at_ms,
        "ended_at_ms": result.ended_at_ms,
        "folder": str(folder),
        "kind": "cell" if result.cell else "run",
        "benchmark_uuid": result.cell.benchmark_uuid if result.cell else None,
        "benchmark": benchmark.name if benchmark else None,
        "cell": result.cell.cell if result.cell else None,
        "launches": len(result.cell.launches) if result.cell else None,
        "git_commit": origin.git_commit,
        "git_branch": origin.git_branch,
        "git_dirty": origin.git_dirty,
        "git_remote": origin.git_remote,
        "command": origin.command or None,
        "host": result.process.get("host") or origin.host or None,
        "user": origin.user or None,
        "hardware_fingerprint": result.hardware_fingerprint or None,
        "workload_key": result.workload_key or None,
        "prompts_digest": data.digest if data else None,
        "error": f"{error.type}: {error.message}" if error else None,
        "exit_code": error.exit_code if error else None,
    }
    row |= {f"metrics.{name}": value for name, value in result.metrics.items()}
    row |= {f"metrics.{name}_spread": value for name, value in result.spread.items()}
    row |= {f"metrics.{name}_cold": value for name, value in result.cold.items()}
    row |= {f"params.{name}": value for name, value in result.params.items()}
    row |= {f"tags.{name}": value for name, value in result.tags.items()}
    row |= {f"versions.{name}": value for name, value in origin.versions.items()}
    if data is not None:
        fields = data.model_dump(exclude={"prompt_ids", "digest"})
        row |= {f"dataset.{name}": value for name, value in fields.items()}
    return row


def select(
    rows: Iterable[Mapping[str, Any]],
    *,
    experiments: Sequence[str] = (),
    strategies: Sequence[str] = (),
    models: Sequence[str] = (),
) -> list[Mapping[str, Any]]:
    """The rows of any of the experiments, strategies and models named; a model also by the last part of its name."""

    def wanted(row: Mapping[str, Any]) -> bool:
        model = str(row.get("model") or "")
        return (
            (not experiments or row.get("experiment") in experiments)
            and (not strategies or row.get("strategy") in strategies)
            and (not models or model in models or model.rstrip("/").rsplit("/", 1)[-1] in models)
        )

    return [row for row in rows if wanted(row)]


def make_table(rows: Sequence[Mapping[str, Any]]) -> "DataFrame":
    """Rows as a table: a column has one type, a missing value is empty, a column without any value is left out.

    A column of numbers with one text in it is a column of texts. Times are UTC.
    """
    import pandas

    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Series[Any]] = {}
    for name in names:
        values = [_value(name, row.get(name)) for row in rows]
        if name in ("started_at_ms", "ended_at_ms"):
            columns[name.removesuffix("_ms")] = pandas.to_datetime(
                pandas.Series(values, dtype="Int64"), unit="ms", utc=True
            )
        elif any(value is not None for value in values):
            columns[name] = _typed(values)
    table = pandas.DataFrame(columns)
    return table[sorted(table.columns, key=_place)]


def _place(name: str) -> tuple[int, int, str]:
    for rank, group in enumerate((_FIRST, _ORIGIN)):
        if name in group:
            return rank, group.index(name), name
    prefix = next((index for index, prefix in enumerate(_GROUPS) if name.startswith(prefix)), len(_GROUPS))
    return 2, prefix, name


def _value(name: str, value: Any) -> Any:
    if name in _MAY_BE_UNSET and value in _UNSET:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        # Half a surrogate pair, as a broken file name may hold, fits no file.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _typed(values: Sequence[Any]) -> "Series[Any]":
    import pandas

    for kind, read in (("boolean", _as_bool), ("Int64", _as_int), ("Float64", _as_float)):
        try:
            return pandas.Series([None if value is None else read(value) for value in values], dtype=kind)
        except (ValueError, TypeError, OverflowError):
            continue
    return pandas.Series([None if value is None else _as_text(value) for value in values], dtype="string")


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise ValueError


def _as_int(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise ValueError
    number = int(value)
    # `007` and `1_000` are names; a number past 64 bits has no column of its own.
    if isinstance(value, str) and str(number) != value:
        raise ValueError
    if not -(2**63) <= number < 2**63:
        raise OverflowError
    return number


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or (isinstance(value, str) and not _is_number(value)):
        raise ValueError
    return float(value)


def _is_number(text: str) -> bool:
    return text[:1] in "-.0123456789" and "_" not in text and not (text[:1] == "0" and text[1:2].isdigit())


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write(table: "DataFrame", output: Path) -> None:
    check_format(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            match output.suffix.lower():
                case ".csv":
                    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                        table.to_csv(text, index=False)
                case ".parquet":
                    table.to_parquet(file, index=False)
                case _:
                    table.to_json(
                        file,
                        orient="records",
                        indent=2,
                        force_ascii=False,
                        date_format="iso",
                        double_precision=15,
                    )
        temporary.chmod(0o644)
        temporary.replace(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
