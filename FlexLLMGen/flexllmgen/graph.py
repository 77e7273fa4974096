"""RecordedDecode: what a block's decode steps do on the device, recorded as CUDA graphs.

A decode step of a few sequences is hundreds of kernels of a few microseconds each, and starting them one by one takes
several times as long as running them. With everything on the device one graph holds the whole step; where anything is
streamed, each layer's work for a micro-batch is a graph of its own, and the loads and stores stay outside. The head
is never recorded, so that any sampling works. What changes from step to step lies in buffers on the device.
"""

# B sequences of one micro-batch  S positions there is room for

from collections.abc import Callable, Hashable, Sequence

import torch

from flexllmgen.models.decoder import Decoder, Span


class RecordedDecode:
    """Recorded work for micro-batches of given sizes.

    Args:
        context: positions there is room for; attention runs over all of them, hidden ones masked.
    """

    def __init__(
        self, counts: Sequence[int], context: int, decoder: Decoder, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._decoder = decoder
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids_B1 = [torch.zeros(count, 1, dtype=torch.int64, device=device) for count in counts]
        self.spans = []
        for count in counts:
            positions = torch.zeros(count, 1, dtype=torch.int64, device=device)
            cos, sin = decoder.rotations(positions)
            bias = torch.zeros(count, 1, 1, context, dtype=dtype, device=device)
            self.spans.append(
                Span(
                    first=context - 1,
                    prompt=False,
                    positions_BT=positions,
                    cos=cos,
                    sin=sin,
                    bias_B11S=bias,
                    row=self._row,
                )
            )
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def begin(self, spans: Sequence[Span], position: int) -> None:
        """A new block: its prompts are done, `position` is the next to be computed."""
        self._row.fill_(position)
        for prompt, span in zip(spans, self.spans, strict=True):
            bias_B11S = span.bias_B11S
            assert bias_B11S is not None
            span.positions_BT.copy_(prompt.positions_BT[:, -1:] + 1)
            bias_B11S.fill_(float("-inf"))
            visible = bias_B11S[:, 0, 0, :position]
            if prompt.keep_BT is None:
                visible.fill_(0.0)
            else:
                visible.masked_fill_(prompt.keep_BT, 0.0)
            bias_B11S[..., position] = 0.0
            self._rotate(span)

    def advance(self) -> None:
        """The next position of the same block."""
        self.run("advance", self._advance)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replays what was recorded as `key`; the first time records what `work` does."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._record(work)
        graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._row.device)
            # One pool for all: they run one after another, and leave nothing but what lies in buffers.
            self._pool = torch.cuda.graph_pool_handle()
        # Not torch.cuda.graph(): it waits for the device and collects garbage each time, and there are hundreds.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    def _advance(self) -> None:
        self._row.add_(1)
        for span in self.spans:
            assert span.bias_B11S is not None
            span.positions_BT.add_(1)
            span.bias_B11S.index_fill_(3, self._row, 0.0)
            self._rotate(span)

    def _rotate(self, span: Span) -> None:
        cos, sin = self._decoder.rotations(span.positions_BT)
        if cos is not None and sin is not None and span.cos is not None and span.sin is not None:
            span.cos.copy_(cos)
            span.sin.copy_(sin)
