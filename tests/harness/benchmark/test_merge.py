"""The launches of a cell as one result, and errors that name the peaks."""

from pathlib import Path
from typing import Any

import pytest
from benchmark_records import make_benchmark, make_cell, make_launch_result

from harness.benchmark.merge import explain, merge, shown_launch, write_cell
from harness.benchmark.record import CellStatus, cell_folder
from harness.results import Repeat, RunError, RunResult, RunStatus

CELL = make_cell("flexgen", 4)


def launch(speeds: list[float], **changes: Any) -> RunResult:
    """A launch whose repeats had these throughputs."""
    from statistics import median

    result = make_launch_result(CELL, 0)
    repeats = [
        Repeat(index=n, ended_at_ms=n, metrics={"generation_tok_s": speed}) for n, speed in enumerate(speeds)
    ]
    metrics = {
        "load_s": 2.0,
        "predicted_tok_s": 20.0,
        "limit_tok_s": 40.0,
        **({"generation_tok_s": median(speeds)} if speeds else {}),
    }
    spread = {"generation_tok_s": (max(speeds) - min(speeds)) / median(speeds)} if len(speeds) > 1 else {}
    return result.model_copy(
        update={"repeats": repeats, "metrics": metrics, "spread": spread, "run_uuid": "l", **changes}
    )


def test_the_median_of_the_launches_medians_and_their_spread() -> None:
    launches = [launch([10, 11, 30]), launch([12, 13, 13]), launch([20, 20, 9])]
    result = merge(make_benchmark(), CELL, launches)
    assert result.metrics["generation_tok_s"] == 13
    assert result.spread["generation_tok_s"] == pytest.approx((20 - 11) / 13)
    assert [(one.index, one.launch) for one in result.repeats] == [(index, index // 3) for index in range(9)]
    assert result.metrics["attainment"] == pytest.approx(13 / 40)
    assert result.metrics["prediction_error"] == pytest.approx(20 / 13 - 1)
    assert (result.metrics["repeats"], result.metrics["launches"]) == (9, 3)
    assert "load_s" not in result.spread


def test_ratios_are_those_of_the_figures_beside_them() -> None:
    result = merge(make_benchmark(), CELL, [launch([10.0]), launch([30.0])])
    assert result.metrics["generation_tok_s"] == 20
    assert result.metrics["prediction_error"] == 0.0


def test_one_launch_keeps_the_spread_over_its_repeats() -> None:
    one = launch([10, 11, 12])
    assert merge(make_benchmark(), CELL, [one]).spread == one.spread


def test_the_cell_says_where_it_stands() -> None:
    benchmark = make_benchmark()
    result = merge(benchmark, CELL, [launch([1.0], run_uuid="a"), launch([2.0], run_uuid="b")])
    assert result.cell is not None
    assert (result.cell.cell, result.cell.launches) == (CELL.name, ["a", "b"])
    assert (result.run_name, result.run_uuid) == (CELL.name, f"{benchmark.benchmark_uuid}-{CELL.name}")
    assert result.status is RunStatus.FINISHED
    assert result.process == benchmark.process
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def test_a_cell_that_is_not_done_is_running_or_was_killed() -> None:
    pending = CELL.model_copy(update={"status": CellStatus.PENDING})
    running = make_benchmark(status=RunStatus.RUNNING)
    assert merge(running, pending, [launch([1.0])]).status is RunStatus.RUNNING
    killed = make_benchmark(status=RunStatus.KILLED)
    assert merge(killed, pending, [launch([1.0])]).status is RunStatus.KILLED


def test_a_launch_that_measured_nothing_takes_nothing_from_the_others() -> None:
    error = RunError(type="OutOfMemory", message="too big", exit_code=5)
    failed = CELL.model_copy(update={"status": CellStatus.FAILED, "error": error})
    result = merge(make_benchmark(), failed, [launch([10, 12]), launch([], plan={})])
    assert result.status is RunStatus.FAILED
    assert result.error == error
    assert result.metrics["generation_tok_s"] == 11
    assert result.plan != {}


def test_launches_that_ran_other_policies_are_not_mixed() -> None:
    """Speeds are of all; the plan and what hangs on it are of those that ran the policy of most."""

    def planned(speed: float, bits: int | None, ratio: float, share: float = 0.25) -> RunResult:
        policy = {"weight_bits": bits, "kv_bits": 4, "num_micro_batches": 1}
        one = launch([speed])
        metrics = {**one.metrics, "perplexity_ratio": ratio, "limit_tok_s": 10 * speed}
        plan = {"policy": policy, "lossless": False, "shares": {"weights": {"gpu": share}}}
        return one.model_copy(update={"metrics": metrics, "plan": plan})

    launches = [
        planned(34, None, 1.004),
        planned(36, None, 1.006, 0.26),
        planned(25, 4, 1.275),
        planned(35, None, 1.005),
    ]
    for order in (launches, launches[::-1]):
        result = merge(make_benchmark(), CELL, order)
        assert result.plan["policy"]["weight_bits"] is None
        assert result.metrics["generation_tok_s"] == 34.5
        assert result.metrics["perplexity_ratio"] == 1.005
        assert result.metrics["attainment"] == pytest.approx(34.5 / 350)
        (told,) = [each for each in result.warnings if "other policies" in each]
        assert told.startswith("the plan shown is that of 3 of 4 launches; other policies")
        assert told.endswith("25 tok/s, weights in 4 bits, KV cache in 4 bits, perplexity +27.50%")
        assert shown_launch(order).plan == result.plan
    assert not any("other policies" in each for each in merge(make_benchmark(), CELL, launches[:2]).warnings)


def test_the_cells_folder_is_a_result_folder(tmp_path: Path) -> None:
    launch_folder = tmp_path / "launch"
    launch_folder.mkdir()
    (launch_folder / "requests.jsonl").write_text("{}\n")
    (launch_folder / "timeline.json").write_text("{}")
    result = merge(make_benchmark(), CELL, [launch([1.0])])
    inside = cell_folder(tmp_path, CELL.name)
    inside.mkdir(parents=True)
    (inside / "memory.png").write_text("of fewer launches")
    write_cell(tmp_path, result, launch_folder)
    assert {file.name for file in inside.iterdir()} == {"result.json", "requests.jsonl", "timeline.json"}
    assert RunResult.read(inside) == result


def test_an_error_names_the_peaks_predicted_and_reached() -> None:
    error = RunError(type="WorkerDied", message="killed")
    result = launch([], metrics={"predicted_peak_cpu_bytes": float(3 << 30)}, plan={})
    message = explain(error, result, {"cpu": 4 << 30}).message
    assert message == (
        "killed (peak in host memory predicted 3.00 GiB = 3221225472 bytes, reached 4.00 GiB = 4294967296 bytes)"
    )
    peaks = {"predicted": {"peak_bytes": {"gpu": 1 << 30, "cpu": 1 << 29}}}
    planned = launch([], metrics={}, plan={"device": "cuda", **peaks})
    assert "on the compute device predicted 1.00 GiB" in explain(error, planned, {}).message
    # Without a GPU both lie in host memory, as in the table.
    planned = launch([], metrics={}, plan={"device": "cpu", **peaks})
    assert "(peak in host memory predicted 1.50 GiB" in explain(error, planned, {}).message
    assert explain(error, None, {}) == error
