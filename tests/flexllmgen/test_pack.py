"""Runs that share a pack of weights: one that fails or is interrupted leaves the others their lock."""

import fcntl
import threading
from pathlib import Path

import pytest

from flexllmgen.errors import OffloadDirError
from flexllmgen.images import Image
from flexllmgen.memory import pack as pack_module
from flexllmgen.memory.pack import WeightPack, aligned_empty
from flexllmgen.units import PAGE


def is_locked(pack: WeightPack) -> bool:
    """Whether a run that came now would have to wait."""
    with (pack.folder / ".lock").open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_waited_for_a_run_that_failed_has_the_lock(tmp_path: Path) -> None:
    first, second = WeightPack(tmp_path, "key"), WeightPack(tmp_path, "key")
    started, seen = threading.Event(), []

    def wait_for_it() -> None:
        started.set()
        with second.locked():
            seen.append(is_locked(second))

    waiting = threading.Thread(target=wait_for_it)

    def fail() -> None:
        with first.locked():
            waiting.start()
            started.wait()
            waiting.join(timeout=0.2)  # It is at the lock now.
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    waiting.join(timeout=10)
    assert seen == [True]


def test_who_is_interrupted_while_waiting_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = WeightPack(tmp_path, "key"), WeightPack(tmp_path, "key")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with first.locked():
        with monkeypatch.context() as patch:
            patch.setattr(pack_module.fcntl, "flock", interrupted)
            with pytest.raises(KeyboardInterrupt), second.locked():
                pass
        assert is_locked(first)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OffloadDirError])
def test_whole_files_stay_unless_the_disk_is_to_blame(tmp_path: Path, problem: type[BaseException]) -> None:
    image = Image(name="layer-0", layer=0, tensors={}, num_bytes=PAGE, gpu_bytes=0, cpu_bytes=0)
    pack = WeightPack(tmp_path, "key")

    def packs() -> None:
        with pack.locked():
            pack.write(image, aligned_empty(PAGE).zero_())
            raise problem

    with pytest.raises(problem):
        packs()
    if problem is OffloadDirError:
        assert not pack.folder.exists()
    else:
        assert pack.read(image)
