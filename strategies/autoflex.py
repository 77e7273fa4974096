"""Strategy `autoflex`: the policy that the cost model finds fastest on this machine, on our own engine.

Searches before anything is loaded. Then, unless told not to, it times the load of a layer and a few steps on the loaded
engine, corrects the machine's rates by that, and loads another policy if that one is now better by a margin that is
worth it. That one is timed as well; should it prove slower than the first by as much, the first is loaded again.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from flexllmgen.errors import PlanInfeasible
from flexllmgen.memory.pack import packed_bytes
from flexllmgen.policy import Placement, Policy
from profiling.hardware import free_disk_bytes
from profiling.profile import HardwareProfile
from strategies.autoflex_config import Config
from strategies.base import Machine, Plan, PlanRequest
from strategies.candidates import Candidate, lossy_odd
from strategies.choices import Limits
from strategies.flexgen_config import SHORT, share_key
from strategies.flexgen_engine import (
    FlexgenEngine,
    disk_room,
    dtype_bytes,
    load_policy,
    make_checkpoint,
    offload_folder,
    plan_of,
    policy_details,
    spec_of,
)
from strategies.recalibration import (
    Shown,
    back_to,
    changed,
    noted,
    shown_by,
    slowest,
    tried_after,
)
from strategies.search import Found, find_policy

log = logging.getLogger(__name__)

_FEWEST_BITS = 4
"""least_bits that rules nothing out."""
WORTH_A_HINT = 1.15
"""A lossy policy that is predicted to be this much faster is told of, where weights are read from disk."""
REPLAN_GAIN = 1.05
"""Another policy must be this much faster before the engine is loaded anew."""


def create(config: Config) -> "AutoflexStrategy":
    """The strategy under its configuration."""
    return AutoflexStrategy(config)


class AutoflexStrategy:
    """Searches, loads what it found, checks itself on a few steps."""

    name = "autoflex"

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, request: PlanRequest) -> Plan:
        """The fastest policy by the machine's profile.

        Raises:
            UnsupportedModelError: an architecture the engine does not have.
            CheckpointError: the checkpoint is not the model's.
            PlanInfeasible: no policy fits; the message has the least change that would.
        """
        spec = spec_of(request)
        if request.model.path is not None or request.model.weights == "random":
            make_checkpoint(request).validate(spec)
        if request.profile is None:
            raise PlanInfeasible("autoflex needs a hardware profile; measure one with `harness profile`")
        try:
            return self._plan(request, self._found(request, request.profile))
        except PlanInfeasible as error:
            if (lossy := self._lossy(request)) is None:
                raise
            raise PlanInfeasible(f"{error}; it fits with --allow-lossy: {_outlook(lossy)}") from None

    @contextmanager
    def build(self, plan: Plan) -> Iterator[FlexgenEngine]:
        """Load the policy found; after a calibration perhaps another, and the first again where that proves slower.

        Raises:
            OutOfMemory: device memory ran out although the plan fitted.
        """
        folder = offload_folder(plan.request, self.config.path)
        with load_policy(plan, policy_of(plan), folder) as engine:
            if not self.config.calibrate:
                yield engine
                return
            shown = shown_by(plan, engine, plan.request.profile)
            first, other = self._other(plan, engine, shown)
            if other is None:
                engine.plan = first
                yield engine
                return
        with load_policy(other, policy_of(other), folder) as engine:
            shown_then = shown_by(other, engine, shown.profile)
            tried = tried_after(first, other, shown_then)
            loss = shown_then.cost.seconds / shown.cost.seconds
            price = _price(policy_of(plan), policy_of(other))
            # What steps take is compared only where those of both were timed. What gives up more must really be faster.
            if loss * price <= (1.0 if price > 1 else REPLAN_GAIN) or shown.stepped != shown_then.stepped:
                engine.plan = tried
                yield engine
                return
        log.warning("calibration: the other policy takes %.2f of the time; back to the first", loss)
        first = back_to(first, tried, loss)
        with load_policy(first, policy_of(first), folder) as engine:
            yield engine

    def _search(self, request: PlanRequest, profile: HardwareProfile, disk_bytes: int) -> Found:
        return find_policy(
            spec_of(request),
            profile,
            request.workload,
            limits_of(request.machine, disk_bytes),
            dtype_bytes=dtype_bytes(request),
            batch_size=request.batch_size,
            objective=self.config.objective,
            pin_weight=self.config.pin_weight,
            allow_lossy=request.allow_lossy,
            least_bits=self.config.least_bits,
        )

    def _found(self, request: PlanRequest, profile: HardwareProfile) -> Found:
        """The best policy. What an earlier run has packed takes no room again, if it is the same policy's."""
        folder, path = offload_folder(request, self.config.path), self.config.path
        if request.machine.disk_bytes is not None:
            return self._search(request, profile, request.machine.disk_bytes)
        free = free_disk_bytes(folder)
        if packed := packed_bytes(folder):
            found = self._search(request, profile, free + packed)
            placement = found.best.placement
            if placement.disk_bytes <= disk_room(request, placement, folder, path):
                return found
        found = self._search(request, profile, free)
        disk_room(request, found.best.placement, folder, path)
        return found

    def _lossy(self, request: PlanRequest) -> Found | None:
        """What a search would find that may give up precision, if that is a lossy policy; None without one."""
        if request.allow_lossy or request.profile is None:
            return None
        try:
            found = self._found(replace(request, allow_lossy=True), request.profile)
        except PlanInfeasible:
            return None
        return None if found.best.policy.lossless else found

    def _plan(self, request: PlanRequest, found: Found) -> Plan:
        plan = plan_of(
            request, found.best.placement, strategy=self.name, details={"search": search_details(found)}
        )
        return replace(plan, warnings=(*plan.warnings, *self._hints(request, plan)))

    def _hints(self, request: PlanRequest, plan: Plan) -> Iterator[str]:
        """What a user who asked for this may want to know of lossy policies."""
        if request.allow_lossy:
            if plan.lossless:
                yield "--allow-lossy: the policy found is lossless all the same"
            return
        bits = self.config.least_bits
        if bits != _FEWEST_BITS:
            yield "least_bits has no effect without --allow-lossy"
        if plan.weight_bytes["disk"] and (lossy := self._lossy(request)) is not None:
            gain = plan.predicted.seconds / lossy.best.seconds if plan.predicted else 0.0
            if gain > WORTH_A_HINT:
                yield f"weights are read from disk in every pass; faster with --allow-lossy: {_outlook(lossy)}"

    def _search_again(self, plan: Plan, profile: HardwareProfile, engine: FlexgenEngine) -> Found | None:
        """The best policy at other rates. What this engine holds on disk would be free for another one."""
        free = free_disk_bytes(offload_folder(plan.request, self.config.path))
        try:
            return self._search(plan.request, profile, free + engine.engine.stats().disk_bytes)
        except PlanInfeasible:  # The disk has filled meanwhile: what is loaded is what there is.
            return None

    def _other(self, plan: Plan, engine: FlexgenEngine, shown: Shown) -> tuple[Plan, Plan | None]:
        """The plan at the rates that the loaded engine shows; and another one if it is worth loading anew."""
        found = self._search_again(plan, shown.profile, engine)
        gain = shown.cost.seconds / found.best.seconds if found is not None else 1.0
        log.info("calibration: %s; the best other policy takes %.2f of the time", shown.calibration, 1 / gain)
        found_out = {
            **asdict(shown.calibration),
            "predicted_before_tok_s": None if plan.predicted is None else plan.predicted.generation_tok_s,
            "gain_of_best": gain,
            "replanned": False,
        }
        told = changed(shown.calibration, plan.predicted, shown.cost)
        first = noted(replace(plan, predicted=shown.cost, warnings=(*plan.warnings, *told)), found_out)
        price = 1.0 if found is None else _price(policy_of(plan), found.best.policy)
        if found is None or gain <= REPLAN_GAIN * price:
            return first, None
        log.warning("calibration: another policy is %.0f %% faster; loading it", 100 * (gain - 1))
        warning = (
            f"the machine's {slowest(shown.calibration)} than profiled: planned again, "
            f"{100 * (gain - 1):.0f} % faster"
        )
        other = self._plan(replace(plan.request, profile=shown.profile), found)
        # The run's record holds the machine's profile as measured before.
        return first, replace(other, request=plan.request, warnings=(*plan.warnings, warning))


def _price(first: Policy, other: Policy) -> float:
    """By what factor another policy must be faster for what it gives up that the first one does not; below 1 the other way."""
    return (1 + lossy_odd(other)) / (1 + lossy_odd(first))


def _outlook(found: Found) -> str:
    """What a lossy policy keeps in how many bits, and what it would reach."""
    policy, speed = found.best.policy, found.best.cost.generation_tok_s
    kept = (("weights", policy.weight_bits), ("KV cache", policy.kv_bits))
    words = " and ".join(f"{what} in {bits} bits" for what, bits in kept if bits)
    return f"{words}, predicted {speed:,.3g} tok/s"


def policy_of(plan: Plan) -> Policy:
    """The policy that a plan's details describe."""
    shares = plan.details["search"]["shares"]
    placed: dict[str, Any] = {kind: Placement(**shares[kind]) for kind in SHORT}
    return Policy(**placed, **plan.details["policy"])


def limits_of(machine: Machine, disk_bytes: int) -> Limits:
    """What a policy may take of a machine."""
    return Limits(
        gpu_bytes=machine.gpu_bytes,
        cpu_bytes=machine.cpu_bytes,
        disk_bytes=disk_bytes,
        shared=machine.shares_memory,
    )


def search_details(found: Found) -> dict[str, object]:
    """How the policy was found, for plan.json: exact shares, certificate, runners-up and why they lost."""
    best = found.best
    return {
        "shares": {kind: asdict(getattr(best.policy, kind)) for kind in SHORT},
        "cuts": found.cuts,
        "simulated": found.simulated,
        "bound_s": found.bound_s,
        "gap": found.gap,
        "runners_up": [_runner_up(each, best) for each in found.runners_up],
    }


def _runner_up(other: Candidate, best: Candidate) -> dict[str, object]:
    shares = {
        share_key(kind, tier): round(100 * getattr(getattr(other.policy, kind), tier), 1)
        for kind in SHORT
        for tier in ("gpu", "cpu", "disk")
    }
    return {
        **policy_details(other.policy),
        **shares,
        "generation_tok_s": other.cost.generation_tok_s,
        "slower_by": other.seconds / best.seconds - 1,
        "why": _why(other, best),
    }


def _why(other: Candidate, best: Candidate) -> str:
    """What costs a runner-up its time, in a few words."""
    if other.seconds <= best.seconds:
        return "as fast within the model's accuracy, but less plain"
    mine, theirs = (
        {
            name: each.cost.prefill_busy_s.get(name, 0.0) + each.cost.decode_busy_s.get(name, 0.0)
            for name in {**each.cost.prefill_busy_s, **each.cost.decode_busy_s}
        }
        for each in (best, other)
    )
    more = {name: seconds - mine.get(name, 0.0) for name, seconds in theirs.items()}
    name = max(more, key=lambda each: more[each])
    if more[name] <= 0.2 * (other.seconds - best.seconds):
        return "more waiting between loads and compute"
    return f"{more[name]:.2f} s more on the {name}"
