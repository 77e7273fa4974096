"""What a search has looked at: simulated where that may matter, else known by the least that it takes. Pure."""

import heapq
from collections.abc import Callable, Iterable, Iterator

from profiling.cost_model import engine_cost
from profiling.profile import HardwareProfile
from strategies.candidates import Candidate, Outline, with_preference


class Known:
    """What all variants' searches have looked at, in that order; most of it is only outlined."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile, self.simulated = profile, 0
        self.looked_at: list[Candidate | Outline] = []

    @property
    def found(self) -> Iterator[Candidate]:
        """What was simulated."""
        return (each for each in self.looked_at if isinstance(each, Candidate))

    def add(self, outline: Outline) -> Candidate | Outline:
        """Adds a policy, simulated if by the least that it takes it may be the preferred one."""
        preferred_s = min(map(with_preference, self.found), default=float("inf"))
        self.looked_at.append(outline)
        return outline if with_preference(outline) >= preferred_s else self.in_full(outline)

    def in_full(self, each: Candidate | Outline) -> Candidate:
        """The same, simulated."""
        if isinstance(each, Candidate):
            return each
        for index, known in enumerate(self.looked_at):
            if known is each:
                cost = engine_cost(each.placement, self.profile)
                assert cost is not None
                self.simulated += 1
                full = Candidate(policy=each.policy, placement=each.placement, cost=cost, cut=each.cut)
                self.looked_at[index] = full
                return full
        return next(known for known in self.found if known.policy == each.policy)

    def in_order(
        self, some: Iterable[Candidate | Outline], key: Callable[[Candidate | Outline], float]
    ) -> Iterator[Candidate]:
        """Some of them, simulated, from the least by `key` on; simulates no more than it is asked for.

        What is outlined takes longer than it says, so that it can only come later.
        """
        waiting = [(key(each), index, each) for index, each in enumerate(some)]
        heapq.heapify(waiting)
        while waiting:
            _, index, each = heapq.heappop(waiting)
            if isinstance(each, Candidate):
                yield each
            else:
                full = self.in_full(each)
                heapq.heappush(waiting, (key(full), index, full))
