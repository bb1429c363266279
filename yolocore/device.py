"""Which device to train on, and in which precision."""

import ctypes
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from yolocore.errors import DeviceError

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BLOCK, _LARGEST_KEPT_HEAP = 2**28, 2**29


def available_devices() -> tuple[str, ...]:
    """The devices of this machine by name, best first; `cpu` is always the last."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return (*cuda, *mps, "cpu")


def resolve_device(name: str) -> torch.device:
    """The device that a user's word names.

    Args:
        name: `auto` (the first CUDA device, else mps, else the CPU), `cpu`, `cuda` (the first), `cuda:N` or `mps`.

    Raises:
        DeviceError: if the word is unknown or this machine has no such device; names what it has.
    """
    devices = available_devices()
    wanted = {"auto": devices[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in devices:
        raise DeviceError(f"device '{name}': not on this machine; allowed: auto, {', '.join(reversed(devices))}")
    return torch.device(wanted)


def supported_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions that work on a device, what `auto` takes first.

    The CPU takes bfloat16 by itself only where its instructions have it, since emulation is slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "fp16", "fp32") if native else ("fp16", "fp32")
    if device.type == "mps":
        return ("fp32", "fp16")
    return ("bf16", "fp32") if _cpu_has_bfloat16() else ("fp32", "bf16")


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision that a user's word names on a device.

    Args:
        name: `auto`, `fp32`, `bf16` or `fp16`.
        device: Where the model runs.

    Raises:
        DeviceError: if the word is unknown or the device cannot do it; names what it can.
    """
    supported = supported_precisions(device)
    if name == "auto":
        return supported[0]
    for precision in supported:
        if precision == name:
            return precision
    raise DeviceError(f"precision '{name}' on {device.type}: allowed: auto, {', '.join(sorted(supported))}")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which the model computes in `precision`; fp32 leaves everything as it is."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process reuse the memory of large tensors instead of handing it back after every operation.

    On the CPU torch takes each tensor from malloc, and glibc gives blocks above 32 MB, and the end of its heap, back to
    the system at once: every step then faults in hundreds of megabytes of zeroed pages anew. At most half a gigabyte
    stays with the process.

    Returns:
        Whether the C library took the advice; only glibc knows it.
    """
    try:
        advise = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(advise(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)) and bool(advise(_M_TRIM_THRESHOLD, _LARGEST_KEPT_HEAP))


def images_as_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels 0..255 as the fractions 0..1 that the network takes, in one copy.

    Args:
        images: uint8 [B, 3, H, W].
        dtype: of the result; bfloat16 and float16 get what float32 would be rounded to.

    Returns:
        [B, 3, H, W], channels last (but for float64, which has no kernels for it).
    """
    layout = torch.contiguous_format if dtype == torch.float64 else torch.channels_last
    return images.to(dtype, memory_format=layout).div_(255)


def input_dtype(device: torch.device, precision: Precision, weights: torch.dtype) -> torch.dtype:
    """The type in which images best enter the network: autocast's on the CPU, where another copy costs time.

    Elsewhere that of the weights, which is right with and without autocast (torch ignores CUDA's on a host without it).
    """
    return _DTYPES.get(precision, weights) if device.type == "cpu" else weights
