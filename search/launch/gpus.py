"""Which GPUs of this host its workers may use."""

from __future__ import annotations

import os

from search.launch.plan import GPU_VARIABLE
from yolocore.device import available_devices


def visible_gpus() -> tuple[str, ...]:
    """Values of CUDA_VISIBLE_DEVICES that each show one GPU, in the order in which `cuda:N` counts them.

    Where a scheduler set that variable (to numbers or UUIDs), only those that it lists.
    """
    count = sum(name.startswith("cuda:") for name in available_devices())
    listed = [entry.strip() for entry in os.environ.get(GPU_VARIABLE, "").split(",") if entry.strip()]
    return tuple(listed[:count] or map(str, range(count)))
