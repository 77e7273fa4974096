"""Provenance: the commit and changes of a working directory, and processes told apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import provenance
from harness.provenance import (
    collect_provenance,
    environment_freeze,
    git_diff,
    process_identity,
    process_is_alive,
    without_credentials,
)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "code.py").write_text("one = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "First")
    return folder


def test_clean_tree_has_commit_branch_and_no_diff(repository: Path) -> None:
    found = collect_provenance(repository, ["harness", "eval", "--run-name", "two words"])
    assert found.git_commit == git(repository, "rev-parse", "HEAD")
    assert found.git_branch == "trunk"
    assert found.git_dirty is False
    assert found.command == "harness eval --run-name 'two words'"
    assert found.host
    assert found.versions["python"]
    assert found.versions["torch"]
    assert git_diff(repository) is None


def test_detached_head_has_a_commit_and_no_branch(repository: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    found = collect_provenance(repository, [])
    assert found.git_commit == git(repository, "rev-parse", "HEAD")
    assert found.git_branch is None
    assert found.git_dirty is False


def test_changes_make_the_tree_dirty_and_show_in_the_diff(repository: Path) -> None:
    (repository / "code.py").write_text("one = 2\n")
    (repository / "new file.py").write_text("secret = 3\n")
    assert collect_provenance(repository, []).git_dirty is True
    diff = git_diff(repository)
    assert diff is not None
    assert "-one = 1\n+one = 2\n" in diff
    assert "new file.py" in diff
    assert "secret" not in diff


def test_digests_tell_two_dirty_states_apart_and_name_the_packages(repository: Path) -> None:
    clean = collect_provenance(repository, [])
    (repository / "code.py").write_text("one = 2\n")
    two, again = collect_provenance(repository, []), collect_provenance(repository, [])
    (repository / "code.py").write_text("one = 3\n")
    three = collect_provenance(repository, [])
    assert clean.patch_digest is None
    assert two.patch_digest == again.patch_digest
    assert None not in (two.patch_digest, three.patch_digest)
    assert two.patch_digest != three.patch_digest
    assert clean.versions_digest == three.versions_digest
    assert len(clean.versions_digest or "") == 16


def test_diff_from_a_folder_inside_covers_the_whole_repository(repository: Path) -> None:
    (repository / "code.py").write_text("one = 2\n")
    (repository / "inside").mkdir()
    assert "+one = 2" in (git_diff(repository / "inside") or "")


def test_long_diff_is_cut_with_a_note(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DIFF_LIMIT_BYTES", 2000)
    (repository / "code.py").write_text("x\n" * 100_000)
    diff = git_diff(repository)
    assert diff is not None
    assert len(diff) < 2200
    assert "longer than 2000 bytes" in diff


def test_repository_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "add", ".")
    found = collect_provenance(tmp_path, [])
    assert found.git_commit is None
    assert found.git_dirty is True
    assert "+one = 1" in (git_diff(tmp_path) or "")


def test_remote_loses_its_credentials(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://someone:token@git.example/team/code.git")
    assert collect_provenance(repository, []).git_remote == "https://git.example/team/code.git"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:secret@host:5000/a", "http://host:5000/a"),
        ("https://secret@host", "https://host"),
        ("http://user:s@cret@host", "http://host"),
        ("postgresql+psycopg2://user:secret@host/db", "postgresql+psycopg2://host/db"),
        ("--tracking-uri=http://user:secret@host", "--tracking-uri=http://host"),
        ("to http://user:secret@host and http://other:secret@host", "to http://host and http://host"),
        ("http://host:5000/mail@address", "http://host:5000/mail@address"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("owner/model@revision", "owner/model@revision"),
    ],
)
def test_addresses_lose_their_credentials(text: str, expected: str) -> None:
    assert without_credentials(text) == expected


def test_the_command_loses_its_credentials(tmp_path: Path) -> None:
    words = ["harness", "eval", "--tracking-uri", "http://user:sec ret's@host", "--run-name", "two words"]
    words[3] = words[3].replace(" ", "%20")
    found = collect_provenance(tmp_path, words).command
    assert found == "harness eval --tracking-uri http://host --run-name 'two words'"


@pytest.mark.parametrize("path", ["", None])
def test_without_git_fields_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    # The temporary folder may itself lie in somebody's repository.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if path is not None:
        monkeypatch.setenv("PATH", path)  # no git at all
    found = collect_provenance(tmp_path, ["harness"])
    assert (found.git_commit, found.git_branch, found.git_dirty, found.git_remote) == (None,) * 4
    assert git_diff(tmp_path) is None


def test_freeze_lists_each_distribution_once_sorted() -> None:
    lines = environment_freeze().splitlines()
    names = [line.split("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines]
    assert any(line.startswith("torch==") for line in lines)
    assert names == sorted(names)
    assert len(names) == len(set(names))


def test_process_identity_tells_the_living_from_the_dead() -> None:
    assert process_is_alive(process_identity()) is True
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = {**process_identity(), "pid": child.pid, "pid_started": None}
    assert process_is_alive(dead) is True
    child.kill()
    child.wait()
    assert process_is_alive(dead) is False


def test_reused_pid_is_another_process() -> None:
    assert process_is_alive({**process_identity(), "pid_started": 1000.0}) is False
    assert process_is_alive({**process_identity(), "pid": str(os.getpid())}) is True


def test_process_of_another_host_is_unknown() -> None:
    assert process_is_alive({**process_identity(), "host": "elsewhere"}) is None
    assert process_is_alive({}) is None
