"""The verb `plan`: what a run would do and take, on this machine or on one that only its profile is here of.

In this process, without prompts and without weights: a model's config is enough.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flexllmgen.errors import OffloadError, UsageError
from harness.config import Settings
from harness.models import resolve_model
from harness.plan_view import PlanView
from harness.policy_words import unused_leave
from harness.prepare import (
    check_context,
    choose_machine,
    local_profile,
    machine_of,
    make_request,
    quiet_transformers,
)
from harness.report import Report
from profiling.hardware import check_writable, read_hardware
from profiling.profile import HardwareProfile
from strategies.base import Plan
from strategies.registry import find_strategy


def show_plan(settings: Settings, report: Report, *, hardware_file: Path | None, as_json: bool) -> int:
    """Make the plan of a run and print it.

    Args:
        hardware_file: the profile of the machine to plan for; None for this one.

    Raises:
        OffloadError: what the user can mend: names, sizes, a file that is no profile, a plan that does not fit.
    """
    try:
        plan, profile, warnings = make_plan(settings, report, hardware_file)
    except OffloadError as error:
        if as_json:
            # Whoever reads JSON gets JSON, also where there is nothing else to tell.
            report.json({"plan": None, "error": str(error)})
        raise
    view = PlanView(plan, profile)
    if as_json:
        report.json({**view.as_dict(), "warnings": warnings, "error": None})
    else:
        report.text(view.head())
        for table in view.tables():
            report.figures(table.title, table.columns, table.rows)
        report.text(view.verdict())
    for warning in warnings:
        report.warn(warning)
    return 0


def make_plan(
    settings: Settings, report: Report, hardware_file: Path | None
) -> tuple[Plan, HardwareProfile, list[str]]:
    """The plan of a run, the profile it rests on, and warnings; loads no weights.

    Raises:
        OffloadError: as `show_plan`.
    """
    config = settings.common
    profile = None if hardware_file is None else read_profile(hardware_file)
    # Only its dimensions are needed, so that nothing is downloaded for a published model.
    source = resolve_model(config.model, weights="random", trust_remote_code=config.trust_remote_code)
    check_context(config, source)
    quiet_transformers()
    if profile is None:
        check_writable(config.offload_dir, "--offload-dir")
        machine, warnings = choose_machine(config)
        request = make_request(config, source, machine)
        try:
            profile, profile_warnings = local_profile(
                request,
                read_hardware(machine.offload_dir),
                lambda phase: report.phase(phase, None),
            )
        finally:
            report.end_progress()
        warnings += profile_warnings
    else:
        machine, warnings = machine_of(profile, config)
        request = make_request(config, source, machine)
        if request.dtype != profile.dtype:
            warnings.append(
                f"the profile was measured in {profile.dtype}, this plan is for {request.dtype}: its times are off"
            )
    strategy = find_strategy(config.strategy).create(settings.strategy)
    with _log_shown(report.verbose):
        plan = strategy.plan(replace(request, profile=profile))
    warnings += plan.warnings
    if config.allow_lossy and (words := unused_leave(plan.as_dict())):
        warnings.append(words)
    return plan, profile, warnings


@contextmanager
def _log_shown(wanted: bool) -> Iterator[None]:
    """The log on standard error, or nowhere: what no handler takes, Python itself would print there."""
    handler = logging.StreamHandler(sys.stderr) if wanted else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def read_profile(file: Path) -> HardwareProfile:
    """The profile in a file.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        return HardwareProfile.from_dict(json.loads(file.expanduser().read_text(encoding="utf-8")))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--hardware {file}: cannot be read ({reason}); name a file that "
            "`harness profile --output FILE` wrote"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"--hardware {file}: not JSON ({error}); write one with `harness profile --output FILE`"
        ) from error
    except UsageError as error:
        raise UsageError(f"--hardware {file}: {error}") from error
