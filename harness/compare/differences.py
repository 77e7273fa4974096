"""What tells two results apart: their setups, machines and installed packages.

Knows nothing of where results come from, nor of their figures.
"""

from collections.abc import Mapping

from flexllmgen.units import gib
from harness.compare.measured import SHORT, Measured
from harness.config import EvalConfig
from harness.results import RunResult, Scalar

# Options that shape what is measured and are not in the workload key; of the others only strategies' own keys count.
_SHAPING = ("model", "batch_size", "device", "gpu_mem", "cpu_mem", "weights", "allow_lossy")
# What came out of planning, and where files lie.
_OUTCOME = ("model_path", "model_revision", "path")


def setup_of(result: RunResult) -> dict[str, Scalar]:
    """What was asked for, beside workload and strategy: batch size, caps, device, the strategy's keys."""
    found: dict[str, Scalar] = {}
    for name, value in result.params.items():
        common = name in EvalConfig.model_fields
        if name in _SHAPING or not (common or name in _OUTCOME or name.startswith("policy_")):
            found[name] = value
    # A local model is the same model in another folder.
    model = str(found.get("model") or result.model).rstrip("/")
    found["model"] = model.rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model
    return found


def setup_differences(base: RunResult, new: RunResult) -> dict[str, tuple[str, str]]:
    """What tells two setups apart, name to both values; empty for launches of the same cell.

    A key that one of them lacks, since its code is older, counts only where the other does not leave it at its default.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, one, other in (
        ("workload", base.workload_key, new.workload_key),
        ("strategy", base.strategy, new.strategy),
    ):
        if one != other:
            found[name] = (one, other)
    return found | key_differences(base, new, setup_of(base), setup_of(new))


def key_differences(
    base: RunResult, new: RunResult, base_keys: Mapping[str, Scalar], new_keys: Mapping[str, Scalar]
) -> dict[str, tuple[str, str]]:
    """Those of the keys whose values differ."""
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(set(base_keys) | set(new_keys)):
        if name in base_keys and name in new_keys:
            same = base_keys[name] == new_keys[name]
        else:
            present = base if name in base_keys else new
            same = present.param_sources.get(name, "").startswith("default")
        if not same:
            found[name] = (setting_text(name, base_keys.get(name)), setting_text(name, new_keys.get(name)))
    return found


def setting_text(name: str, value: Scalar) -> str:
    """A setting's value; a cap the way it is given: 1.00GiB."""
    if name.endswith("_mem") and isinstance(value, int | float) and not isinstance(value, bool):
        return gib(value).replace(" ", "")
    return scalar_text(value)


def hardware_differences(base: Measured, new: Measured) -> dict[str, tuple[str, str]]:
    """What tells two machines apart, name to both values; empty for the same machine by its fingerprint."""
    if base.result.hardware_fingerprint == new.result.hardware_fingerprint != "":
        return {}
    one, other = _hardware_facts(base), _hardware_facts(new)
    found = {
        name: (one.get(name, "unknown"), other.get(name, "unknown"))
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    }
    pair = (base.result.hardware_fingerprint or "unknown", new.result.hardware_fingerprint or "unknown")
    return found or {"fingerprint": pair}


def machine_of(measured: Measured) -> str:
    """The machine in a few words; its fingerprint where nothing else is known."""
    facts = _hardware_facts(measured)
    known = [facts[name] for name in ("GPU", "processor") if facts.get(name, "none") != "none"]
    if not known:
        return f"machine {measured.result.hardware_fingerprint[:SHORT] or 'unknown'}"
    return ", ".join(known) + f", {facts['cores']} cores"


def version_differences(base: Measured, new: Measured) -> dict[str, tuple[str, str]]:
    """Installed packages that differ, as far as they are known by name; else their digests. And torch's threads."""
    one, other = base.result.provenance, new.result.provenance
    names = sorted(set(one.versions) & set(other.versions))
    found = {
        name: (one.versions[name], other.versions[name])
        for name in names
        if one.versions[name] != other.versions[name]
    }
    digests = (one.versions_digest, other.versions_digest)
    if not found and None not in digests and digests[0] != digests[1]:
        found["other packages"] = (str(digests[0])[:SHORT], str(digests[1])[:SHORT])
    # An environment variable decides on them, which no option of a run shows.
    threads = (base.hardware.get("threads"), new.hardware.get("threads"))
    if None not in threads and threads[0] != threads[1]:
        found["torch threads"] = (str(threads[0]), str(threads[1]))
    return found


def scalar_text(value: Scalar) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "unset" if value is None else str(value)


def told(differences: Mapping[str, tuple[str, str]], *, between: str = " against ", limit: int = 6) -> str:
    """Differences in one line: `cores 2 against 16, GPU none against H200`."""
    shown = [f"{name} {one}{between}{other}" for name, (one, other) in list(differences.items())[:limit]]
    more = len(differences) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _hardware_facts(measured: Measured) -> dict[str, str]:
    facts, result = measured.hardware, measured.result
    found: dict[str, str] = {}
    if facts:
        gpus = [f"{gpu['name']} {gib(gpu['memory_bytes'])}" for gpu in facts.get("gpus") or ()]
        found["GPU"] = " + ".join(gpus) or "none"
        found["processor"] = str(facts.get("cpu"))
        found["cores"] = str(facts.get("logical_cores"))
        found["memory"] = gib(float(facts.get("memory_bytes") or 0))
        found["driver"] = str(facts.get("driver") or "none")
        found["file system"] = str((facts.get("disk") or {}).get("filesystem"))
    if torch := result.provenance.versions.get("torch"):
        found["torch"] = torch
    return found
