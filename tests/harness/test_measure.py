"""The clock and the metrics, against values worked out by hand."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.measure import (
    Batch,
    BatchTimes,
    Pass,
    mean_itl_by_position,
    median_and_spread,
    metrics_of,
    percentile,
    ratios_to_plan,
    relative_spread,
    run_pass,
)
from strategies.base import Placed


class FakeEngine:
    """Yields columns, telling a fake clock how long each takes."""

    def __init__(
        self, steps_s: list[list[float]], clock: "FakeClock", *, fail_after: int | None = None
    ) -> None:
        self.steps_s = iter(steps_s)
        self.clock = clock
        self.fail_after = fail_after

    def generate(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
    ) -> Iterator[torch.Tensor]:
        for number, step_s in enumerate(next(self.steps_s)):
            if self.fail_after == number:
                raise RuntimeError("broken")
            self.clock.now_s += step_s
            yield torch.full((ids_BT.shape[0],), number)

    def placed(self) -> Placed:
        return Placed(weight_bytes={}, offload_files_bytes=0, pinned_bytes=0)


class FakeClock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def batch(rows: int, length: int, padding: int) -> Batch:
    mask_BT = torch.ones((rows, length), dtype=torch.int64)
    mask_BT[0, :padding] = 0
    return Batch(ids_BT=torch.zeros((rows, length), dtype=torch.int64), mask_BT=mask_BT)


def test_the_metrics_of_a_pass_with_a_ragged_last_batch() -> None:
    clock = FakeClock()
    engine = FakeEngine([[2.0, 0.5, 0.25], [1.0, 0.25, 1.0]], clock)
    seen: list[int] = []
    measured = run_pass(engine, [batch(2, 8, 3), batch(1, 8, 0)], 3, on_column=seen.append, clock=clock)
    assert seen == [2, 2, 2, 1, 1, 1]
    assert measured.output_ids == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    metrics = metrics_of(measured.batches)
    assert metrics == pytest.approx(
        {
            "ttft_s": 1.5,  # median of 2 and 1
            "prefill_s": 3.0,
            "decode_s": 2.0,
            "e2e_s": 5.0,
            "tpot_s": 0.5,  # median of 0.375 and 0.625
            "prefill_tok_s": 21 / 3.0,  # 24 positions, 3 of them padding
            "prefill_padded_tok_s": 24 / 3.0,
            "decode_tok_s": 6 / 2.0,
            "generation_tok_s": 9 / 5.0,
            "input_tokens": 21.0,
            "input_tokens_padded": 3.0,
            "output_tokens": 9.0,
            "itl_p50_s": 0.375,  # of 0.25 0.25 0.5 1.0
            "itl_p90_s": 0.85,
            "itl_p95_s": 0.925,
            "itl_p99_s": 0.985,
        }
    )
    assert mean_itl_by_position(measured.batches) == pytest.approx([0.375, 0.625])


def test_a_single_token_has_no_gap() -> None:
    clock = FakeClock()
    measured = run_pass(FakeEngine([[2.0]], clock), [batch(4, 8, 0)], 1, clock=clock)
    metrics = metrics_of(measured.batches)
    assert not {"tpot_s", "decode_tok_s", "itl_p50_s"} & set(metrics)
    assert (metrics["ttft_s"], metrics["e2e_s"], metrics["generation_tok_s"]) == (2.0, 2.0, 2.0)
    assert metrics["decode_s"] == 0
    assert mean_itl_by_position(measured.batches) == []


def test_time_between_batches_is_nobodys() -> None:
    """e2e counts what the engine took; preparing the next batch is not its work."""
    times = [
        BatchTimes(
            sequences=1, real_tokens=1, padded_tokens=0, started_s=start, arrived_s=(start + 1, start + 2)
        )
        for start in (0.0, 50.0)
    ]
    assert metrics_of(times)["e2e_s"] == 4.0


def test_a_pass_cut_short_keeps_what_came() -> None:
    clock = FakeClock()
    engine = FakeEngine([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], clock)
    seen = 0

    def stop_in_the_second_batch(tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt

    measured = Pass()
    with pytest.raises(KeyboardInterrupt):
        run_pass(
            engine,
            [batch(2, 4, 0), batch(2, 4, 0)],
            3,
            into=measured,
            on_column=stop_in_the_second_batch,
            clock=clock,
        )
    assert [len(one.arrived_s) for one in measured.batches] == [3, 2]
    assert measured.output_ids == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]
    assert metrics_of(measured.batches)["output_tokens"] == 10


def test_an_engine_that_breaks_before_its_first_token_leaves_no_batch() -> None:
    clock = FakeClock()
    measured = Pass()
    with pytest.raises(RuntimeError, match="broken"):
        run_pass(FakeEngine([[1.0]], clock, fail_after=0), [batch(2, 4, 0)], 1, into=measured, clock=clock)
    assert measured.batches == []


@pytest.mark.parametrize("columns", [2, 4])
def test_an_engine_that_miscounts_is_an_error(columns: int) -> None:
    clock = FakeClock()
    with pytest.raises(RuntimeError, match=f"{columns} token columns, 3 were asked"):
        run_pass(FakeEngine([[1.0] * columns], clock), [batch(1, 4, 0)], 3, clock=clock)


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([1.0, 2.0, 4.0], 0) == 1.0
    assert percentile([1.0, 2.0, 4.0], 100) == 4.0
    assert percentile([1.0, 2.0, 4.0], 75) == 3.0


def test_median_and_spread_over_repeats() -> None:
    repeats = [{"ttft_s": value, "output_tokens": 8.0, "zero": 0.0} for value in (1.0, 4.0, 2.0)]
    medians, spreads = median_and_spread(repeats)
    assert medians == {"ttft_s": 2.0, "output_tokens": 8.0, "zero": 0.0}
    assert spreads == {"ttft_s": 1.5}
    assert median_and_spread(repeats[:1])[1] == {}


def test_the_clock_costs_far_less_than_one_percent_of_a_step(
    tiny_step_s: float, record_property: Callable[[str, object], None]
) -> None:
    """What timing a column costs, beside the fastest step of a real model that these tests run."""
    columns = 2000

    class Instant(FakeEngine):
        def generate(
            self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
        ) -> Iterator[torch.Tensor]:
            column_B = ids_BT[:, 0]
            for _ in range(gen_tokens):
                yield column_B

    def cost_s() -> float:
        started = time.perf_counter()
        run_pass(Instant([], FakeClock()), [batch(8, 4, 0)], columns)
        return (time.perf_counter() - started) / columns

    per_column_s = min(cost_s() for _ in range(5))
    shown = f"{per_column_s * 1e6:.2f} us a column, a step takes {tiny_step_s * 1e3:.2f} ms"
    record_property("clock_cost", shown)
    assert per_column_s < 0.01 * tiny_step_s, shown


@pytest.fixture(scope="module")
def tiny_step_s(builtin_model: Path) -> float:
    """The fastest decode step of the built-in model: one sequence, a short context."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin_model, dtype=torch.float32)
    ids_BT = torch.tensor([[1]])
    times = []
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            model(ids_BT)
            times.append(time.perf_counter() - started)
    return min(times)


def test_spread() -> None:
    assert relative_spread([9.0, 10.0, 11.0]) == pytest.approx(0.2)
    assert relative_spread([9.0]) is None
    assert relative_spread([0.0, 0.0]) is None


def test_ratios_are_of_what_is_known() -> None:
    metrics = {"generation_tok_s": 8.0, "predicted_tok_s": 10.0, "limit_tok_s": 16.0}
    assert ratios_to_plan(metrics) == {"prediction_error": 0.25, "attainment": 0.5}
    assert ratios_to_plan({**metrics, "generation_tok_s": 0.0}) == {}
    assert ratios_to_plan({"generation_tok_s": 8.0}) == {}
