"""Pictures: drawn from whatever a run left, of the right size, and with something on them."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from harness import pictures
from harness.pictures import draw_memory, draw_plan, draw_token_latency
from harness.results import Repeat, RunResult, RunStatus, Timeline


def make_result(repeats: int = 3, tokens: int = 16, **changes: object) -> RunResult:
    gaps = [[0.1 + 0.001 * (one + token) for token in range(tokens - 1)] for one in range(repeats)]
    fields: dict[str, object] = {
        "run_uuid": "u",
        "status": RunStatus.FINISHED,
        "experiment": "e",
        "run_name": "r",
        "strategy": "accelerate",
        "model": "owner/model",
        "started_at_ms": 1_700_000_000_000,
        "repeats": [
            Repeat(index=one, ended_at_ms=1_700_000_000_000 + one, metrics={"ttft_s": 1.2 + 0.1 * one})
            for one in range(repeats)
        ],
        "itl_s": gaps,
        **changes,
    }
    return RunResult.model_validate(fields)


def make_timeline(seconds: float = 10.0, **series: list[float | None]) -> Timeline:
    times = [0.05 * step for step in range(int(seconds / 0.05))]
    filled: dict[str, list[float | None]] = {
        "rss_bytes": [1e9 + 1e8 * time for time in times],
        "device_allocated_bytes": [None if time < 1 else 2e9 for time in times],
        **series,
    }
    phases = [
        ("load", 0.0, 3.0),
        ("warm-up", 3.0, 4.0),
        *((f"repeat {n}", 3.0 + n, 4.0 + n) for n in range(1, 7)),
    ]
    return Timeline(started_at_ms=0, time_s=times, series=filled, phases=phases)


def inked(path: Path) -> float:
    """Share of pixels that are not background, of a picture of the promised size."""
    pixels = imread(path)
    assert pixels.shape[:2] == (600, 1200)
    return float(np.mean(np.any(pixels[..., :3] < 0.9, axis=-1)))


def test_token_latency_shows_every_repeat(tmp_path: Path) -> None:
    path = draw_token_latency(make_result(), tmp_path / "new" / "latency.png")
    assert inked(path) > 0.03
    fewer = draw_token_latency(make_result(repeats=1), tmp_path / "one.png")
    assert path.read_bytes() != fewer.read_bytes()
    assert sorted(file.name for file in tmp_path.rglob("*.png")) == ["latency.png", "one.png"]


def test_token_latency_compares_with_prediction_and_limit(tmp_path: Path) -> None:
    plain = draw_token_latency(make_result(), tmp_path / "plain.png")
    levels = make_result(metrics={"predicted_tpot_s": 0.09, "limit_tpot_s": 0.05})
    assert draw_token_latency(levels, tmp_path / "levels.png").read_bytes() != plain.read_bytes()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, in order, before they are files."""
    drawn: list[Figure] = []
    save = pictures.save_figure

    def keep(figure: Figure, path: Path, **how: Any) -> Path:
        drawn.append(figure)
        return save(figure, path, **how)

    monkeypatch.setattr(pictures, "save_figure", keep)
    return drawn


@pytest.mark.parametrize("times", [2.0, 3.0, 200.0])
def test_token_latency_far_off_scale_is_told_in_words(
    tmp_path: Path, figures: list[Figure], times: float
) -> None:
    """A prediction of many times what was measured leaves the curve its height."""
    result = make_result(
        itl_s=[[0.1] * 15] * 3, metrics={"predicted_tpot_s": 0.1 * times, "limit_tpot_s": 0.05}
    )
    draw_token_latency(result, tmp_path / "latency.png")
    [legend] = figures[0].legends
    words = [text.get_text() for text in legend.get_texts()]
    far = times > 2.5
    assert any("predicted" in text and "off scale" in text for text in words) is far
    assert "limit: 50 ms" in words
    assert figures[0].axes[1].get_ylim()[1] == pytest.approx(125 if far else 250)


def test_legends_stand_clear_of_the_axes(tmp_path: Path, figures: list[Figure]) -> None:
    levels = make_result(
        params={"cpu_mem": 10**12, "gpu_mem": 10**12},
        metrics={"predicted_tpot_s": 12345.0, "limit_tpot_s": 12345.0},
    )
    for result in (levels, make_result()):
        draw_token_latency(result, tmp_path / "latency.png")
        draw_memory(
            make_timeline(
                device_reserved_bytes=[2.5e9] * 200,
                gpu_0_memory_bytes=[2.9e9] * 200,
                device_allocated_bytes=[2.0e9] * 200,
            ),
            result,
            tmp_path / "memory.png",
        )
    for figure in figures:
        [legend] = figure.legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= 1200
        assert box.y0 >= 0
        for axes in figure.axes:
            assert axes.get_legend() is None
            around = axes.get_tightbbox()
            assert around is not None
            assert not box.overlaps(around)


@pytest.mark.parametrize(
    "result",
    [make_result(repeats=0), make_result(tokens=1), make_result(itl_s=[[0.1], [0.2, 0.3], []])],
    ids=["nothing measured", "one token", "ragged"],
)
def test_token_latency_of_a_broken_off_run(tmp_path: Path, result: RunResult) -> None:
    assert inked(draw_token_latency(result, tmp_path / "latency.png")) > 0.005


def test_memory_shows_curves_and_phases(tmp_path: Path) -> None:
    path = draw_memory(make_timeline(), make_result(), tmp_path / "memory.png")
    assert inked(path) > 0.03


def test_memory_cap_is_drawn_where_it_is_in_view(tmp_path: Path) -> None:
    none = draw_memory(make_timeline(), make_result(), tmp_path / "none.png").read_bytes()
    near = make_result(params={"cpu_mem": 2_500_000_000, "gpu_mem": None})
    far = make_result(params={"cpu_mem": 10**12})
    assert draw_memory(make_timeline(), near, tmp_path / "near.png").read_bytes() != none
    assert draw_memory(make_timeline(), far, tmp_path / "far.png").read_bytes() != none


def test_the_peak_is_the_runs_own_also_between_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    def legend(figure: Figure, **_: object) -> None:
        told.extend(label for axes in figure.axes for label in axes.get_legend_handles_labels()[1])

    monkeypatch.setattr("harness.pictures.draw_legend", legend)
    params = {"cpu_mem": 2**31, "gpu_mem": 2**31}
    for peak_gib in (0.5, 64):
        result = make_result(
            metrics={"peak_rss_bytes": peak_gib * 2**30}, params=params, plan={"device": "cuda"}
        )
        draw_memory(make_timeline(), result, tmp_path / "memory.png")
    assert ["peak 64 GiB" in label for label in told if "RSS" in label] == [False, True]
    assert {"--cpu-mem of model, 2 GiB", "--gpu-mem cap, 2 GiB"} <= set(told)


@pytest.mark.parametrize(
    "timeline",
    [
        Timeline(started_at_ms=0, time_s=[], series={}),
        Timeline(started_at_ms=0, time_s=[0.0], series={"rss_bytes": [1e9]}),
        Timeline(
            started_at_ms=0, time_s=[0.0, 1.0], series={"rss_bytes": [None, None]}, phases=[("load", 0, 0)]
        ),
    ],
    ids=["no samples", "one sample", "no values"],
)
def test_memory_of_a_broken_off_run(tmp_path: Path, timeline: Timeline) -> None:
    assert inked(draw_memory(timeline, make_result(), tmp_path / "memory.png")) > 0.005


PREDICTED = {
    "prefill_s": 4.0,
    "decode_s": 90.0,
    "prefill_bound": "compute",
    "decode_bound": "host to device link",
    "prefill_busy_s": {"compute": 3.9, "host to device link": 1.7, "device to host link": 1.2},
    "decode_busy_s": {"host to device link": 89.0, "compute": 12.0, "device to host link": 0.07, "disk": 0.0},
}


def planned_result() -> RunResult:
    repeats = [
        Repeat(index=one, ended_at_ms=one, metrics={"prefill_s": 4.4 + one, "decode_s": 95.0 + one})
        for one in range(3)
    ]
    limit = {**PREDICTED, "prefill_s": 3.5, "decode_s": 80.0}
    result = make_result(plan={"predicted": PREDICTED, "limit": limit})
    return result.model_copy(update={"repeats": repeats})


def test_the_plan_stands_beside_what_was_measured(tmp_path: Path, figures: list[Figure]) -> None:
    assert inked(draw_plan(planned_result(), tmp_path / "plan.png")) > 0.03
    prefill, decode = figures[0].axes
    rows = [text.get_text() for text in decode.get_yticklabels()]
    assert rows == [
        "measured",
        "predicted",
        "limit",
        "host to device link, binds",
        "compute",
        "device to host link",
    ]
    lengths = [bar.get_width() for bar in decode.patches]
    assert lengths == [96.0, 90.0, 80.0, 89.0, 12.0, 0.07]
    assert [bar.get_width() for bar in prefill.patches][:3] == [5.4, 4.0, 3.5]
    assert [text.get_text() for text in decode.texts][-1] == "70 ms"


@pytest.mark.parametrize(
    "changes",
    [
        {"repeats": []},
        {"plan": {}},
        {"plan": {"predicted": {**PREDICTED, "decode_s": 0.0, "decode_busy_s": {}}}},
    ],
    ids=["nothing measured", "nothing planned", "one token"],
)
def test_the_plan_of_a_broken_off_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = planned_result().model_copy(update=changes)
    assert inked(draw_plan(result, tmp_path / "plan.png")) > 0.005


def test_a_full_disk_leaves_no_half_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw_token_latency(make_result(), tmp_path / "token_latency.png")
    assert not list(tmp_path.iterdir())
