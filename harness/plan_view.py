"""A Plan as people read it: what lies where, bytes over each link, time by resource as bars, room, runners-up.

Pure: rows and lines from a plan and the machine's profile; report.py prints them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexllmgen.units import gib
from harness.policy_words import batch_words, special_words
from harness.quality.words import losses, policy_losses
from harness.words import counted
from profiling.cost_model import CostEstimate
from profiling.profile import HardwareProfile
from strategies.autoflex import policy_of
from strategies.base import Plan
from strategies.flexgen import keys_of
from strategies.flexgen_config import SHORT, share_key

_BAR = 24
"""Characters of a full bar; with what stands beside it, it fits a terminal of 80."""
_LINKS = {
    "h2d": "host to device",
    "d2h": "device to host",
    "disk_read": "disk, read",
    "disk_write": "disk, write",
}
_KINDS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "workspace": "workspace, buffers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTable:
    """Rows under a title; columns but the first and those without a name are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A memory: what a plan may take of it, and the most it takes. `tiers` are the plan's names for it."""

    name: str
    tiers: tuple[str, ...]
    limit_bytes: int
    peak_bytes: int

    @property
    def headroom_bytes(self) -> int:
        return self.limit_bytes - self.peak_bytes

    @property
    def full(self) -> float:
        """The share that is taken."""
        return self.peak_bytes / self.limit_bytes if self.limit_bytes else float(self.peak_bytes > 0)


class PlanView:
    """Reads a plan made under `profile`."""

    def __init__(self, plan: Plan, profile: HardwareProfile) -> None:
        self.plan, self.profile = plan, profile

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the plan as recorded, and what is worked out from it."""
        estimate, limit = self.plan.predicted, self.plan.limit
        return {
            "plan": self.plan.as_dict(),
            "hardware": self.profile.hardware.summary,
            "profile": {
                "fingerprint": self.profile.fingerprint,
                "device": self.profile.device,
                "dtype": self.profile.dtype,
                "measured_at": self.profile.measured_at,
            },
            "placement_bytes": self.placement_bytes(),
            "bytes_per_token": self.bytes_per_token(),
            "predicted_tok_s": None if estimate is None else estimate.generation_tok_s,
            "limit_tok_s": None if limit is None else limit.generation_tok_s,
            "binding": self.binding(),
            "flexgen_keys": self.flexgen_keys(),
            "memory": {
                room.name: {
                    "limit_bytes": room.limit_bytes,
                    "peak_bytes": room.peak_bytes,
                    "headroom_bytes": room.headroom_bytes,
                }
                for room in self.rooms()
            },
        }

    def placement_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of each kind on each tier, at most; KV cache and activations are those of one block."""
        plan = self.plan
        kinds = {
            "weights": dict(plan.weight_bytes),
            "kv_cache": dict(plan.kv_bytes),
            "activations": dict(plan.details.get("activation_bytes", {})),
        }
        kinds = {kind: sizes for kind, sizes in kinds.items() if sizes}
        kinds["workspace"] = {
            tier: peak - sum(sizes[tier] for sizes in kinds.values())
            for tier, peak in plan.peak_bytes.items()
        }
        return kinds

    def bytes_per_token(self) -> dict[str, float]:
        """Bytes over each link in decode, for each token that decode generates; empty where nothing is known."""
        workload = self.plan.request.workload
        tokens = workload.num_sequences * (workload.gen_tokens - 1)
        if self.plan.predicted is None or not tokens:
            return {}
        return {name: moved / tokens for name, moved in self.plan.predicted.decode_moved_bytes.items()}

    def binding(self) -> dict[str, Any]:
        """What sets the pace of each phase and the share of the phase that it works; and the fullest memory."""
        bound: dict[str, Any] = {}
        estimate = self.plan.predicted or self.plan.limit
        if estimate is not None:
            for phase, name, busy_s, seconds in _phases(estimate):
                if seconds:
                    bound[phase] = {"resource": name, "busy": min(1.0, busy_s.get(name, 0.0) / seconds)}
        fullest = max(self.rooms(), key=lambda room: room.full)
        bound["memory"] = {"name": fullest.name, "full": fullest.full}
        return bound

    def flexgen_keys(self) -> dict[str, bool | int | float] | None:
        """The keys of strategy flexgen that make the policy that a search found; None where there was no search."""
        return keys_of(policy_of(self.plan)) if self.plan.details.get("search") else None

    def rooms(self) -> list[Room]:
        """The memories of the machine. Without a GPU, and no cap that emulates one, two tiers lie in the same."""
        plan, machine = self.plan, self.plan.request.machine
        peak, gpu = plan.peak_bytes, machine.gpu_bytes
        disk = self.profile.capacity.disk_free_bytes if machine.disk_bytes is None else machine.disk_bytes
        memory: list[tuple[str, tuple[str, ...], int]]
        if gpu is None:
            memory = [("memory", ("gpu", "cpu"), machine.cpu_bytes)]
        else:
            name = "GPU" if machine.device == "cuda" else "compute device"
            memory = [(name, ("gpu",), gpu), ("host memory", ("cpu",), machine.cpu_bytes)]
        return [
            Room(name=name, tiers=tiers, limit_bytes=limit, peak_bytes=sum(peak[tier] for tier in tiers))
            for name, tiers, limit in (*memory, ("disk", ("disk",), disk))
        ]

    def head(self) -> str:
        """The run in three lines, and what a lossy plan gives up in a fourth."""
        plan, request = self.plan, self.plan.request
        workload = request.workload
        record = plan.as_dict()
        lossy = losses(record)
        prompts = counted(workload.num_sequences, "prompt")
        return (
            f"plan: {plan.strategy}, {request.model.name}, {request.dtype} on {request.machine.device} "
            f"({self.profile.hardware.summary})\n"
            f"  {prompts} x {workload.prompt_tokens} tokens, {workload.gen_tokens} tokens each, "
            f"{batch_words(record)} at a time\n"
            f"  {self._policy()}\n" + (f"  lossy: {lossy}\n" if lossy else "")
        )

    def tables(self) -> Iterator[PlanTable]:
        """Placement, room, bytes over the links, time by resource."""
        rooms = self.rooms()
        yield PlanTable(
            title="",
            columns=("what lies where", *(room.name for room in rooms)),
            rows=[
                (_KINDS[kind], *_shares([sum(sizes[tier] for tier in room.tiers) for room in rooms]))
                for kind, sizes in self.placement_bytes().items()
            ],
        )
        yield PlanTable(
            title="",
            columns=("room", *(room.name for room in rooms)),
            rows=[
                ("may take", *(gib(room.limit_bytes) for room in rooms)),
                ("takes at most", *(gib(room.peak_bytes) for room in rooms)),
                ("headroom", *(_signed(room.headroom_bytes) for room in rooms)),
            ],
        )
        estimate = self.plan.predicted
        if estimate is not None and (links := self._link_rows(estimate)):
            yield PlanTable(
                title="",
                columns=("bytes over each link", "prefill", "decode", "for a token of decode"),
                rows=links,
            )
        if estimate is not None:
            yield from _time_tables(estimate, "")
        elif self.plan.limit is not None:
            yield from _time_tables(self.plan.limit, " at the limit")

    def verdict(self) -> str:
        """What came out, what binds, how far from the best it can be; and the policies that lost, and why."""
        return "\n".join([*self._verdict(), *self._by_hand(), *self._runners_up()])

    def _policy(self) -> str:
        details = self.plan.details
        if policy := details.get("policy"):
            pinned = "page-locked" if policy["pin_weight"] else "not page-locked"
            return f"policy: {_policy_text(policy)}; weights in host memory {pinned}"
        places = list(details.get("device_map", {}).values())
        names = {"cpu": "in host memory", "disk": "on disk"}
        counts = {place: places.count(place) for place in dict.fromkeys(places)}
        if len(counts) <= 1:
            return "policy: the whole model on the device that computes"
        return "policy: modules " + ", ".join(
            f"{count} {names.get(place, 'on the GPU')}" for place, count in counts.items()
        )

    def _link_rows(self, estimate: CostEstimate) -> list[tuple[str, ...]]:
        each = self.bytes_per_token()
        return [
            (
                title,
                gib(estimate.prefill_moved_bytes.get(link, 0.0)),
                gib(estimate.decode_moved_bytes.get(link, 0.0)),
                gib(each[link]) if link in each else "-",
            )
            for link, title in _LINKS.items()
            if estimate.prefill_moved_bytes.get(link) or estimate.decode_moved_bytes.get(link)
        ]

    def _verdict(self) -> Iterator[str]:
        plan, workload = self.plan, self.plan.request.workload
        if estimate := plan.predicted:
            steps = -(-workload.num_sequences // plan.batch_size) * (workload.gen_tokens - 1)
            step = f", {_seconds(estimate.decode_s / steps)} a step" if steps else ""
            yield (
                f"predicted       {estimate.generation_tok_s:,.2f} tok/s: prefill {_seconds(estimate.prefill_s)}, "
                f"decode {_seconds(estimate.decode_s)}{step}"
            )
        else:
            yield "predicted       nothing for this strategy here"
        if limit := plan.limit:
            yield (
                f"physical limit  {limit.generation_tok_s:,.2f} tok/s with this placement (prefill bound by "
                f"{limit.prefill_bound}, decode by {limit.decode_bound})"
            )
        bound = self.binding()
        words = [
            f"{phase} by {bound[phase]['resource']} (at work {bound[phase]['busy']:.0%} of the time)"
            for phase in ("prefill", "decode")
            if phase in bound and plan.predicted
        ]
        words.append(f"{bound['memory']['name']} is {bound['memory']['full']:.0%} full")
        yield "bound           " + "; ".join(words)
        if search := plan.details.get("search"):
            yield (
                f"search          {search['cuts']} cuts into micro-batches, {search['simulated']} policies simulated; by this "
                f"model none of them takes less than {_seconds(search['bound_s'])}, this one {search['gap']:.1%} more"
            )

    def _by_hand(self) -> Iterator[str]:
        """The options that ask for the same policy, in lines that a shell takes as one."""
        if keys := self.flexgen_keys():
            settings = [f"--set {key}={_toml(value)}" for key, value in keys.items()]
            lines = ["-s flexgen", *(" ".join(settings[at : at + 3]) for at in range(0, len(settings), 3))]
            yield ""
            yield "the same by hand"
            yield " \\\n".join(f"  {line}" for line in lines)

    def _runners_up(self) -> Iterator[str]:
        runners_up = self.plan.details.get("search", {}).get("runners_up", [])
        if runners_up:
            yield ""
            yield "runners-up (shares: % on the compute device/in host memory/on disk)"
        for each in runners_up:
            slower = each["slower_by"]
            how = f"{abs(slower):.1%} {'slower' if slower >= 0 else 'faster'}"
            yield f"  {each['generation_tok_s']:,.2f} tok/s, {how}: {each['why']}"
            shares = (f"{_KINDS[kind]} {_mix(each, kind)}" for kind in SHORT)
            lossy = "".join(f", {loss}" for loss in policy_losses(each))
            yield f"    {_policy_text(each)}{lossy}; {', '.join(shares)}"


def _phases(estimate: CostEstimate) -> Iterator[tuple[str, str, Mapping[str, float], float]]:
    yield "prefill", estimate.prefill_bound, estimate.prefill_busy_s, estimate.prefill_s
    yield "decode", estimate.decode_bound, estimate.decode_busy_s, estimate.decode_s


def _time_tables(estimate: CostEstimate, how: str) -> Iterator[PlanTable]:
    for phase, bound, busy_s, seconds in _phases(estimate):
        if not seconds:
            continue
        yield PlanTable(
            title="",
            columns=(f"{phase}{how}", _seconds(seconds), "at work", ""),
            rows=[
                (name, _seconds(busy), f"{busy / seconds:.0%}", _bar(busy / seconds, binds=name == bound))
                for name, busy in sorted(busy_s.items(), key=lambda item: -item[1])
                if busy > 0
            ],
        )


def _bar(share: float, *, binds: bool) -> str:
    bar = "#" * round(_BAR * min(share, 1.0))
    return f"{bar} binds" if binds else bar


def _shares(sizes: Sequence[int]) -> Iterator[str]:
    total = sum(sizes)
    for size in sizes:
        yield f"{gib(size)} ({size / total:.0%})" if size else "-"


def _signed(num_bytes: int) -> str:
    return gib(num_bytes) if num_bytes >= 0 else f"-{gib(-num_bytes)}"


def _policy_text(policy: Mapping[str, Any]) -> str:
    count, size = policy["num_micro_batches"], policy["micro_batch_size"]
    words = [f"{count} micro-batch{'es' if count > 1 else ''} of {size}"]
    words.append(
        f"{policy['overlap']} load{'s' if policy['overlap'] > 1 else ''} ahead"
        if policy["overlap"]
        else "no overlap"
    )
    words += special_words(policy)
    return ", ".join(words)


def _toml(value: bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.12g}"


def _mix(policy: Mapping[str, Any], kind: str) -> str:
    """Percent on device, host and disk."""
    return "/".join(f"{policy[share_key(kind, tier)]:g}" for tier in ("gpu", "cpu", "disk"))


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
