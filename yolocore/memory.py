"""How much memory is left for training, and whether an error says that there was too little."""

import resource
import sys
from pathlib import Path

import torch

_CGROUP_2 = Path("/sys/fs/cgroup")
_MARKS = ("can't allocate memory", "std::bad_alloc", "Insufficient memory")
_CGROUP_1 = Path("/sys/fs/cgroup/memory")


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where the system does not say.

    On the CPU what the kernel calls available, or what the cgroup (a container's limit) leaves, whichever is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    found = [left for left in (_available(), _left_in_cgroup()) if left is not None]
    return min(found, default=None)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held on a device so far (the CPU: of all its memory)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: also on the CPU, where torch and OpenCV have no class of their own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(mark in str(error) for mark in _MARKS)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_cgroup() -> int | None:
    """What the limit of this process's cgroup leaves, cached files counted as free; None without a limit."""
    for folder, limit, usage in (
        (_CGROUP_2, "memory.max", "memory.current"),
        (_CGROUP_1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        allowed, used = _number(folder / limit), _number(folder / usage)
        if allowed is not None and used is not None:
            return max(0, allowed - used + _reclaimable(folder / "memory.stat"))
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
