"""Two commits held side by side, from result folders to verdicts, text and exit code."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from benchmark_records import make_benchmark_folder
from compare_records import HARDWARE, POLICY, WORKLOAD, Tree, leave, leave_failed, leave_many

from flexllmgen.errors import UsageError
from harness.compare.comparison import compare_names
from harness.compare.verdict import Comparison, Mark, direction, parse_gate
from harness.compare.view import as_markdown, as_text, share_text, value_text, verdict

SLOW, FAST = (10.0, 10.1, 10.2, 10.3), (12.0, 12.1, 12.2, 12.3)


def compared(
    tree: Tree, *names: str, fail_on: Sequence[str] = (), **options: Any
) -> tuple[Comparison, list[str]]:
    defaults: dict[str, Any] = {"strategies": False, "metrics": (), "force": False}
    return compare_names(tree.records(), names, fail_on=fail_on, **{**defaults, **options})


@pytest.fixture
def faster(tree: Tree) -> Tree:
    """Four launches at v1, and four of the tip that are faster."""
    leave_many(tree.results, tree.commits[1], SLOW)
    leave_many(tree.results, tree.commits[4], FAST)
    return tree


def test_four_launches_a_side_give_a_verdict(faster: Tree) -> None:
    comparison, failed = compared(faster, "v1", "trunk")
    assert failed == []
    assert comparison.unpaired == ()
    (cell,) = comparison.cells
    by_name = {one.metric: one for one in cell.metrics}
    assert list(by_name) == ["generation_tok_s", "ttft_s", "tpot_s", "peak_rss_bytes"]
    rate = by_name["generation_tok_s"]
    assert (rate.base, rate.new) == (pytest.approx(10.15), pytest.approx(12.15))
    assert rate.launches == (4, 4)
    assert rate.change.p == pytest.approx(2 / 70)
    assert rate.change.low == pytest.approx(12.0 / 10.3 - 1)
    # Higher is better of a rate, lower of a time; equal is no change.
    assert [one.mark for one in cell.metrics] == [Mark.BETTER, Mark.BETTER, Mark.BETTER, Mark.SAME]


def test_parity_is_compared_although_no_single_launch_has_it(tree: Tree) -> None:
    make_benchmark_folder(tree.results)
    comparison, failed = compared(tree, strategies=True, metrics=["parity"], fail_on=["parity:1%"])
    by_label = {cell.label.split()[0]: cell.metrics[0] for cell in comparison.cells}
    assert (by_label["flexgen"].new, by_label["autoflex"].new) == (1.0, 0.875)
    assert len(failed) == 2
    assert all("autoflex" in line for line in failed)


LOSSY = {"policy": {**POLICY, "weight_bits": 4, "kv_bits": None}, "lossless": False}


def lossy_changes(**metrics: float) -> dict[str, Any]:
    """What a lossy run has beside a lossless one."""
    return {
        "plan": LOSSY,
        "params": {
            "strategy": "flexgen",
            "model": "owner/tiny",
            "batch_size": 4,
            "device": "cpu",
            "weights": "pretrained",
            "overlap": 1,
            "lossy": True,
        },
        "param_sources": {"lossy": "the plan"},
        "metrics": {"generation_tok_s": 20.0, **metrics},
    }


def test_a_lossy_setup_is_another_setup(tree: Tree) -> None:
    leave_many(tree.results, tree.commits[1], SLOW)
    leave(tree.results, tree.commits[4], 20.0, **lossy_changes())
    with pytest.raises(UsageError, match=r"two different setups: .*lossy unset against true"):
        compared(tree, "v1", "trunk")
    comparison, _ = compared(tree, "v1", "trunk", force=True)
    text = as_text(comparison, 200)
    assert "not the same output: base is lossless, new is lossy (weights in 4 bits)" in text
    assert comparison.as_dict()["cells"][0]["lossy"] == [None, "weights in 4 bits"]


def test_lossy_setups_are_compared_in_quality_too(tree: Tree) -> None:
    better = {"perplexity_ratio": 1.02, "token_match_share": 0.9}
    worse = {"perplexity_ratio": 1.05, "token_match_share": 0.8}
    for commit, found in ((1, better), (4, worse)):
        for rate in SLOW:
            leave(tree.results, tree.commits[commit], rate, **lossy_changes(**found))
    comparison, failed = compared(
        tree, "v1", "trunk", fail_on=["perplexity_ratio:1%", "token_match_share:5%"]
    )
    (cell,) = comparison.cells
    marks = {one.metric: one.mark for one in cell.metrics}
    assert (marks["perplexity_ratio"], marks["token_match_share"]) == (Mark.WORSE, Mark.WORSE)
    assert len(failed) == 2
    assert "both are lossy (weights in 4 bits)" in as_text(comparison, 200)


def test_swapped_sides_mirror_the_verdict(faster: Tree) -> None:
    (cell,) = compared(faster, "trunk", "v1")[0].cells
    assert [one.mark for one in cell.metrics] == [Mark.WORSE, Mark.WORSE, Mark.WORSE, Mark.SAME]


def test_a_commit_against_itself_never_differs(faster: Tree) -> None:
    comparison, failed = compared(faster, "HEAD", "HEAD", fail_on=["generation_tok_s:0%", "ttft_s:0%"])
    assert failed == []
    assert {one.mark for one in comparison.cells[0].metrics} == {Mark.SAME}


def test_too_few_launches_give_no_verdict_but_the_spread_of_the_repeats(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10.0)
    leave(tree.results, tree.commits[1], 20.0)
    comparison, _ = compared(tree, "HEAD~4", "HEAD~3")
    rate = comparison.cells[0].metrics[0]
    assert rate.mark is Mark.UNKNOWN
    assert rate.change.change == pytest.approx(1.0)
    assert rate.change.p is None
    assert rate.spreads == (pytest.approx(0.005), pytest.approx(0.005))
    assert verdict(comparison) == (
        "verdict: none; 1 against 1 launch cannot tell, 4 against 4 can (harness benchmark --launches 4)"
    )


@pytest.mark.parametrize(
    ("base", "new", "gate", "fails"),
    [
        (FAST, SLOW, "generation_tok_s:5%", True),
        (FAST, SLOW, "generation_tok_s:50%", False),
        (SLOW, FAST, "generation_tok_s:5%", False),
        (FAST, SLOW, "ttft_s:5", True),
        # Worse by more than 5 % in the middle, but not significantly.
        ((9.0, 11.0, 12.0, 13.0), (8.0, 10.2, 10.4, 14.0), "generation_tok_s:5%", False),
        # Significant, but by less than what is allowed.
        ((10.00, 10.01, 10.02, 10.03), (9.90, 9.91, 9.92, 9.93), "generation_tok_s:5%", False),
        # Too few to test: by how much is all there is.
        ((12.0,), (10.0,), "generation_tok_s:5%", True),
        ((12.0,), (11.9,), "generation_tok_s:5%", False),
        ((10.0,), (12.0,), "generation_tok_s:0%", False),
    ],
)
def test_fail_on(tree: Tree, base: Sequence[float], new: Sequence[float], gate: str, fails: bool) -> None:
    leave_many(tree.results, tree.commits[0], base)
    leave_many(tree.results, tree.commits[1], new)
    _, failed = compared(tree, "HEAD~4", "HEAD~3", fail_on=[gate])
    assert bool(failed) == fails


def test_a_setup_that_fails_now_fails_the_check(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, tree.commits[0], 10, workload_key="other")
    leave(tree.results, tree.commits[1], 10)
    leave_failed(tree.results, tree.commits[1], "out of memory", workload_key="other")
    comparison, failed = compared(tree, "HEAD~4", "HEAD~3", fail_on=["generation_tok_s:5%"])
    assert "failed there: out of memory" in comparison.unpaired[0].reason
    assert len(failed) == 1
    assert compared(tree, "HEAD~4", "HEAD~3")[1] == []


@pytest.mark.parametrize("text", ["generation_tok_s", "ttft_s:x%", ":5%", "predicted_tok_s:5%", "ttft_s:-5%"])
def test_a_check_that_is_none_is_a_mistake(faster: Tree, text: str) -> None:
    with pytest.raises(UsageError, match="--fail-on"):
        compared(faster, "v1", "HEAD", fail_on=[text])


def test_a_metric_that_no_run_has_is_a_mistake(faster: Tree) -> None:
    with pytest.raises(UsageError, match="no metric 'generation_toks'; there are generation_tok_s"):
        compared(faster, "v1", "HEAD", metrics=["generation_toks"])
    with pytest.raises(UsageError, match="no metric 'energy_j'"):
        compared(faster, "v1", "HEAD", fail_on=["energy_j:5%"])


def test_another_machine_is_refused_with_what_differs(tree: Tree) -> None:
    gpu = {"name": "NVIDIA H200", "memory_bytes": 139 << 30}
    leave(tree.results, tree.commits[0], 10)
    leave(
        tree.results, tree.commits[1], 20, hardware={**HARDWARE, "gpus": [gpu], "logical_cores": 16}, fingerprint="beef",
        origin={"versions": {"torch": "2.14.0"}},
    )  # fmt: skip
    with pytest.raises(UsageError) as caught:
        compared(tree, "HEAD~4", "HEAD~3")
    for words in (
        "GPU none against NVIDIA H200",
        "cores 2 against 16",
        "torch 2.13.0 against 2.14.0",
        "--force",
    ):
        assert words in str(caught.value)
    assert "memory 24" not in str(caught.value)
    (cell,) = compared(tree, "HEAD~4", "HEAD~3", force=True)[0].cells
    assert cell.differs["GPU"][0] == "none"


def test_machines_that_left_no_profile_are_told_apart_by_fingerprint(tree: Tree) -> None:
    for sha, fingerprint in ((tree.commits[0], "aaaa"), (tree.commits[1], "bbbb")):
        one = leave(tree.results, sha, 10, fingerprint=fingerprint)
        (tree.results / one.run_uuid / "hardware_profile.json").write_text("{")
    with pytest.raises(UsageError, match="fingerprint aaaa against bbbb"):
        compared(tree, "HEAD~4", "HEAD~3")


def test_of_two_machines_the_same_is_chosen(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, tree.commits[1], 99, fingerprint="beef")
    leave(tree.results, tree.commits[1], 11)
    comparison, _ = compared(tree, "HEAD~4", "HEAD~3")
    assert comparison.cells[0].metrics[0].new == 11
    assert len(comparison.cells) == 1


def test_setups_are_paired_by_what_was_asked_for(tree: Tree) -> None:
    for sha in tree.commits[:2]:
        for batch, cap in ((4, None), (8, None), (4, 1 << 30)):
            base = leave(tree.results, sha, 10.0 + batch).params
            params = {
                **base,
                "batch_size": batch,
                "gpu_mem": cap,
                "results_dir": sha,
                "policy_overlap": batch,
            }
            leave(tree.results, sha, 10.0 * batch, params=params, param_sources={})
    leave(tree.results, tree.commits[1], 1, strategy="accelerate")
    comparison, _ = compared(tree, "HEAD~4", "HEAD~3")
    assert len(comparison.cells) == 3
    assert all(one.metrics[0].base == one.metrics[0].new for one in comparison.cells)
    (alone,) = comparison.unpaired
    assert (alone.side, alone.reason) == ("new", "no such run there")


def test_caps_that_differ_are_told_as_sizes(tree: Tree) -> None:
    params = dict(leave(tree.results, tree.commits[0], 10).params)
    leave(tree.results, tree.commits[1], 11, params={**params, "gpu_mem": 1 << 30}, param_sources={})
    with pytest.raises(UsageError, match=r"gpu_mem unset against 1\.00GiB"):
        compared(tree, "HEAD~4", "HEAD~3")


def test_many_setups_without_a_counterpart_are_counted(tree: Tree) -> None:
    for number in range(3):
        leave(tree.results, tree.commits[0], 10, workload_key=f"tiny/base{number}")
    leave(tree.results, tree.commits[1], 11, workload_key="tiny/new")
    with pytest.raises(
        UsageError, match=r"no setup is on both sides: .*base0.*base1.*; and 2 more; run the same"
    ):
        compared(tree, "HEAD~4", "HEAD~3")


def test_a_key_that_the_older_code_lacks_counts_unless_it_is_at_its_default(tree: Tree) -> None:
    params = dict(leave(tree.results, tree.commits[0], 10).params)
    newer, sources = {**params, "new_key": 1}, {"new_key": "default (flexgen.toml)"}
    leave(tree.results, tree.commits[1], 11, params=newer, param_sources=sources)
    leave(tree.results, tree.commits[2], 12, params=newer, param_sources={"new_key": "option --set"})
    assert len(compared(tree, "HEAD~4", "HEAD~3")[0].cells) == 1
    with pytest.raises(UsageError, match="new_key unset against 1"):
        compared(tree, "HEAD~4", "HEAD~2")
    assert compared(tree, "HEAD~4", "HEAD~2", force=True)[0].cells[0].differs == {"new_key": ("unset", "1")}


def test_the_nearest_setup_is_named(tree: Tree) -> None:
    params = leave(tree.results, tree.commits[0], 10).params
    leave(tree.results, tree.commits[1], 10)
    leave(tree.results, tree.commits[1], 10, params={**params, "overlap": 2})
    (alone,) = compared(tree, "HEAD~4", "HEAD~3")[0].unpaired
    assert alone.reason == "the nearest there has overlap 1 against 2"


def test_the_plan_or_its_execution(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, tree.commits[1], 10)
    shares = {"weights": {"gpu": 80.0, "cpu": 20.0, "disk": 0.0}}
    leave(tree.results, tree.commits[2], 10, plan={"policy": {**POLICY, "overlap": 2}, "shares": shares})
    leave(tree.results, tree.commits[3], 10, plan={})
    same = compared(tree, "HEAD~4", "HEAD~3")[0].cells[0].plan
    assert str(same) == "the same plan: what changed is its execution"
    other = compared(tree, "HEAD~4", "HEAD~2")[0].cells[0].plan
    assert other is not None
    assert other.changed == {
        "policy.overlap": ("1", "2"),
        "shares.weights.gpu": ("100", "80"),
        "shares.weights.cpu": ("0", "20"),
    }
    assert str(compared(tree, "HEAD~4", "HEAD~1")[0].cells[0].plan) == "plan unknown"


def test_two_names_of_the_same_results_are_told_of(faster: Tree) -> None:
    comparison, failed = compared(faster, "trunk", "HEAD", fail_on=["generation_tok_s:1%"])
    assert failed == []
    assert str(comparison.cells[0].plan) == "the same runs"
    (told,) = faster.warnings
    assert told.startswith("trunk and HEAD stand for the same results")
    compared(faster, "v1", "HEAD")
    assert len(faster.warnings) == 1


def test_versions_that_differ_are_told(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, tree.commits[1], 10, origin={"versions": {"torch": "2.14.0"}})
    leave(tree.results, tree.commits[2], 10, origin={"versions_digest": "1" * 16})
    assert compared(tree, "HEAD~4", "HEAD~3")[0].cells[0].versions == {"torch": ("2.13.0", "2.14.0")}
    assert compared(tree, "HEAD~4", "HEAD~2")[0].cells[0].versions == {"other packages": ("0" * 8, "1" * 8)}


def test_threads_that_the_environment_took_away_are_told(tree: Tree) -> None:
    for sha, threads in zip(tree.commits, (2, 1), strict=False):
        one = leave(tree.results, sha, 10)
        profile = {"hardware": HARDWARE, "threads": threads}
        (tree.results / one.run_uuid / "hardware_profile.json").write_text(json.dumps(profile))
    comparison, _ = compared(tree, "HEAD~4", "HEAD~3")
    assert comparison.cells[0].versions == {"torch threads": ("2", "1")}
    assert "what differs around it: torch threads 2 -> 1" in as_text(comparison, 80)


def test_strategies_of_a_benchmark_against_its_baseline(tree: Tree) -> None:
    make_benchmark_folder(tree.results, failed=["autoflex-b8"])
    comparison, _ = compared(tree, strategies=True)
    assert comparison.base[0] == "accelerate"
    pairs = [(one.against.split()[0], one.label.split()[0]) for one in comparison.cells]
    assert pairs == [("accelerate", "flexgen"), ("accelerate", "autoflex"), ("accelerate", "flexgen")]
    for cell in comparison.cells:
        assert cell.plan is None
        assert ("batch_size=8" in cell.label) == ("batch_size=8" in cell.against)
        rate = cell.metrics[0]
        assert rate.launches == (2, 2)
        assert rate.change.change is not None
        assert rate.change.change > 0.2
    with pytest.raises(UsageError, match="name one, or none"):
        compared(tree, "@latest", "@latest~1", strategies=True)


def test_strategies_of_runs_of_their_own(tree: Tree) -> None:
    for strategy, rate in (("flexgen", 12.0), ("accelerate", 10.0)):
        leave_many(
            tree.results, tree.commits[0], [rate, rate * 1.01, rate * 1.02, rate * 1.03], strategy=strategy
        )
    (cell,) = compared(tree, "HEAD~4", strategies=True)[0].cells
    assert cell.label.startswith("flexgen")
    assert cell.metrics[0].mark is Mark.BETTER
    with pytest.raises(UsageError, match="no two strategies"):
        compared(tree, "@latest", strategies=True)


def test_one_name_is_not_enough(faster: Tree) -> None:
    with pytest.raises(UsageError, match="A and B"):
        compared(faster, "HEAD")


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_the_terminal(faster: Tree, width: int) -> None:
    text = as_text(compared(faster, "v1", "trunk", metrics=["generation_tok_s", "peak_rss_bytes"])[0], width)
    assert max(map(len, text.splitlines())) <= width
    row = next(line for line in text.splitlines() if line.startswith("generation_tok_s")).split()
    assert row == ["generation_tok_s", "10.15", "12.15", "+19.7%", "+16.5%", "+23.0%", "0.029", "better"]
    assert f"base  v1: {faster.commits[1][:8]} Second (4 results)" in text
    assert f"flexgen {WORKLOAD} batch_size=4" in text
    assert text.splitlines()[-1] == "verdict: generation_tok_s better (+19.7%), peak_rss_bytes unchanged (~)"


def test_long_names_of_metrics_are_cut_before_figures_are(tree: Tree) -> None:
    for sha in tree.commits[:2]:
        for rate in SLOW:
            metrics = {
                "peak_device_allocated_bytes": 123456789012.0 + rate,
                "some_very_long_name_of_a_metric_s": rate,
            }
            leave(tree.results, sha, rate, metrics=metrics)
    text = as_text(
        compared(
            tree,
            "HEAD~4",
            "HEAD~3",
            metrics=["peak_device_allocated_bytes", "some_very_long_name_of_a_metric_s"],
        )[0],
        80,
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "114.98 GiB" in text


def test_markdown_is_a_table(faster: Tree) -> None:
    text = as_markdown(compared(faster, "v1", "HEAD")[0])
    assert "| metric | base | new | change | 95% interval | p | verdict |" in text
    assert "| generation_tok_s | 10.15 | 12.15 | +19.7% | +16.5% +23.0% | 0.029 | better |" in text


def test_several_setups_are_counted(tree: Tree) -> None:
    for sha, rates in ((tree.commits[0], SLOW), (tree.commits[1], FAST)):
        leave_many(tree.results, sha, rates)
        leave_many(tree.results, sha, SLOW, workload_key="other")
    assert verdict(compared(tree, "HEAD~4", "HEAD~3", metrics=["generation_tok_s"])[0]) == (
        "verdict: generation_tok_s 1 better / 1 unchanged (~)"
    )


def test_directions_and_readings() -> None:
    lower = ("ttft_s", "load_s", "peak_rss_bytes", "energy_j", "energy_j_per_token")
    assert {direction(one) for one in lower} == {-1}
    assert {direction(one) for one in ("generation_tok_s", "attainment")} == {1}
    assert {
        direction(one) for one in ("limit_tok_s", "predicted_peak_gpu_bytes", "repeats", "input_tokens")
    } == {None}
    assert parse_gate("ttft_s:2.5%").share == pytest.approx(0.025)
    assert [value_text("ttft_s", 0.0123), value_text("e2e_s", 75.0)] == ["12.30 ms", "75.00 s"]
    assert [share_text(one) for one in (0.0, -0.0001, 12.0)] == ["0.0%", "0.0%", "x13"]


def test_the_command(faster: Tree, harness: Callable[..., Any]) -> None:
    done = harness("compare", "v1", "HEAD", "--json", "--fail-on", "generation_tok_s:5%", cwd=faster.folder)
    assert (done.code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["cells"][0]["metrics"]["generation_tok_s"]["verdict"] == "better"
    assert told["failures"] == []
    back = harness("compare", "HEAD", "v1", "--fail-on", "generation_tok_s:5%", cwd=faster.folder)
    assert back.code == 3
    assert "verdict: generation_tok_s worse" in back.stdout
    assert len(back.errors) == 1
    assert "generation_tok_s is worse by 16.5% (significantly), allowed are 5.0%" in back.errors[0]
    assert not (faster.folder / "mlruns").exists()


def test_a_mistake_is_one_line(faster: Tree, harness: Callable[..., Any]) -> None:
    for arguments in (
        ("HEAD~1", "HEAD"),
        ("HEAD",),
        ("v1", "HEAD", "--json", "--markdown"),
        ("v1", "HEAD", "--metric", "x"),
    ):
        done = harness("compare", *arguments, cwd=faster.folder)
        assert (done.code, len(done.stderr.splitlines()), done.stdout) == (2, 1, ""), done.stderr
