"""Which host this is, and which of its workers are still alive."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from search.ledger import Ledger, WorkerState


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


def is_alive(pid: int, worker_id: str) -> bool:
    """Whether the process `pid` still is that worker, and not another program that got its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self").exists()
    return state != "Z" and worker_id.encode() in words


def release_dead_neighbours(ledger: Ledger, study: str) -> int:
    """Frees the tickets of workers on this host whose process is gone, without waiting for their leases.

    Returns:
        Number of tickets freed.
    """
    here = host_identity()
    return sum(
        ledger.release_worker(worker.id)
        for worker in ledger.workers(study)
        if worker.state is WorkerState.RUNNING and worker.host == here and not is_alive(worker.pid, worker.id)
    )
