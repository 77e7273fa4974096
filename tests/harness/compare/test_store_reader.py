"""Results read back out of an MLflow store, after their folders are gone."""

import shutil
from pathlib import Path

import pytest
from benchmark_records import BENCHMARK_UUID, make_benchmark_folder
from compare_records import Tree, leave, leave_many

from flexllmgen.errors import UsageError
from harness.compare.comparison import compare_names
from harness.compare.history import history
from harness.compare.verdict import Mark
from harness.store import Store
from harness.store_reader import StoreReader
from harness.tracking import Tracker


def test_what_was_delivered_can_be_compared_without_its_folders(tree: Tree, store: Store) -> None:
    base = leave_many(tree.results, tree.commits[1], [10.0, 10.1, 10.2, 10.3])
    new = leave_many(tree.results, tree.commits[4], [12.0, 12.1, 12.2, 12.3])
    tracker = Tracker(store)
    ids = {one.run_uuid: tracker.deliver(tree.results / one.run_uuid) for one in (*base, *new)}
    shutil.rmtree(tree.results)
    records = tree.records(lambda: StoreReader(store, tree.warnings.append))
    comparison, _ = compare_names(
        records, ["v1", "HEAD"], strategies=False, metrics=(), fail_on=(), force=False
    )
    rate = comparison.cells[0].metrics[0]
    assert (rate.launches, rate.mark) == ((4, 4), Mark.BETTER)
    for name in (ids[base[2].run_uuid], base[2].run_uuid, tree.commits[1][:7]):
        assert records.select(name).measured[0].result.provenance.git_commit == tree.commits[1]
    chosen = records.select(ids[base[2].run_uuid]).measured
    assert [one.result.run_uuid for one in chosen] == [base[2].run_uuid]
    # What tells machines apart came back too.
    assert chosen[0].hardware["cpu"] == "AMD EPYC"
    assert records.select("@latest").measured[0].result.run_uuid == new[-1].run_uuid
    assert records.select("@latest~4").measured[0].result.run_uuid == base[-1].run_uuid
    (series,) = history(records.everything(), "generation_tok_s", cwd=tree.folder)
    assert [len(point.values) for point in series.points] == [4, 4]
    with pytest.raises(
        UsageError, match=rf"commits with results: {tree.commits[4][:8]} \(4, 1 commit away\)"
    ):
        records.select("HEAD~1")
    with pytest.raises(UsageError, match="no run and no result file"):
        records.select("nonsense")
    assert tree.warnings == []


def test_a_benchmark_by_its_parent_and_by_its_cells(tree: Tree, store: Store) -> None:
    folder = make_benchmark_folder(tree.results, lost=["autoflex-b8"])
    local = {one.name: one for one in tree.records().select("@latest").measured}
    parent = Tracker(store).deliver_benchmark(folder)
    shutil.rmtree(tree.results)
    records = tree.records(lambda: StoreReader(store, tree.warnings.append))
    for name in (parent, BENCHMARK_UUID, "@latest"):
        found = {one.name: one for one in records.select(name).measured}
        assert set(found) == set(local), name
        for cell, one in found.items():
            assert one.baseline == "accelerate-b4"
            assert one.group == BENCHMARK_UUID
            assert one.values("generation_tok_s") == pytest.approx(local[cell].values("generation_tok_s"))
        # Also the one that failed before it could leave a result.
        assert [one.name for one in records.select(name).failed] == ["autoflex-b8"]
    with pytest.raises(UsageError, match=r"commits with results: \w+ \(6\)"):
        records.select("nonsense")
    child = found["flexgen-b8"].run_ids[0]
    assert [one.name for one in records.select(child).measured] == ["flexgen-b8"]
    comparison, _ = compare_names(records, [], strategies=True, metrics=(), fail_on=(), force=False)
    assert len(comparison.cells) == 3


def test_what_is_in_both_counts_once(tree: Tree, store: Store) -> None:
    one = leave(tree.results, tree.commits[1], 10.0)
    Tracker(store).deliver(tree.results / one.run_uuid)
    records = tree.records(lambda: StoreReader(store, tree.warnings.append))
    assert [found.result.run_uuid for found in records.everything()] == [one.run_uuid]
    assert len(records.select("v1").measured) == 1


def test_a_store_that_is_away(tree: Tree, tmp_path: Path) -> None:
    away = Store(tracking_uri="http://127.0.0.1:9", artifact_location=None)
    records = tree.records(lambda: StoreReader(away, tree.warnings.append))
    with pytest.raises(UsageError, match=r"unreachable.*--tracking-uri"):
        records.select("HEAD")
    # What the folder holds does not need it.
    leave(tree.results, tree.commits[4], 10.0)
    assert len(tree.records(lambda: StoreReader(away, tree.warnings.append)).select("HEAD").measured) == 1
    assert len(tree.records(lambda: StoreReader(away, tree.warnings.append)).everything()) == 1
    assert "alone" in tree.warnings[0]
