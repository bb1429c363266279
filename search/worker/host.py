"""Which host this is, and which of its workers are still alive."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from search.ledger import Ledger, WorkerRow, WorkerState

_SEPARATOR = "@"


def host_identity() -> str:
    """A name for this host that two containers of the same host name do not share.

    Process ids only mean something inside one boot and one PID namespace, so both are part of the name.
    """
    marks = [platform.node()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        try:
            marks.append(str(path.readlink()) if path.is_symlink() else path.read_text())
        except OSError:
            continue
    return f"{platform.node()}#{hashlib.sha256(''.join(marks).encode()).hexdigest()[:8]}"


def process_identity() -> str:
    """This host and when this process started, in the kernel's ticks: with the process id it names one process ever."""
    return f"{host_identity()}{_SEPARATOR}{_start_ticks(os.getpid())}"


def is_alive(pid: int, identity: str) -> bool:
    """Whether the process `pid` of this host still is the one that gave itself `identity`.

    Args:
        pid: its process id; another program may have got that number meanwhile.
        identity: its `process_identity`.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_ticks(pid) == identity.rpartition(_SEPARATOR)[2]


def _start_ticks(pid: int) -> str:
    """When a process started; "dead" for one that has ended but was not waited for, "" where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]


def neighbours(workers: Iterable[WorkerRow]) -> list[WorkerRow]:
    """Those of some workers that are on this host."""
    here = host_identity()
    return [worker for worker in workers if worker.host.rpartition(_SEPARATOR)[0] == here]


def release_dead_neighbours(ledger: Ledger, study: str) -> int:
    """Frees the tickets of workers on this host whose process is gone, without waiting for their leases.

    Returns:
        Number of tickets freed.
    """
    here = host_identity()
    return sum(
        ledger.release_worker(worker.id)
        for worker in ledger.workers(study, WorkerState.RUNNING)
        if worker.host.rpartition(_SEPARATOR)[0] == here and not is_alive(worker.pid, worker.host)
    )
