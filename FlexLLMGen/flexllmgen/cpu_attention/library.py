"""The kernel's C interface as Python calls it, through ctypes, which holds no lock of Python's during a call."""

# B sequences  S positions  N query heads  K key heads  G groups of a row  H head dim

import ctypes
import math
from pathlib import Path

import torch

LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
_WIDTHS = (4, 8, 16, 16, 16)
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_POINTERS = (
    "q",
    "kv",
    "scale",
    "zero",
    "bias",
    "out",
    "k_new",
    "v_new",
    "codes_new",
    "scale_new",
    "zero_new",
)
_STRIDES = tuple(
    f"{of}{axis}_bytes" for of in ("", "scale_", "zero_") for axis in ("position", "half", "sequence")
)
_COUNTS = (
    "B",
    "N",
    "K",
    "H",
    "first",
    "length",
    "groups",
    "group_size",
    "q_type",
    "kv_type",
    "level",
    "threads",
)


Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A position of codes, before it is written: [B, 2, K * H], and its scales and zeros [B, 2, K * G]."""


class _Call(ctypes.Structure):
    """The kernel's struct of the same name, field by field (kernel.cpp)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_STRIDES, "bias_stride", *_COUNTS)),
        ("factor", ctypes.c_float),
    )


class Prepared:
    """A call of the kernel with all that it points to, which must be kept until it has run."""

    def __init__(self, library: ctypes.CDLL, call: _Call, kept: tuple[object, ...]) -> None:
        self._call, self._kept, self._attend = call, kept, library.flex_attend

    def __call__(self) -> None:
        self._attend(ctypes.byref(self._call))

    @property
    def in_c(self) -> tuple[int, int]:
        """Addresses of the C function and of its argument, for whoever calls it elsewhere."""
        function = ctypes.cast(self._attend, ctypes.c_void_p).value
        assert function is not None
        return function, ctypes.addressof(self._call)


class Kernel:
    """The library at `path`, with no better instructions than `most` of LEVELS.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path, most: str = LEVELS[-1]) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.flex_attend.restype = None
        self._library.flex_read.restype = ctypes.c_float
        self._library.flex_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        self.level: int = min(self._library.flex_level(), LEVELS.index(most))

    def level_for(self, head_dim: int) -> int | None:
        """The best instruction set whose vectors divide a head; none for odd sizes."""
        return next((level for level in range(self.level, -1, -1) if head_dim % _WIDTHS[level] == 0), None)

    def prepare(
        self,
        q_BNH: torch.Tensor,
        kv_S2BKH: torch.Tensor,
        length: int,
        bias_BS: torch.Tensor | None,
        *,
        first: int,
        out_BNH: torch.Tensor,
        threads: int,
        scale_S2BKG: torch.Tensor | None,
        zero_S2BKG: torch.Tensor | None,
        group_size: int,
        level: int,
        k_BKH: torch.Tensor | None = None,
        v_BKH: torch.Tensor | None = None,
        row: Row | None = None,
    ) -> Prepared:
        """A call with the arguments of `prepare_attention`, already checked, for the instructions of `level`."""
        sequences, heads, head_dim = q_BNH.shape
        call = _Call(
            q=q_BNH.data_ptr(),
            kv=kv_S2BKH.data_ptr(),
            out=out_BNH.data_ptr(),
            k_new=None if k_BKH is None else k_BKH.data_ptr(),
            v_new=None if v_BKH is None else v_BKH.data_ptr(),
            B=sequences,
            N=heads,
            K=kv_S2BKH.shape[3],
            H=head_dim,
            first=first,
            length=length,
            q_type=_TYPES[q_BNH.dtype],
            kv_type=_TYPES[kv_S2BKH.dtype],
            level=level,
            threads=threads,
            factor=1 / math.sqrt(head_dim),
        )
        if row is not None:
            call.codes_new, call.scale_new, call.zero_new = (part.data_ptr() for part in row)
        _set_strides(call, "", kv_S2BKH)
        if scale_S2BKG is not None and zero_S2BKG is not None:
            call.groups, call.group_size = scale_S2BKG.shape[-1], group_size
            call.scale, call.zero = scale_S2BKG.data_ptr(), zero_S2BKG.data_ptr()
            _set_strides(call, "scale_", scale_S2BKG)
            _set_strides(call, "zero_", zero_S2BKG)
        bias = None if bias_BS is None else bias_BS.to(torch.float32).contiguous()
        if bias is not None:
            call.bias, call.bias_stride = bias.data_ptr(), bias.stride(0)
        kept = (q_BNH, kv_S2BKH, out_BNH, scale_S2BKG, zero_S2BKG, bias, k_BKH, v_BKH, row)
        return Prepared(self._library, call, kept)

    def read(self, data: torch.Tensor, threads: int) -> float:
        """Reads a host tensor's bytes once, with the best instructions; returns their sum as fp32."""
        total: float = self._library.flex_read(data.data_ptr(), data.nbytes, threads, self.level)
        return total


def _set_strides(call: _Call, of: str, rows: torch.Tensor) -> None:
    for axis, name in enumerate(("position", "half", "sequence")):
        setattr(call, f"{of}{name}_bytes", rows.stride(axis) * rows.element_size())
