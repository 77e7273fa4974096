"""A repository of five commits, and what looks for results in it."""

from pathlib import Path

import pytest
from compare_records import Tree, commit, git


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / ".gitignore").write_text("results/\n")
    git(folder, "add", ".")
    shas = [commit(folder, subject) for subject in ("First", "Second", "Third", "Fourth", "Fifth")]
    git(folder, "tag", "v1", shas[1])
    git(folder, "branch", "feature", shas[3])
    return Tree(folder, tuple(shas))
