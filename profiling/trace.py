"""When each resource does what in a simulated block: the simulation's own run, with every piece of work written down.

For pictures and for people; predictions need only the sums (`simulation.py`). Pure, like what it watches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexllmgen.placement import PlacementPlan
from flexllmgen.schedule import Action
from profiling.layer_times import LayerTimes
from profiling.profile import Rates
from profiling.simulation import Passes, _Clocks, _Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A resource at work for a step, from `start_s` to `end_s` since the block began.

    `resource` is one of the simulation's; `stage` counts the steps through the model, the embedding being 0.
    """

    resource: str
    action: Action
    token: int
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


def trace_block(
    plan: PlacementPlan,
    times: LayerTimes,
    rates: Rates,
    *,
    micro_batches: Sequence[int],
    contexts: Sequence[int],
) -> tuple[list[Span], Passes]:
    """The work of a block in the order in which it was issued, and what `simulate_block` gives for it."""
    simulation = _Traced(plan, times, rates, micro_batches, contexts)
    return simulation.spans, simulation.run()


class _Traced(_Simulation):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.spans: list[Span] = []
        clocks = _Watched(together=self.clocks.together, passes=self.clocks.passes)
        clocks.simulation = self
        self.clocks = clocks


class _Watched(_Clocks):
    simulation: _Traced

    def run(
        self, resource: str, lane: str, ready: float, seconds: float, *others: Any, **named: Any
    ) -> float:
        end = super().run(resource, lane, ready, seconds, *others, **named)
        if seconds > 0:
            step = self.simulation.step
            self.simulation.spans.append(
                Span(
                    resource=resource,
                    action=step.action,
                    token=step.token,
                    stage=step.stage,
                    # A part of a stage's weights comes in for each micro-batch; it serves all.
                    micro_batch=step.part if step.action is Action.LOAD_WEIGHTS else step.micro_batch,
                    start_s=end - seconds,
                    end_s=end,
                )
            )
        return end
