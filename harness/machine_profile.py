"""The verb `profile`: measures the machine in this process and shows it. Loads no model and records no run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.config import EvalConfig, cache_dir
from harness.models import resolve_model
from harness.prepare import choose_device, choose_dtype, known_spec
from harness.profile_table import profile_tables
from harness.report import Report
from harness.results import write_json
from profiling.hardware import check_writable, read_hardware
from profiling.layer_times import LayerShape
from profiling.profiler import forced, profile_path, small_spec, take_profile


def show_profile(
    config: EvalConfig,
    report: Report,
    *,
    model_named: bool,
    refresh: bool,
    output: Path | None,
    as_json: bool,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Take the profile, or the kept one, and print it.

    Args:
        model_named: whether layers of `config.model` are timed; else of a small model.

    Raises:
        UsageError: a device that is not there, a model that nothing is known of, a file that cannot be written.
    """
    check_writable(config.offload_dir, "--offload-dir")
    device = choose_device(config.device)
    # Only its dimensions are needed, so that nothing is downloaded for a published model.
    source = resolve_model(config.model, weights="random", trust_remote_code=config.trust_remote_code)
    spec = known_spec(source) if model_named else small_spec()
    if spec is None:
        report.warn(
            f"{config.model} is of an architecture whose layers are not known here; a small model's are"
        )
    dtype = choose_dtype(config.dtype, source, device)
    offload_dir = config.offload_dir.expanduser().absolute()
    cache = cache_dir() / "profiles"
    try:
        profile, warnings = take_profile(
            read_hardware(offload_dir),
            spec,
            device=device,
            dtype=dtype,
            offload_dir=offload_dir,
            cache=cache,
            refresh=refresh or forced(environ),
            on_progress=report.part,
        )
    finally:
        report.end_progress()
    for warning in warnings:
        report.warn(warning)
    if profile.noisy:
        report.warn(
            f"trials disagree for {', '.join(profile.noisy)}; on a quiet machine measure again with --refresh"
        )
    data = profile.as_dict()
    if output is not None:
        _write(output, data)
    if as_json:
        report.json(data)
        return 0
    shape = LayerShape.of(spec or small_spec())
    layers = next((table for table in profile.layers if table.shape == shape), None)
    for table in profile_tables(profile, layers):
        report.figures(table.title, table.columns, table.rows)
    if layers is None and spec is not None:
        report.text(f"layers of {config.model} are too large to be timed here; predictions scale another's")
    report.text(f"measured in {profile.took_s:.1f} s; kept in {profile_path(cache, profile.fingerprint)}")
    return 0


def _write(output: Path, data: Mapping[str, Any]) -> None:
    try:
        write_json(output.expanduser(), data)
    except OSError as error:
        raise UsageError(
            f"--output {output}: cannot be written ({error.strerror}); name another file"
        ) from error
