"""What a name stands for: in a real repository, among result folders."""

import json
from pathlib import Path

import pytest
from benchmark_records import BENCHMARK_UUID, make_benchmark_folder
from compare_records import Tree, commit, leave, leave_failed, leave_many

from flexllmgen.errors import UsageError
from harness.results import RunResult, RunStatus


def uuids(tree: Tree, name: str) -> list[str]:
    return [one.result.run_uuid for one in tree.records().select(name).measured]


def test_every_way_to_name_a_commit(tree: Tree) -> None:
    first = leave(tree.results, tree.commits[1], 10).run_uuid
    second = leave_many(tree.results, tree.commits[3], [11, 12])
    sha = tree.commits[1]
    for name in (sha, sha[:7], "v1", "HEAD~3", "trunk~3"):
        assert uuids(tree, name) == [first], name
    for name in ("feature", "HEAD~1"):
        assert uuids(tree, name) == [one.run_uuid for one in second], name


def test_a_commit_that_this_repository_does_not_hold_is_found_by_its_digits(tree: Tree) -> None:
    foreign = leave(tree.results, "feedbeef" * 5, 10).run_uuid
    assert uuids(tree, "feedbeef") == [foreign]
    leave(tree.results, "feedbee0" * 5, 10)
    with pytest.raises(UsageError, match="begins several commits"):
        uuids(tree, "feedbee")


def test_the_title_says_what_a_name_came_to(tree: Tree) -> None:
    leave(tree.results, tree.commits[1], 10)
    assert tree.records().select("v1").title == f"{tree.commits[1][:8]} Second"


def test_run_ids_of_ours_and_of_mlflow(tree: Tree) -> None:
    one = leave(tree.results, tree.commits[0], 10).run_uuid
    leave(tree.results, tree.commits[0], 11)
    (tree.results / one / ".delivered.json").write_text(json.dumps({"run_id": "ab" * 16}))
    assert uuids(tree, one) == [one]
    assert uuids(tree, "ab" * 16) == [one]


def test_run_ids_by_their_first_digits(tree: Tree) -> None:
    one, other = leave(tree.results, tree.commits[0], 10), leave(tree.results, tree.commits[0], 11)
    for run, run_id in ((one, "ab12cd34" * 4), (other, "ab12cd35" * 4)):
        (tree.results / run.run_uuid / ".delivered.json").write_text(json.dumps({"run_id": run_id}))
    assert uuids(tree, "ab12cd34") == [one.run_uuid]
    assert uuids(tree, "ab12cd35ab") == [other.run_uuid]
    with pytest.raises(UsageError, match="begins the ids of several runs"):
        uuids(tree, one.run_uuid[:20])
    with pytest.raises(UsageError, match="no results of ab12cd3"):
        uuids(tree, "ab12cd3")


def test_the_latest_and_those_before(tree: Tree) -> None:
    oldest = leave(tree.results, tree.commits[4], 10, strategy="accelerate").run_uuid
    middle = leave(tree.results, tree.commits[0], 10).run_uuid
    newest = leave(tree.results, None, 10).run_uuid
    leave(tree.results, None, 10, status=RunStatus.RUNNING)
    leave_failed(tree.results, None, "no memory")
    assert uuids(tree, "@latest") == [newest]
    assert uuids(tree, "@latest~1") == [middle]
    assert uuids(tree, "@latest:accelerate") == [oldest]
    assert uuids(tree, "@latest:flexgen~1") == uuids(tree, "@latest~1:flexgen") == [middle]
    with pytest.raises(UsageError, match="there are 3 finished runs and benchmarks of accelerate, flexgen"):
        uuids(tree, "@latest~3")
    with pytest.raises(UsageError, match="only latest"):
        uuids(tree, "@newest")


def test_a_benchmark_counts_as_one_and_has_its_cells(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10, started_at_ms=1)
    folder = make_benchmark_folder(tree.results)
    for name in ("@latest", BENCHMARK_UUID, str(folder), str(folder / "benchmark.json")):
        chosen = tree.records().select(name)
        assert len(chosen.measured) == 6, name
        assert {one.baseline for one in chosen.measured} == {"accelerate-b4"}
        assert {len(one.launches) for one in chosen.measured} == {2}
        assert all(len(one.values("generation_tok_s")) == 2 for one in chosen.measured)
    assert len(uuids(tree, "@latest:flexgen")) == 2
    assert len(uuids(tree, "@latest~1")) == 1
    assert uuids(tree, f"{BENCHMARK_UUID}-flexgen-b4") == [f"{BENCHMARK_UUID}-flexgen-b4"]


def test_a_cell_that_failed_last_belongs_to_its_benchmark(tree: Tree) -> None:
    folder = make_benchmark_folder(tree.results, failed=["autoflex-b8"])
    late = RunResult.read(folder / "cells" / "autoflex-b8")
    late.model_copy(update={"started_at_ms": late.started_at_ms + 10**6}).write(
        folder / "cells" / "autoflex-b8"
    )
    chosen = tree.records().select("@latest")
    assert len(chosen.measured) == 5
    assert [one.name for one in chosen.failed] == ["autoflex-b8"]


def test_launches_without_their_own_folders_are_told_apart_by_their_repeats(tree: Tree) -> None:
    make_benchmark_folder(tree.results)
    whole = tree.records().select("@latest").measured[0].values("ttft_s")
    make_benchmark_folder(tree.results, launch_folders=False)
    for launch in (tree.results / BENCHMARK_UUID).glob("cells/*/launches/*/result.json"):
        launch.unlink()
    merged = tree.records().select("@latest").measured[0]
    assert len(merged.launches) == 1
    assert merged.values("ttft_s") == pytest.approx(whole)
    # What a process has once is known of all launches together only.
    assert len(merged.values("load_s")) <= 1


def test_result_files_and_folders(tree: Tree, tmp_path: Path) -> None:
    one = leave(tree.results, tree.commits[0], 10).run_uuid
    leave(tree.results, tree.commits[0], 11)
    copied = tmp_path / "base.json"
    copied.write_bytes((tree.results / one / "result.json").read_bytes())
    for path in (tree.results / one, tree.results / one / "result.json", copied):
        assert uuids(tree, str(path)) == [one]
    with pytest.raises(UsageError, match="holds several results"):
        uuids(tree, str(tree.results))
    copied.write_text('{"schema_version": 99}')
    with pytest.raises(UsageError, match="is not a result of schema version"):
        uuids(tree, str(copied))


def test_dirty_trees_are_commits_of_their_own(tree: Tree) -> None:
    sha = tree.commits[4]
    clean = leave(tree.results, sha, 10).run_uuid
    one = leave(tree.results, sha, 11, origin={"git_dirty": True, "patch_digest": "1111aaaa"}).run_uuid
    assert uuids(tree, "HEAD") == [clean]
    assert uuids(tree, "HEAD+dirty") == [one]
    two = leave(tree.results, sha, 12, origin={"git_dirty": True, "patch_digest": "2222bbbb"}).run_uuid
    assert uuids(tree, "HEAD+dirty.22") == [two]
    with pytest.raises(UsageError, match=r"several dirty states: name one of .*\.1111aaaa, .*\.2222bbbb"):
        uuids(tree, "HEAD+dirty")


def test_an_older_record_of_a_dirty_tree_has_its_patch(tree: Tree) -> None:
    for text in ("-one\n+two\n", "-one\n+three\n"):
        one = leave(tree.results, tree.commits[4], 11, origin={"git_dirty": True})
        (tree.results / one.run_uuid / "git.diff").write_text(text)
    with pytest.raises(UsageError, match="several dirty states"):
        uuids(tree, "HEAD+dirty")


def test_a_commit_with_dirty_results_only_says_so(tree: Tree) -> None:
    leave(tree.results, tree.commits[4], 10, origin={"git_dirty": True, "patch_digest": "1111aaaa"})
    with pytest.raises(
        UsageError, match=r"no results of HEAD .* from a clean tree; it has results of .*\+dirty\.1111aaaa"
    ):
        uuids(tree, "HEAD")


def test_an_unknown_name_lists_what_there_is(tree: Tree) -> None:
    with pytest.raises(UsageError, match="no results of any commit: run `harness eval`"):
        uuids(tree, "HEAD")
    leave(tree.results, tree.commits[0], 10)
    leave_many(tree.results, tree.commits[2], [10, 11])
    with pytest.raises(UsageError) as caught:
        uuids(tree, "HEAD")
    message = str(caught.value)
    assert "\n" not in message
    # The nearest first.
    near, far = f"{tree.commits[2][:8]} (2, 2 commits away)", f"{tree.commits[0][:8]} (1, 4 commits away)"
    assert f"{near}, {far}" in message
    with pytest.raises(UsageError, match=r"'nonsense' is no commit.*commits with results: "):
        uuids(tree, "nonsense")
    assert commit(tree.folder, "Sixth") not in message


def test_a_commit_whose_runs_all_failed_says_why(tree: Tree) -> None:
    leave_failed(tree.results, tree.commits[4], "host memory ran out")
    with pytest.raises(UsageError, match=r"no run that finished.*host memory ran out"):
        uuids(tree, "HEAD")


def test_what_cannot_be_read_costs_a_warning(tree: Tree) -> None:
    good = leave(tree.results, tree.commits[4], 10).run_uuid
    (tree.results / "newer").mkdir()
    (tree.results / "newer" / "result.json").write_text('{"schema_version": 99}')
    assert uuids(tree, "HEAD") == [good]
    assert "newer" in tree.warnings[0]


@pytest.mark.parametrize(
    "name", ["", "-n", "--force", "@", "~1", "a b", "HEAD:code.py", "né", "*", "a" * 5000]
)
def test_odd_names_are_mistakes_of_one_line(tree: Tree, name: str) -> None:
    leave(tree.results, tree.commits[4], 10)
    with pytest.raises(UsageError) as caught:
        uuids(tree, name)
    assert "\n" not in str(caught.value)
