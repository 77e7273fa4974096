"""What passes between the command and its worker."""

import io
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.config import resolve
from harness.job import EventWriter, Job, read_events
from harness.results import Provenance


def make_job() -> Job:
    settings = resolve(
        {"cpu_mem": "1.5GiB", "tag": ["a=b"], "results_dir": "out"},
        config_file=None,
        assignments=["quantize=int8"],
        environ={"HARNESS_SEED": "7"},
    )
    return Job.of(settings, run_uuid="u", provenance=Provenance(command="c"), dry_run=False, verbose=True)


def test_a_job_survives_the_pipe() -> None:
    job = make_job()
    line = job.model_dump_json()
    assert "\n" not in line
    read = Job.model_validate_json(line)
    assert read == job
    assert read.common.cpu_mem == 3 * 2**29
    assert read.common.results_dir == Path("out")
    assert read.strategy_config["quantize"] == "int8"
    assert read.sources["seed"] == "environment HARNESS_SEED"
    assert read.process["pid"]


def test_a_job_with_a_stray_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Job.model_validate({**make_job().model_dump(mode="json"), "extra": 1})


def test_events_are_lines() -> None:
    stream = io.StringIO()
    events = EventWriter(stream)
    events.send("phase", name="load\nnext", total=None)
    events.send("done")
    assert stream.getvalue().count("\n") == 2
    assert list(read_events(io.StringIO(stream.getvalue()))) == [
        {"event": "phase", "name": "load\nnext", "total": None},
        {"event": "done"},
    ]


def test_what_a_library_prints_is_no_event() -> None:
    lines = ["hello\n", "[1]\n", '{"a": 1}\n', "3\n", json.dumps({"event": "done"}) + "\n", "{\n"]
    assert list(read_events(lines)) == [{"event": "done"}]


def test_a_reader_that_has_gone_stops_no_measurement() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    EventWriter(Gone()).send("done")
    closed = io.StringIO()
    closed.close()
    EventWriter(closed).send("done")
