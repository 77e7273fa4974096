"""What a CUDA stream and the host share beyond copies: C functions called in a stream's order, and host memory that kernels use.

Knows nothing of what is called or kept there.
"""

import ctypes
import functools

import torch

from flexllmgen.errors import OffloadError


def call_in_order(stream: torch.cuda.Stream, function: int, argument: int) -> None:
    """Queues a C function `void f(void*)`: it runs on a thread of the driver's after all earlier work of the stream.

    Later work of the stream waits for it, this thread does not. It must not call CUDA; what `argument` points to must stay
    until it has run.

    Raises:
        OffloadError: the driver refuses.
    """
    code = _driver().cuLaunchHostFunc(stream.cuda_stream, function, argument)
    if code:
        raise OffloadError(
            f"the driver cannot queue work of the CPU (error {code}); set cpu_cache_compute = false"
        )


def mapped(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same memory as a tensor of the device: kernels read and write it over the link, without a copy engine's queue.

    Args:
        host: flat bytes in page-locked memory; without an accelerator it is returned as it is.
    """
    if device.type != "cuda":
        return host
    view = torch.as_tensor(_HostBytes(host), device=device)
    assert view.data_ptr() == host.data_ptr(), "a copy was made"
    return view


class _HostBytes:
    """Page-locked memory under the protocol by which libraries hand over a device's arrays; its address is the device's too."""

    def __init__(self, host: torch.Tensor) -> None:
        self._kept = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 2,
        }


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchHostFunc.restype = ctypes.c_int
    driver.cuLaunchHostFunc.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return driver
