"""The one loop: runs a schedule's steps over the stores and the decoder, for generation and for scoring."""

# B sequences of one micro-batch  T prompt positions  S cached positions  D model

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexllmgen.activations import ActivationStore
from flexllmgen.graph import RecordedDecode
from flexllmgen.host_attention import HostAttention
from flexllmgen.kv_cache import KVCache
from flexllmgen.memory.transfer import Event, current_stream, mark
from flexllmgen.models.decoder import Bring, Decoder, Span, Weights
from flexllmgen.placement import PlacementPlan
from flexllmgen.schedule import Action, Shape, Step, zigzag
from flexllmgen.splits import micro_batch_sizes
from flexllmgen.weights import WeightStore

Head = Callable[[Weights, torch.Tensor, int, int], torch.Tensor]
"""(weights, hidden [B, T, D], first sequence, token) -> what a micro-batch's pass comes to, [B, ...]."""


_PROBED_LOADS = 4


@dataclass(slots=True)
class _MicroBatch:
    """One micro-batch of a block under way."""

    first: int
    ids_BT: torch.Tensor
    span: Span
    result: torch.Tensor | None = None
    host_bias_BS: torch.Tensor | None = None
    attended: Sequence[torch.Tensor] = ()

    @property
    def count(self) -> int:
        return int(self.ids_BT.shape[0])


class Executor:
    """Runs blocks of requests.

    Args:
        plan: what was placed; its stages are the stages of the schedule.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        *,
        decoder: Decoder,
        weights: WeightStore,
        kv: KVCache,
        hidden: ActivationStore,
        host_attention: HostAttention,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._host_attention = host_attention
        self._plan, self._decoder, self._device, self._dtype = plan, decoder, device, dtype
        self._weights, self._kv, self._hidden = weights, kv, hidden
        self._recording = plan.recording if device.type == "cuda" else "none"
        self._records: dict[tuple[int, ...], RecordedDecode] = {}
        # A copy engine ends all copies that one stream has queued before it begins another's: a part of the weights waits
        # for the KV and hidden states that were asked for just before it, or these would come after the whole of a layer.
        self._wanted_sooner: list[Event] = []

    def run(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        num_tokens: int,
        head: Head,
        *,
        skipped: int = 0,
    ) -> Iterator[torch.Tensor]:
        """Yields what `head` makes of each pass: the prompt's first, then one new position after another.

        Args:
            ids_BT: all sequences of the block, padded on the left.
            mask_BT: false on padding; None without.
            head: run on the hidden states after the last layer. For a next pass it must give token ids [B].
            skipped: positions before the prompt that are taken for computed: steps then take what they would after a
                prompt so much longer, and mean nothing.
        """
        prompt = skipped + ids_BT.shape[1]
        self._wanted_sooner.clear()
        batches = self._begin(ids_BT, mask_BT, skipped)
        shape = self._shape(num_tokens, len(batches))
        record = self._record([batch.count for batch in batches])
        try:
            for step in zigzag(shape):
                if step.action in (Action.COMPUTE, Action.FINISH):
                    self._compute(step, batches, record, head)
                elif step.action is Action.EMIT:
                    yield self._emit(batches)
                    if step.token + 1 < num_tokens:
                        self._advance(batches, prompt + step.token, record)
                else:
                    self._move(step, shape, skipped, prompt)
        finally:
            # A consumer may stop early: loads that ran ahead must end before their slots are used again.
            self._weights.drain()
            try:
                self._host_attention.drain()
            finally:
                try:
                    self._kv.reset()
                finally:
                    self._hidden.reset()

    def probe_load(self, trials: int) -> tuple[int, float | None]:
        """A layer in the middle, and the seconds to bring its streamed weights in; None if all are resident.

        Between blocks only: it writes over a slot.
        """
        layers = [index for index, stage in enumerate(self._plan.stages) if stage.has_kv]
        middle = layers[len(layers) // 2]
        if not self._weights.streams(middle):
            return middle, None
        seconds = []
        for _ in range(trials):
            started = time.perf_counter()
            # Several at once: what it takes to start one and to hear of its end is no part of the rate.
            loads = [self._weights.load(middle, 0, 0, 1) for _ in range(_PROBED_LOADS)]
            loads[-1].synchronize()
            seconds.append((time.perf_counter() - started) / _PROBED_LOADS)
        self._weights.drain()
        return middle, statistics.median(seconds)

    def forget(self) -> None:
        """Gives back the memory of recorded steps."""
        self._records.clear()

    def _shape(self, num_tokens: int, num_micro_batches: int) -> Shape:
        stages = self._plan.stages
        return Shape(
            num_tokens=num_tokens,
            num_micro_batches=num_micro_batches,
            streamed_weights=[self._weights.streams(stage) for stage in range(len(stages))],
            streamed_kv=[stage.has_kv and self._plan.streams_kv(stage.layer) for stage in stages],
            streamed_hidden=self._hidden.streams,
            depth=self._plan.policy.overlap,
            spare_kv_slots=self._plan.spare_kv_slots,
            loaded_kv=[stage.has_kv and self._plan.loads_kv(stage.layer) for stage in stages],
            host_attention=[stage.has_kv and self._plan.attends_on_host for stage in stages],
        )

    def _begin(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, skipped: int) -> list[_MicroBatch]:
        count, prompt = ids_BT.shape
        padded = mask_BT is not None and not bool(mask_BT.all())
        ids_BT = ids_BT.to(self._device)
        mask = mask_BT.to(self._device, torch.bool) if padded and mask_BT is not None else None
        batches, first = [], 0
        self._hidden.begin(prompt)
        self._kv.begin(skipped, skipped + prompt)
        for size in micro_batch_sizes(count, self._plan.policy):
            keep = mask[first : first + size] if mask is not None else None
            if keep is None:
                positions = torch.arange(skipped, skipped + prompt, device=self._device).expand(size, prompt)
            else:
                positions = (keep.long().cumsum(dim=1) - 1).clamp(min=0)
            cos, sin = self._rotations(positions, same=keep is None)
            all_cos, all_sin = self._all_rotations(positions, same=keep is None)
            span = Span(
                first=skipped,
                prompt=True,
                positions_BT=positions,
                cos=cos,
                sin=sin,
                keep_BT=keep,
                all_cos=all_cos,
                all_sin=all_sin,
            )
            batch = _MicroBatch(first, ids_BT[first : first + size], span)
            if padded and mask_BT is not None and self._plan.attends_on_host:
                hidden = ~mask_BT[first : first + size].bool().cpu()
                batch.host_bias_BS = torch.zeros(size, self._plan.max_context)
                batch.host_bias_BS[:, :prompt].masked_fill_(hidden, float("-inf"))
            batches.append(batch)
            first += size
        return batches

    def _rotations(
        self, positions_BT: torch.Tensor, *, same: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rotations of each sequence's positions; made once where all have the `same`."""
        cos, sin = self._decoder.rotations(positions_BT[:1] if same else positions_BT)
        count = len(positions_BT)
        if cos is None or sin is None:
            return None, None
        return cos.expand(count, -1, -1, -1), sin.expand(count, -1, -1, -1)

    def _all_rotations(
        self, positions_BT: torch.Tensor, *, same: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rotations of all positions of sequences with such prompts, where keys are made anew."""
        if not self._plan.input_bytes:
            return None, None
        room, count = self._plan.max_context, len(positions_BT)
        if same:
            return self._rotations(torch.arange(room, device=self._device).expand(count, room), same=True)
        later = torch.arange(1, room - positions_BT.shape[1] + 1, device=self._device)
        return self._rotations(torch.cat((positions_BT, positions_BT[:, -1:] + later), dim=1), same=False)

    def _record(self, counts: Sequence[int]) -> RecordedDecode | None:
        """Where decode steps of such micro-batches are recorded; None where they cannot be."""
        if self._recording == "none":
            return None
        key = tuple(counts)
        if key not in self._records:
            context = self._plan.max_context
            self._records[key] = RecordedDecode(counts, context, self._decoder, self._device, self._dtype)
        return self._records[key]

    def _advance(self, batches: Sequence[_MicroBatch], position: int, record: RecordedDecode | None) -> None:
        """Turns each micro-batch to its next position: the token just chosen, at cache index `position`."""
        self._hidden.begin(1)
        if record is not None:
            if batches[0].span.prompt:
                record.begin([batch.span for batch in batches], position)
            else:
                record.advance()
            for batch, ids_B1, span in zip(batches, record.ids_B1, record.spans, strict=True):
                assert batch.result is not None
                ids_B1.copy_(batch.result[:, None])
                batch.ids_BT, batch.span = ids_B1, span
            return
        for batch in batches:
            assert batch.result is not None
            span = batch.span
            bias = span.bias_B11S
            if span.prompt and span.keep_BT is not None:
                bias = torch.zeros(
                    batch.count, 1, 1, self._plan.max_context, dtype=self._dtype, device=self._device
                )
                padding = ~span.keep_BT[:, None, None, :]
                bias[..., : padding.shape[-1]].masked_fill_(padding, float("-inf"))
            positions = span.positions_BT[:, -1:] + 1
            cos, sin = self._decoder.rotations(positions)
            batch.ids_BT = batch.result[:, None]
            batch.span = Span(
                first=position,
                prompt=False,
                positions_BT=positions,
                cos=cos,
                sin=sin,
                bias_B11S=bias,
                all_cos=span.all_cos,
                all_sin=span.all_sin,
            )

    def _move(self, step: Step, shape: Shape, skipped: int, prompt: int) -> None:
        """Starts a load or a store; the first pass computes positions [skipped, prompt)."""
        layer = self._plan.stages[step.stage].layer
        if step.action is Action.LOAD_WEIGHTS:
            self._weights.load(
                step.stage,
                step.slot,
                step.part,
                shape.num_micro_batches,
                experts=not self._chooses(step),
                after=self._wanted_sooner,
            )
        elif step.action is Action.LOAD_KV:
            self._kv.load(layer, step.micro_batch, step.slot, prompt + step.token - 1)
            self._wanted_sooner += self._kv.ready(step.slot, prompt=False)
        elif step.action is Action.STORE_KV:
            first, stop = (
                (skipped, prompt) if step.token == 0 else (prompt + step.token - 1, prompt + step.token)
            )
            self._kv.store(
                layer, step.micro_batch, step.slot, first, stop, self._computed, prompt=step.token == 0
            )
        elif step.action is Action.LOAD_HIDDEN:
            self._hidden.load(step.micro_batch, step.slot)
            self._wanted_sooner += self._hidden.ready(step.slot, first_stage=False)
        else:
            self._hidden.store(step.micro_batch, step.slot, self._computed)

    def _compute(
        self, step: Step, batches: Sequence[_MicroBatch], record: RecordedDecode | None, head: Head
    ) -> None:
        needs = [
            # The other micro-batches of a stage come after its first.
            *(self._weights.ready(step.slot) if not step.micro_batch else ()),
            *self._kv.ready(step.kv_slot, prompt=step.token == 0),
            *self._hidden.ready(step.hidden_slot, first_stage=step.stage == 0),
        ]
        if needs:
            stream = current_stream(self._device)
            for event in needs:
                event.order(stream)
        self._wanted_sooner.clear()
        if record is None or step.token == 0:
            self._work(step, batches[step.micro_batch], head)
        else:
            self._replay(step, batches, record, head)
        if max(step.slot, step.kv_slot, step.hidden_slot) >= 0:
            self._computed: Event = mark(self._device)
            self._weights.release(step.slot, self._computed)
            self._kv.release(step.kv_slot, self._computed)
            self._hidden.release(step.hidden_slot, self._computed)

    def _replay(self, step: Step, batches: Sequence[_MicroBatch], record: RecordedDecode, head: Head) -> None:
        """A recorded decode step's work: a layer's, or all at once when the first of it comes."""
        batch, kind = batches[step.micro_batch], self._plan.stages[step.stage].kind
        layers = self._recording == "layers"
        if kind == "head" or (layers and kind == "embed"):
            self._work(step, batch, head)
        elif layers:
            # Views of weights differ with the slot; all else of a stage and a micro-batch stays where it is. They are made
            # now: a mixture's table of addresses is copied up, which a graph cannot hold.
            self._weights.tensors(step.stage, step.slot)
            record.run((step.stage, step.micro_batch, step.slot), lambda: self._work(step, batch, head))
        elif step.stage == 0 and step.micro_batch == 0:

            def whole_step() -> None:
                # Stage by stage, as everywhere: what is compressed is turned back for all micro-batches at once.
                for stage in range(len(self._plan.stages) - 1):
                    for index, each in enumerate(batches):
                        self._work(Step(Action.COMPUTE, step.token, stage, index), each, head)

            record.run("step", whole_step)

    def _work(self, step: Step, batch: _MicroBatch, head: Head) -> None:
        """The arithmetic of a compute step."""
        stage = self._plan.stages[step.stage]
        if step.micro_batch == 0 and step.action is Action.COMPUTE:
            self._weights.begin(step.stage, step.slot, experts=not self._chooses(step))
        w = self._weights.tensors(step.stage, step.slot)
        x_BTD = self._hidden.hidden(step.micro_batch, step.hidden_slot, batch.count)
        if stage.kind == "embed":
            for start, stop in self._parts(batch, x_BTD.shape[1]):
                ids_BT, positions_BT = batch.ids_BT[start:stop], batch.span.positions_BT[start:stop]
                self._decoder.embed(w, ids_BT, positions_BT, x_BTD[start:stop])
        elif stage.kind == "head":
            batch.result = head(w, x_BTD, batch.first, step.token)
        else:
            self._layer(stage.kind, stage.layer, w, x_BTD, step, batch)

    def _layer(
        self, kind: str, layer: int, w: Weights, x_BTD: torch.Tensor, step: Step, batch: _MicroBatch
    ) -> None:
        """A layer or a half of one; a prompt in parts of whole sequences, which bounds the workspace."""
        if self._plan.attends_on_host and kind != "mlp" and not batch.span.prompt:
            if step.action is Action.COMPUTE:
                self._begin_layer(layer, w, x_BTD, step, batch)
            else:
                self._finish_layer(kind, layer, w, x_BTD, step, batch)
            return
        segments = (
            self._kv.segments(layer, step.micro_batch, step.kv_slot, batch.count)
            if kind in ("layer", "attention")
            else ()
        )
        for start, stop in self._parts(batch, x_BTD.shape[1]):
            part = batch.span if stop - start == batch.count else batch.span.part(start, stop)
            if kind in ("layer", "attention"):
                self._decoder.attention(w, x_BTD[start:stop], layer, part, segments, start)
            if kind in ("layer", "mlp"):
                self._decoder.mlp(w, x_BTD[start:stop], self._bring(step))

    def _begin_layer(
        self, layer: int, w: Weights, x_BTD: torch.Tensor, step: Step, batch: _MicroBatch
    ) -> None:
        """A decode step up to its attention: the CPU is sent its part, the device attends to the rest."""
        new = self._decoder.project(w, x_BTD, batch.span)
        self._host_attention.submit(
            layer,
            step.micro_batch,
            batch.count,
            new.q_BTNH[:, 0],
            new.k_BTKH[:, 0],
            new.v_BTKH[:, 0],
            batch.span.first,
            batch.host_bias_BS,
        )
        segments = self._kv.segments(layer, step.micro_batch, step.kv_slot, batch.count, host=False)
        batch.attended = self._decoder.attend(w, layer, batch.span, segments, new)

    def _finish_layer(
        self, kind: str, layer: int, w: Weights, x_BTD: torch.Tensor, step: Step, batch: _MicroBatch
    ) -> None:
        """The rest of it, with what the CPU found."""
        parts, on_host = list(batch.attended), self._host_attention.result(step.micro_batch)
        if on_host is not None:
            # Sequences on the device come first, then those in host memory, then those on disk.
            parts.insert(int(self._kv.begins_on_device(layer, step.micro_batch)), on_host)
        batch.attended = ()
        self._decoder.finish_attention(w, x_BTD, parts[0] if len(parts) == 1 else torch.cat(parts))
        if kind == "layer":
            self._decoder.mlp(w, x_BTD, self._bring(step))

    def _chooses(self, step: Step) -> bool:
        """Whether a step uses only the experts that are chosen in it: a prompt's rows are sent to all of them."""
        return step.token > 0 and self._weights.chooses(step.stage)

    def _bring(self, step: Step) -> Bring | None:
        """What brings in a step's experts. The host learns the choice: one wait for each layer and micro-batch."""
        if not self._chooses(step):
            return None
        return lambda experts_RK: self._weights.bring(step.stage, step.slot, experts_RK.flatten().tolist())

    def _parts(self, batch: _MicroBatch, columns: int) -> Iterator[tuple[int, int]]:
        """Ranges of sequences that are computed at once."""
        at_once = max(1, self._plan.chunk_tokens // columns) if batch.span.prompt else batch.count
        for start in range(0, batch.count, at_once):
            yield start, min(start + at_once, batch.count)

    def _emit(self, batches: Sequence[_MicroBatch]) -> torch.Tensor:
        """The block's results on the host. The only wait, after the next token's first loads were issued."""
        results = [batch.result for batch in batches if batch.result is not None]
        return (results[0] if len(results) == 1 else torch.cat(results)).cpu()
