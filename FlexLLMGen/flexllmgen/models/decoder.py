"""One decoder for all families: what differs between them is in ModelSpec and its traits.

Stages work in place on the hidden states of a micro-batch and are given their weights by name. Knows nothing
of tiers, slots or schedules.
"""

# B sequences  T new tokens  R = B * T rows  D model  N query heads  K key heads  H head dim  V vocabulary

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flexllmgen.attention import append, bias_between, decode_attention, prompt_attention
from flexllmgen.kv_cache import AnySegment, Segment
from flexllmgen.layer_inputs import InputSegment, made_positions
from flexllmgen.models.experts import grouped_experts
from flexllmgen.models.linear import linear
from flexllmgen.models.rope import angles, inverse_frequencies, rotate
from flexllmgen.spec import ModelSpec

Weights = Mapping[str, torch.Tensor]
Bring = Callable[[torch.Tensor], None]
"""Brings in the experts of rows, [R, experts of a row], so that later work of the device may use them."""

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The positions that a pass computes, for the sequences of one micro-batch or a part of them.

    Args:
        first: index of the first new position in the cache.
        prompt: the new positions attend to themselves only; else there is one, and it attends to the cache.
        keep_BT: false on padding of a prompt; None without padding.
        bias_B11S: added to a decode step's scores: minus infinity on padding; None without padding.
        row: where a recorded decode step writes, known to the device only; `first` is then the last there
            is room for, and the bias hides what is not written yet.
        all_cos, all_sin: rotations of all positions from the cache's first on, [B, S, 1, H / 2]; where keys are made anew.
    """

    first: int
    prompt: bool
    positions_BT: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    keep_BT: torch.Tensor | None = None
    bias_B11S: torch.Tensor | None = None
    row: torch.Tensor | None = None
    all_cos: torch.Tensor | None = None
    all_sin: torch.Tensor | None = None

    def part(self, start: int, stop: int) -> "Span":
        """The same positions of sequences [start, stop)."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Span(
            first=self.first,
            prompt=self.prompt,
            positions_BT=self.positions_BT[start:stop],
            cos=cut(self.cos),
            sin=cut(self.sin),
            keep_BT=cut(self.keep_BT),
            bias_B11S=cut(self.bias_B11S),
            row=self.row,
            all_cos=cut(self.all_cos),
            all_sin=cut(self.all_sin),
        )


class Projected(NamedTuple):
    """New positions on their way into attention: what enters the projections, and what comes out of them."""

    x_BTD: torch.Tensor
    q_BTNH: torch.Tensor
    k_BTKH: torch.Tensor
    v_BTKH: torch.Tensor


class Decoder:
    """The arithmetic of a model's stages.

    Args:
        attn_sparsity: share of the values that a decode step uses.
    """

    def __init__(
        self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, attn_sparsity: float = 1.0
    ) -> None:
        self.spec, self._dtype, self._sparsity = spec, dtype, attn_sparsity
        self._groups_experts = device.type == "cuda" and spec.num_experts > 0
        self._activation = _ACTIVATIONS[spec.activation]
        self._frequencies = (
            inverse_frequencies(spec.rope, spec.head_dim).to(device)
            if spec.rope is not None and spec.traits.positions == "rotary"
            else None
        )

    def rotations(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Cosines and sines for these positions; nothing for a model with learned positions."""
        if self._frequencies is None:
            return None, None
        return angles(positions_BT, self._frequencies, self._dtype)

    def embed(
        self, w: Weights, ids_BT: torch.Tensor, positions_BT: torch.Tensor, x_BTD: torch.Tensor
    ) -> None:
        """Writes the hidden states of `ids_BT` into `x_BTD`."""
        hidden = _rows(w["tokens"], ids_BT, x_BTD.device)
        if "project_in.weight" in w:
            hidden = linear(hidden, w["project_in.weight"])
        x_BTD.copy_(hidden)
        if "positions" in w:
            x_BTD += _rows(w["positions"], positions_BT + self.spec.position_offset, x_BTD.device)

    def attention(
        self,
        w: Weights,
        x_BTD: torch.Tensor,
        layer: int,
        span: Span,
        segments: Sequence[AnySegment],
        offset: int = 0,
    ) -> None:
        """The attention half of a layer, in place; appends its keys and values to `segments`.

        `offset` is the micro-batch's index of the first sequence of `x_BTD`.
        """
        new = self.project(w, x_BTD, span)
        mixed = self.attend(w, layer, span, segments, new, offset)
        if span.prompt:
            window = self.spec.sliding_window(layer)
            attended = prompt_attention(new.q_BTNH, new.k_BTKH, new.v_BTKH, span.keep_BT, window)
        else:
            attended = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        self.finish_attention(w, x_BTD, attended)

    def project(self, w: Weights, x_BTD: torch.Tensor, span: Span) -> Projected:
        """Queries, keys and values of the new positions."""
        spec = self.spec
        batch, tokens = x_BTD.shape[:2]
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        normed = self._norm(w, "attention_norm", x_BTD) if spec.pre_norm else x_BTD
        qkv = linear(normed, w["qkv.weight"], w.get("qkv.bias")).view(
            batch, tokens, heads + 2 * kv_heads, size
        )
        qk, v_BTKH = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
        if spec.traits.qk_norm:
            q = F.rms_norm(qk[:, :, :heads], (size,), w["q_norm.weight"], spec.norm_eps)
            k = F.rms_norm(qk[:, :, heads:], (size,), w["k_norm.weight"], spec.norm_eps)
            qk = torch.cat((q, k), dim=2)
        if span.cos is not None and span.sin is not None:
            qk = rotate(qk, span.cos, span.sin)
        return Projected(normed, qk[:, :, :heads], qk[:, :, heads:], v_BTKH)

    def attend(
        self,
        w: Weights,
        layer: int,
        span: Span,
        segments: Sequence[AnySegment],
        new: Projected,
        offset: int = 0,
    ) -> list[torch.Tensor]:
        """Appends the new positions to `segments`; what a decode step's queries find there, [B, N, H] of each."""
        x_BTD, q_BTNH, k_BTKH, v_BTKH = new
        batch, window = len(q_BTNH), self.spec.sliding_window(layer)
        mixed: list[torch.Tensor] = []
        for segment in segments:
            start, stop = max(segment.start - offset, 0), min(segment.stop - offset, batch)
            if start >= stop:
                continue
            mine = _part_of(segment, offset + start, offset + stop)
            if isinstance(mine, InputSegment):
                mine.write(x_BTD[start:stop], span.first)
                if not span.prompt:
                    for piece in mine.pieces():
                        first, last = piece.start - offset, piece.stop - offset
                        q_BNH = q_BTNH[first:last, 0]
                        mixed.append(self._attend_anew(w, span.part(first, last), piece, q_BNH, window))
                continue
            append(
                mine,
                k_BTKH[start:stop],
                v_BTKH[start:stop],
                span.first,
                span.row,
                prompt=span.prompt,
                keep_BT=None if span.keep_BT is None else span.keep_BT[start:stop],
            )
            if not span.prompt:
                bias = None if span.bias_B11S is None else span.bias_B11S[start:stop]
                q_BNH, length = q_BTNH[start:stop, 0], span.first + 1
                mixed.append(decode_attention(q_BNH, mine, length, bias, window, self._sparsity))
        return mixed

    def _attend_anew(
        self, w: Weights, span: Span, segment: InputSegment, q_BNH: torch.Tensor, window: int
    ) -> torch.Tensor:
        """What queries find in keys and values made of the layer's inputs; all of the segment's sequences."""
        length = span.first + 1
        first = max(0, length - window) if window else 0
        bias = None if span.bias_B11S is None else bias_between(span.bias_B11S, first, length)
        stop = first + made_positions(length - first, len(segment.x_SBD) - first)
        made = self._keys_and_values(w, span, segment.x_SBD[first:stop], first)
        return decode_attention(q_BNH, Segment(segment.start, segment.stop, made), length - first, bias, 0)

    def _keys_and_values(self, w: Weights, span: Span, x_SBD: torch.Tensor, first: int) -> torch.Tensor:
        """Keys and values of the span's sequences at positions from `first` on: [S, 2, B, K, H]."""
        spec = self.spec
        query, bias = spec.query_size, w.get("qkv.bias")
        # As rows: of a part of the sequences they are copied together.
        x_RD = x_SBD.flatten(0, 1)
        kv = linear(x_RD, w["qkv.weight"][query:], None if bias is None else bias[query:])
        kv_SB2KH = kv.view(*x_SBD.shape[:2], 2, spec.num_kv_heads, spec.head_dim)
        k_SBKH = projected = kv_SB2KH[:, :, 0]
        if spec.traits.qk_norm:
            k_SBKH = F.rms_norm(k_SBKH, (spec.head_dim,), w["k_norm.weight"], spec.norm_eps)
        if span.all_cos is not None and span.all_sin is not None:
            stop = first + len(x_SBD)
            cos, sin = (each[:, first:stop].transpose(0, 1) for each in (span.all_cos, span.all_sin))
            k_SBKH = rotate(k_SBKH, cos, sin)
        if k_SBKH is not projected:
            projected.copy_(k_SBKH)
        return kv_SB2KH.transpose(1, 2)

    def finish_attention(self, w: Weights, x_BTD: torch.Tensor, attended: torch.Tensor) -> None:
        """The rest of the attention half of a layer, in place: `attended` [B, T or none, N, H] through the output product."""
        flat = attended.reshape(*x_BTD.shape[:2], self.spec.query_size)
        self._add(w, "attention_norm", x_BTD, linear(flat, w["out.weight"], w.get("out.bias")))

    def mlp(self, w: Weights, x_BTD: torch.Tensor, bring: Bring | None = None) -> None:
        """The MLP half of a layer, in place. `bring` is told which experts the rows are sent to before any is used."""
        normed = self._norm(w, "mlp_norm", x_BTD) if self.spec.pre_norm else x_BTD
        if self.spec.num_experts:
            out = self._experts(w, normed.reshape(-1, self.spec.hidden_size), bring).view_as(x_BTD)
        elif self.spec.traits.gated:
            inner = self._gate(linear(normed, w["gate_up.weight"], w.get("gate_up.bias")))
            out = linear(inner, w["down.weight"], w.get("down.bias"))
        else:
            inner = self._activation(linear(normed, w["up.weight"], w.get("up.bias")))
            out = linear(inner, w["down.weight"], w.get("down.bias"))
        self._add(w, "mlp_norm", x_BTD, out)

    def logits(self, w: Weights, x_RD: torch.Tensor) -> torch.Tensor:
        """Scores of every token of the vocabulary for each row."""
        if self.spec.final_norm:
            x_RD = self._norm(w, "final_norm", x_RD)
        if "project_out.weight" in w:
            x_RD = linear(x_RD, w["project_out.weight"])
        return linear(x_RD, w["tokens" if self.spec.tied else "lm_head.weight"])

    def _norm(self, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        shape, eps = (self.spec.hidden_size,), self.spec.norm_eps
        if self.spec.traits.norm == "layer":
            return F.layer_norm(x, shape, w[f"{name}.weight"], w[f"{name}.bias"], eps)
        return F.rms_norm(x, shape, w[f"{name}.weight"], eps)

    def _add(self, w: Weights, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """The residual sum; a post-norm model (OPT-350m) normalises it."""
        x += out
        if not self.spec.pre_norm:
            x.copy_(self._norm(w, name, x))

    def _gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._activation(gate) * up

    def _experts(self, w: Weights, x_RD: torch.Tensor, bring: Bring | None) -> torch.Tensor:
        """Sends each row to its experts; each expert takes its rows at once."""
        weights, experts = self._route(w, x_RD)
        if bring is not None:
            bring(experts)
        if self._groups_experts:
            return grouped_experts(w, x_RD, weights, experts, self._gate, self.spec.num_experts)
        chosen = self.spec.experts_per_token
        order = experts.flatten().argsort(stable=True)
        rows = order // chosen
        # The host learns how many rows each expert has: one wait per layer.
        counts = experts.flatten().bincount(minlength=self.spec.num_experts).tolist()
        sorted_RD, outputs, start = x_RD[rows], [], 0
        for expert, count in enumerate(counts):
            if count:
                inner = self._gate(linear(sorted_RD[start : start + count], w[f"experts.{expert}.gate_up"]))
                outputs.append(linear(inner, w[f"experts.{expert}.down"]))
                start += count
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x_RD.dtype)
        return torch.zeros_like(x_RD).index_add_(0, rows, weighted)

    def _route(self, w: Weights, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's best experts (Shazeer et al. 2017), and what their outputs count."""
        scores = linear(x_RD, w["router.weight"]).float().softmax(dim=-1)
        weights, experts = scores.topk(self.spec.experts_per_token, dim=-1)
        if self.spec.normalise_experts:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, experts


def _rows(table: torch.Tensor, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Looks rows up where the table lies, and brings only them to the device."""
    return F.embedding(index.to(table.device), table).to(device)


def _part_of(segment: AnySegment, start: int, stop: int) -> AnySegment:
    return segment if (start, stop) == (segment.start, segment.stop) else segment.part(start, stop)
