"""RunFolder: the folder that a run leaves behind, its files but result.json, and what happens when the disk is full."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.prompts import PromptSet
from harness.provenance import environment_freeze, git_diff
from harness.results import Timeline, write_json, write_jsonl, write_text

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_RESERVE_BYTES = 256 << 10  # a result of hundreds of repeats


class RunFolder:
    """The files of one run.

    Args:
        warn: told of each file that cannot be written.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self._warn = path, warn
        self._reserve = path / ".reserve"

    def open(self, plan: Mapping[str, Any], profile: Mapping[str, Any]) -> None:
        """Make the folder, with all that is known before a weight is loaded, and room for what comes at the end.

        Raises:
            OSError: it cannot be written, or there is no room.
        """
        self.path.mkdir(parents=True)
        # So that the end can be written on a disk that fills up meanwhile.
        with self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(handler)
        write_json(self.path / "plan.json", plan)
        write_json(self.path / "hardware_profile.json", profile)
        write_text(self.path / "environment.txt", environment_freeze())
        if diff := git_diff(Path.cwd()):
            write_text(self.path / "git.diff", diff)

    def end(
        self,
        plan: Mapping[str, Any],
        timeline: Timeline,
        requests: Sequence[Mapping[str, Any]],
        traceback: str | None,
    ) -> None:
        """Write what is known at the end, and give back the room that result.json then needs."""
        with self.unless_full("plan.json"):
            write_json(self.path / "plan.json", plan)
        with self.unless_full("timeline.json"):
            write_text(self.path / "timeline.json", timeline.model_dump_json())
        with self.unless_full("requests.jsonl"):
            write_jsonl(self.path / "requests.jsonl", requests)
        if traceback:
            with self.unless_full("error.txt"):
                write_text(self.path / "error.txt", traceback)
        self._reserve.unlink(missing_ok=True)

    @contextmanager
    def unless_full(self, name: str) -> Iterator[None]:
        """A file that cannot be written costs a warning, not the measurement."""
        try:
            yield
        except OSError as problem:
            log.exception("%s cannot be written", name)
            # result.json is written again at the end.
            if name != "result.json":
                self._warn(f"{name} could not be written: {problem.strerror or problem}")


def request_rows(
    prompts: PromptSet, output_ids: Sequence[list[int]], tokenizer: Any | None
) -> list[dict[str, Any]]:
    """Each prompt and what was generated for it; after an interruption there may be fewer outputs than prompts."""
    rows = []
    outputs = [*output_ids, *[[]] * (len(prompts.prompts) - len(output_ids))]
    for prompt, generated in zip(prompts.prompts, outputs, strict=True):
        text = tokenizer.decode(generated, skip_special_tokens=True) if tokenizer is not None else None
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "truncated": prompt.truncated,
                "input_ids": list(prompt.token_ids),
                "output_ids": generated,
                "output_text": text,
            }
        )
    return rows
