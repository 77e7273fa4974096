"""The kernel's C interface as Python calls it, through ctypes, which holds no lock of Python's during a call."""

# B sequences  S positions  N query heads  K key heads  G groups of a row  H head dim

import ctypes
import math
from pathlib import Path

import torch

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_PRODUCTS = (*_AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi")
_COMPILED = {"generic": (), "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _PRODUCTS, "amx": _PRODUCTS}
"""What the compiler is told for each level; tiles are written in the assembler's words."""
LEVELS = tuple(_COMPILED)
"""Sets of instructions, each the best of some processors. A library is built for one of them."""
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


def compiled(level: str) -> tuple[str, ...]:
    """The compiler's flags for the library of one of LEVELS."""
    return (f"-DFLEX_LEVEL={LEVELS.index(level)}", *_COMPILED[level])


def level_for(head_dim: int, best: str) -> str | None:
    """The best of LEVELS up to `best` whose vectors divide a head; none for odd sizes.

    >>> level_for(128, "amx"), level_for(24, "amx"), level_for(6, "amx")
    ('amx', 'avx2', None)
    """
    able = range(LEVELS.index(best), -1, -1)
    return next((LEVELS[level] for level in able if head_dim % _WIDTHS[level] == 0), None)


def best_level(path: Path) -> str:
    """What this processor and the system allow, by the library of processor.cpp at `path`.

    Raises:
        OSError: it cannot be loaded.
    """
    level: int = ctypes.CDLL(str(path)).flex_best_level()
    return LEVELS[level]


class Kernel:
    """The library at `path`, of a level that the processor has.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.flex_attend.restype = None
        self._library.flex_read.restype = ctypes.c_float
        self._library.flex_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

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
        k_BKH: torch.Tensor | None = None,
        v_BKH: torch.Tensor | None = None,
        row: Row | None = None,
    ) -> Prepared:
        """A call with the arguments of `prepare_attention`, already checked; heads are whole vectors."""
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
        """Reads a host tensor's bytes once; returns their sum as fp32."""
        total: float = self._library.flex_read(data.data_ptr(), data.nbytes, threads)
        return total


def _set_strides(call: _Call, of: str, rows: torch.Tensor) -> None:
    for axis, name in enumerate(("position", "half", "sequence")):
        setattr(call, f"{of}{name}_bytes", rows.stride(axis) * rows.element_size())
