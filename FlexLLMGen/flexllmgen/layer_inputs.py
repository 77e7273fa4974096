"""InputSegment: the layer's input of sequences whose keys and values are not kept, but made anew at each step.

What is kept is what enters the projections: the hidden states after the layer's norm. Where each head has keys of its
own that is half the bytes of keys and values, so that bringing it to the device takes half the time, and half the room until
then. Knows nothing of weights: the decoder makes keys and values of it.
"""

# B sequences  S positions there is room for  T new positions  D model

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexllmgen.units import round_up


def made_positions(positions: int, room: int) -> int:
    """Positions whose keys and values are made where so many are attended to, of those there is room for.

    Some more: the memory of steps that follow each other is then of one size, which the allocator gives again.

    >>> made_positions(513, room=544), made_positions(530, room=536)
    (544, 536)
    """
    return min(round_up(positions, 32), room)


@dataclass(frozen=True, slots=True)
class InputSegment:
    """Neighbouring sequences [start, stop) of a micro-batch whose layer inputs lie together.

    Keys and values are made for `at_once` sequences at a time, which bounds the memory that takes.
    """

    start: int
    stop: int
    x_SBD: torch.Tensor
    at_once: int

    def part(self, start: int, stop: int) -> "InputSegment":
        """Sequences [start, stop) of the micro-batch."""
        return InputSegment(start, stop, self.x_SBD[:, start - self.start : stop - self.start], self.at_once)

    def pieces(self) -> Iterator["InputSegment"]:
        """The sequences whose keys and values are made at once, one such part after another."""
        for start in range(self.start, self.stop, self.at_once):
            yield self.part(start, min(start + self.at_once, self.stop))

    def write(self, x_BTD: torch.Tensor, first: int) -> None:
        """Keeps the inputs of all the segment's sequences at positions from `first` on."""
        self.x_SBD[first : first + x_BTD.shape[1]].copy_(x_BTD.transpose(0, 1))
