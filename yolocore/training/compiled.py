"""The network's forward and backward pass as torch.compile makes them, for who wants to wait for it."""

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from yolocore.errors import DeviceError
from yolocore.model import YOLOv5
from yolocore.training.config import CompilerName

Forward = Callable[[Tensor], list[Tensor]]

SHAPES = 64
"""Numbers of slots and sizes of batches for which one process may compile; beyond that torch would silently stop."""


def compiled(model: YOLOv5, how: CompilerName) -> Forward:
    """The model's training pass.

    It is compiled when it is first called, anew for each number of slots and for the smaller last batch of an epoch,
    and kept on disk by torch for the next process. Packs of the same number of slots share what was compiled.

    Args:
        model: in training mode when it is called.
        how: none leaves the model as it is; inductor fuses operations; cudagraphs also records them as CUDA graphs.
    """
    if how == "none":
        return model
    mode = "reduce-overhead" if how == "cudagraphs" else "default"
    forward: Forward = torch.compile(model, dynamic=False, mode=mode, recompile_limit=SHAPES)  # type: ignore[call-overload]
    if how == "inductor":
        return forward

    def recorded(pixels: Tensor) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return forward(pixels)

    return recorded


def require_compiler(how: CompilerName, device_type: str) -> None:
    """Checks that a host can compile for a type of device (cpu, cuda or mps).

    Raises:
        DeviceError: It cannot; says what is missing.
    """
    if how == "cudagraphs" and device_type != "cuda":
        raise DeviceError(f"compile 'cudagraphs' on {device_type}: allowed: none, inductor; graphs need a CUDA device")
    if how == "none":
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # where torch looks
    if device_type == "cpu" and shutil.which(compiler) is None:
        raise DeviceError(f"compile '{how}': no {compiler} here; allowed: none, or install it, or name another in CXX")
