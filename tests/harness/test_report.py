"""What a person reads: streams, one-line errors, tables, and silence where it was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.report import Report
from harness.results import Repeat, RunResult, RunStatus

PLAN: dict[str, Any] = {
    "strategy": "accelerate",
    "model": "owner/[model]",
    "dtype": "float32",
    "device": "cpu",
    "num_sequences": 5,
    "prompt_tokens": 32,
    "gen_tokens": 8,
    "batch_size": 2,
    "weight_bytes": {"gpu": 0, "cpu": 2**30, "disk": 2**20},
    "kv_bytes": {"gpu": 0, "cpu": 0, "disk": 0},
    "workspace_bytes": 2**10,
}


def make_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "run_uuid": "u",
        "status": RunStatus.FINISHED,
        "experiment": "e",
        "run_name": "a [run]",
        "strategy": "accelerate",
        "model": "owner/model",
        "started_at_ms": 1,
        "metrics": {
            "generation_tok_s": 1234.5,
            "ttft_s": 0.25,
            "peak_rss_bytes": 3 * 2**30,
            "weight_bytes_disk": 0.0,
            "weight_bytes_cpu": 2.0**20,
        },
        "spread": {"ttft_s": 0.125},
        "repeats": [Repeat(index=0, ended_at_ms=2, metrics={"ttft_s": 0.25})],
        **changes,
    }
    return RunResult.model_validate(fields)


def test_results_go_to_stdout_and_the_rest_to_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = Report()
    report.say("loading")
    report.warn("odd")
    report.plan(PLAN, "a machine", to_stdout=False)
    report.phase("load", None)
    report.passed("repeat 1/1", 30, 12.345)
    assert capsys.readouterr().out == ""
    report.result(make_result(), tmp_path, None)
    report.text("a line")
    report.json({"a": 1})
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "a line" in captured.out


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    Report().error("first [bold]line\n  second " + "word " * 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: first [bold]line second word")


def test_quiet_keeps_warnings_and_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = Report(quiet=True)
    report.say("loading")
    report.phase("load", None)
    report.phase("repeat", 10)
    report.progress(5)
    report.passed("repeat", 10, 1.0)
    report.plan(PLAN, "a machine", to_stdout=False)
    assert capsys.readouterr() == ("", "")
    report.warn("odd")
    report.plan(PLAN, "a machine", to_stdout=True)
    captured = capsys.readouterr()
    assert captured.err == "warning: odd\n"
    assert "plan: accelerate" in captured.out


def test_the_plan_says_what_its_policy_does_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    Report().plan({**PLAN, "policy": {"cpu_attention": True, "recompute": 0.4}}, "a machine", to_stdout=True)
    assert "\n  attention on the CPU, 40% of the KV in host memory made anew\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"batch_size_asked": 1}, "batches of 2, "),
        ({"batch_size_asked": 2, "search": {}}, "batches of 2, "),
        ({"batch_size_asked": 1, "search": {}}, "batches of 2 (the search's choice; --batch-size is 1), "),
    ],
)
def test_the_plan_says_whose_choice_the_batches_are(
    capsys: pytest.CaptureFixture[str], plan: dict[str, Any], words: str
) -> None:
    Report().plan({**PLAN, **plan}, "a machine", to_stdout=True)
    assert words in capsys.readouterr().out


def test_the_plan_says_what_lies_where(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = {"generation_tok_s": 1000.0, "prefill_bound": "compute", "decode_bound": "disk"}
    Report().plan({**PLAN, "predicted": estimate, "limit": estimate}, "a machine", to_stdout=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "owner/[model]" in lines[0]
    assert "1.00 GiB host + 1.0 MiB disk" in lines[2]
    assert "KV cache none" in lines[2]
    assert "decode by disk" in lines[3]


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Report().result(make_result(), tmp_path / "results" / "u", "see it")
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if "  " in line}
    assert rows["generation throughput"][-2:] == ["1,234.50", "tok/s"]
    assert rows["time to first token (TTFT)"][-3:] == ["250.0", "ms", "12.5%"]
    assert rows["peak host memory (RSS)"][-2:] == ["3.00", "GiB"]
    assert "weights in host memory" in out
    assert "weights on disk" not in out, "nothing is there"
    assert "decode throughput" not in out, "it was not measured"
    assert out.splitlines()[-1] == "see it"
    assert str(tmp_path / "results" / "u") in out


@pytest.mark.parametrize(
    ("before", "words"), [(83.6, "(83.60 tok/s before loading)"), (100.4, ""), (None, "")]
)
def test_the_table_says_what_was_predicted_before_loading(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, before: float | None, words: str
) -> None:
    plan = {"calibration": {"predicted_before_tok_s": before}}
    metrics = {"generation_tok_s": 99.0, "predicted_tok_s": 100.0}
    Report().result(make_result(metrics=metrics, plan=plan), tmp_path, None)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  predicted"))
    assert ("before loading" in row) is bool(words)
    assert words in row


def test_a_run_that_did_not_finish_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Report().result(make_result(status=RunStatus.KILLED), tmp_path, None)
    assert "(KILLED)" in capsys.readouterr().out
    Report().result(make_result(status=RunStatus.FAILED, repeats=[]), tmp_path, None)
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "throughput" not in out


def test_json_is_whole_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    Report().json({"text": "größer [x]", "long": "x" * 500})
    assert json.loads(capsys.readouterr().out) == {"text": "größer [x]", "long": "x" * 500}
    with pytest.raises(ValueError, match="JSON"):
        Report().json({"bad": float("nan")})


def test_piped_rows_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    Report().rows("", ("key", "value"), [("a", "x " * 200), ("b", "[red]y"), ("c", "ends in \\")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].count("x") == 200
    assert "[red]y" in lines[2]
    assert "ends in \\" in lines[3]


def test_a_run_name_is_text_and_not_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = RunResult(
        run_uuid="u",
        status=RunStatus.FINISHED,
        experiment="e",
        run_name="[/x] [bold]y",
        strategy="accelerate",
        model="m",
        started_at_ms=1,
        metrics={"ttft_s": 0.5},
        repeats=[Repeat(index=0, ended_at_ms=2, metrics={"ttft_s": 0.5})],
    )
    Report().result(result, tmp_path, None)
    assert capsys.readouterr().out.startswith("[/x] [bold]y: median of 1 repeat")


def test_a_piped_table_has_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    Report().rows("", ("a", "b"), [("one", "two"), ("three", "f")])
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert [line for line in lines if line != line.rstrip()] == []
