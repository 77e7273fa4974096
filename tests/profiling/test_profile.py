"""HardwareProfile: JSON there and back, what is refused, best and typical rates."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexllmgen.errors import UsageError
from profiling.hardware import Disk, Gpu, Hardware
from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point
from profiling.profile import (
    NOISY,
    SCHEMA_VERSION,
    Capacity,
    HardwareProfile,
    Measurement,
    Rates,
    profile_fingerprint,
)

REQUIRED = {
    field.name for field in dataclasses.fields(Rates) if field.default is dataclasses.MISSING
}  # fmt: skip
OPTIONAL = {field.name for field in dataclasses.fields(Rates)} - REQUIRED

amounts = st.floats(min_value=1e-9, max_value=1e18)
sizes = st.integers(min_value=0, max_value=1 << 50)
names = st.text(max_size=12)


def build(kind: type, **given: Any) -> st.SearchStrategy[Any]:
    return st.builds(kind, **given)


measurements = build(
    Measurement, median=amounts, best=amounts, spread=st.floats(0, 10), trials=st.integers(1, 9)
)
points = build(Point, rows=st.integers(1, 512), attention_s=amounts, per_position_s=amounts, mlp_s=amounts)
shapes = build(
    LayerShape,
    family=names,
    **{
        field.name: st.integers(1, 1 << 20)
        for field in dataclasses.fields(LayerShape)
        if field.name != "family"
    },
)
tables = build(
    LayerTimes,
    shape=shapes,
    issue_s=amounts,
    prompt=st.tuples(points),
    step=st.tuples(points, points),
    head=st.tuples(build(HeadPoint, rows=st.integers(1, 512), head_s=amounts)),
)
machines = build(
    Hardware,
    fingerprint=names,
    cpu=names,
    physical_cores=st.integers(1, 512),
    logical_cores=st.integers(1, 512),
    cpu_flags=st.tuples(names),
    memory_bytes=sizes,
    gpus=st.one_of(
        st.just(()),
        st.tuples(
            build(
                Gpu,
                name=names,
                memory_bytes=sizes,
                compute_capability=names,
                pcie_generation=st.none() | st.integers(1, 7),
                pcie_width=st.none() | st.integers(1, 16),
            )
        ),
    ),
    driver=st.none() | names,
    disk=build(Disk, path=names, device=names, filesystem=names, total_bytes=sizes, free_bytes=sizes),
    system=names,
    python=names,
)
profiles = build(
    HardwareProfile,
    fingerprint=names,
    hardware=machines,
    device=st.sampled_from(["cpu", "cuda"]),
    dtype=names,
    torch=names,
    threads=st.integers(1, 512),
    measured_at=amounts,
    took_s=amounts,
    energy_counter=st.booleans(),
    capacity=build(Capacity, host_total_bytes=sizes, host_available_bytes=sizes, disk_free_bytes=sizes),
    measurements=st.fixed_dictionaries(
        dict.fromkeys(REQUIRED, measurements),
        optional=dict.fromkeys(OPTIONAL, measurements),
    ),
    layers=st.tuples(tables) | st.just(()),
)


@settings(max_examples=40)
@given(profiles)
def test_json_there_and_back_is_the_same_profile(profile: HardwareProfile) -> None:
    text = json.dumps(profile.as_dict(), allow_nan=False)
    again = HardwareProfile.from_dict(json.loads(text))
    assert again == profile
    assert json.dumps(again.as_dict()) == text
    assert set(profile.best.as_dict()) == set(profile.measurements)
    assert profile.as_dict()["noisy"] == [
        name for name, each in profile.measurements.items() if each.spread > NOISY
    ]


def test_limits_take_the_best_trial_and_predictions_the_median(laptop_profile: HardwareProfile) -> None:
    measurements = {
        **laptop_profile.measurements,
        "host_bytes_per_s": Measurement.of(12.0, [1.0, 2.0, 3.0]),
    }
    profile = dataclasses.replace(laptop_profile, measurements=measurements)
    assert profile.best.host_bytes_per_s == 12
    assert profile.typical.host_bytes_per_s == 6
    assert profile.noisy == ("host_bytes_per_s",)
    assert profile.typical.h2d_bytes_per_s is None


def test_what_has_no_version_is_no_profile(laptop_profile: HardwareProfile) -> None:
    with pytest.raises(UsageError, match="not a hardware profile"):
        HardwareProfile.from_dict({**laptop_profile.as_dict(), "schema_version": None})


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1])
def test_another_schema_version_is_refused(laptop_profile: HardwareProfile, version: int) -> None:
    data = {**laptop_profile.as_dict(), "schema_version": version}
    with pytest.raises(UsageError, match=r"schema version .* `harness profile`"):
        HardwareProfile.from_dict(data)


@pytest.mark.parametrize(
    "damage",
    [
        {"capacity": None},
        {"hardware": {}},
        {"measurements": {}},
        {"measurements": {"host_bytes_per_s": {"median": 1}}},
        {"layers": [{}]},
        {"layers": 3},
        {"unknown": 1},
    ],
)
def test_what_is_no_profile_is_refused(laptop_profile: HardwareProfile, damage: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a hardware profile"):
        HardwareProfile.from_dict({**laptop_profile.as_dict(), **damage})


def test_whatever_the_figures_depend_on_is_in_the_fingerprint(laptop_profile: HardwareProfile) -> None:
    hardware = laptop_profile.hardware
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "torch": "2.11.0", "threads": 2}
    first = profile_fingerprint(hardware, **given)
    others = {
        profile_fingerprint(hardware, **{**given, **change})
        for change in ({"device": "cuda"}, {"dtype": "float16"}, {"torch": "2.12.0"}, {"threads": 4})
    }
    disk = dataclasses.replace(hardware.disk, device="/dev/other")
    for change in ({"driver": "580.1"}, {"fingerprint": "other"}, {"disk": disk}):
        others.add(profile_fingerprint(dataclasses.replace(hardware, **change), **given))  # type: ignore[arg-type]
    assert len(others - {first}) == 7
    fuller = dataclasses.replace(hardware, disk=dataclasses.replace(hardware.disk, free_bytes=1))
    assert profile_fingerprint(fuller, **given) == first
