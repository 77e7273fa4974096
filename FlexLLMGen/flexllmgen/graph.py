"""RecordedDecode: the decode step of a block that lies wholly on the device, recorded as a CUDA graph.

With nothing to stream, a step of a few sequences is hundreds of kernels of a few microseconds each, and starting them
one by one takes several times as long as running them. The record covers the embedding and the layers; the head
stays outside, so that any sampling works. What changes from step to step lies in buffers on the device.
"""

# B sequences of one micro-batch  S positions there is room for

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flexllmgen.models.decoder import Decoder, Span


@dataclass(frozen=True, slots=True)
class Buffers:
    """What a recorded step reads of one micro-batch."""

    ids_B1: torch.Tensor
    positions_B1: torch.Tensor
    bias_B11S: torch.Tensor


class RecordedDecode:
    """One recorded step for micro-batches of given sizes.

    Args:
        context: positions there is room for; attention runs over all of them, hidden ones masked.
    """

    def __init__(
        self, counts: Sequence[int], context: int, decoder: Decoder, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._context, self._decoder = context, decoder
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self.buffers = [
            Buffers(
                torch.zeros(count, 1, dtype=torch.int64, device=device),
                torch.zeros(count, 1, dtype=torch.int64, device=device),
                torch.zeros(count, 1, 1, context, dtype=dtype, device=device),
            )
            for count in counts
        ]
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, spans: Sequence[Span], position: int) -> None:
        """A new block: its prompts are done, `position` is the next to be computed."""
        self._row.fill_(position)
        for span, buffers in zip(spans, self.buffers, strict=True):
            buffers.positions_B1.copy_(span.positions_BT[:, -1:] + 1)
            buffers.bias_B11S.fill_(float("-inf"))
            visible = buffers.bias_B11S[:, 0, 0, :position]
            if span.keep_BT is None:
                visible.fill_(0.0)
            else:
                visible.masked_fill_(span.keep_BT, 0.0)
            buffers.bias_B11S[..., position] = 0.0

    def advance(self) -> None:
        """The next position of the same block."""
        self._row.add_(1)
        for buffers in self.buffers:
            buffers.positions_B1.add_(1)
            buffers.bias_B11S.index_fill_(3, self._row, 0.0)

    def run(self, work: Callable[[int, Span], None]) -> None:
        """Replays the step; the first time records what `work` does for each (micro-batch, span)."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._work(work)
            self._graph = graph
        self._graph.replay()

    def _work(self, work: Callable[[int, Span], None]) -> None:
        for index, buffers in enumerate(self.buffers):
            cos, sin = self._decoder.rotations(buffers.positions_B1)
            span = Span(
                first=self._context - 1,
                prompt=False,
                positions_BT=buffers.positions_B1,
                cos=cos,
                sin=sin,
                bias_B11S=buffers.bias_B11S,
                row=self._row,
            )
            work(index, span)
