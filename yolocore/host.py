"""What this host has to share: memory, cores, and folders for caches and for sockets."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Literal

from yolocore.errors import InputError

WORKERS_VARIABLE = "YOLOSEARCH_WORKERS_ON_HOST"
"""How many trainers share this host; the launcher says so."""
CACHE_VARIABLE = "YOLOSEARCH_CACHE_DIR"
MAX_LOADERS = 8
"""Loader processes per trainer beyond which a GPU is hardly ever still waiting."""
BATCHES_PER_LOADER = 4
"""Batches that may wait per loader process: two for training, and as much of validation's."""
_SHARED_MEMORY_PART = 0.8
SOCKET_FOLDER_LENGTH = 60
"""Longest folder in which multiprocessing can make its sockets: their whole path has about 100 characters."""
_NO_LIMIT = 2**60
_log = logging.getLogger(__name__)

LoaderCount = int | Literal["auto"]


# ------------------------------------------------------------------------------------------------ shares


def trainers_on_host() -> int:
    """How many trainers share this host, 1 where nobody says."""
    text = os.environ.get(WORKERS_VARIABLE, "")
    return max(1, int(text)) if text.isdecimal() else 1


def available_cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def loader_processes(
    wanted: LoaderCount, device_type: str, batch_bytes: int = 0, shared_memory: int | None = None
) -> int:
    """How many loader processes a trainer starts.

    Args:
        wanted: A number, or ``auto``: none on the CPU, which training itself keeps busy; otherwise a trainer's share of
            the cores, at most `MAX_LOADERS` and no more than shared memory has room for.
        device_type: cpu, cuda or mps.
        batch_bytes: Size of a batch, which travels through shared memory.
        shared_memory: Bytes of it; None: what is free here.

    Returns:
        0 means that batches are made in the trainer itself.
    """
    if wanted != "auto":
        return wanted
    if device_type == "cpu":
        return 0
    count = max(1, min(MAX_LOADERS, available_cores() // trainers_on_host()))
    room = free_shared_memory() if shared_memory is None else shared_memory
    if room is None or batch_bytes == 0:
        return count
    # Containers often have 64 MB only, and a process that finds it full is killed.
    return min(count, int(room * _SHARED_MEMORY_PART / trainers_on_host() / (BATCHES_PER_LOADER * batch_bytes)))


def free_shared_memory(folder: str = "/dev/shm") -> int | None:
    """Free bytes where processes share tensors, None where the system has no such place."""
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):
        return None
    return status.f_bavail * status.f_frsize


def memory_share(root: Path = Path("/")) -> int | None:
    """Bytes that one trainer may take: what is free, and at most its part of what the host or the container has.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        None where the system does not tell.
    """
    meminfo = _meminfo(root / "proc" / "meminfo")
    free, total = meminfo.get("MemAvailable"), meminfo.get("MemTotal")
    if free is None or total is None:
        return None
    for limit, used in _cgroup_limits(root):
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return min(free, total // trainers_on_host())


def _meminfo(file: Path) -> dict[str, int]:
    found = {}
    for line in _lines(file):
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0]) * 1024
    return found


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) in bytes of every control group that this process is in, versions 1 and 2."""
    mount = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _limits_upwards(mount, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits_upwards(mount / "memory", path, *names)


def _limits_upwards(mount: Path, path: str, limit: str, usage: str, idle: str) -> Iterator[tuple[int, int]]:
    """Of a group and those above it. In a container the path may be the host's: the mount is then the group itself."""
    folder = mount / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(mount):
            return
        allowed = _number(group / limit)
        if allowed is not None and allowed < _NO_LIMIT:
            # Files that were read count as used, and are let go when memory is needed.
            pages = sum(int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == idle)
            yield allowed, max(0, (_number(group / usage) or 0) - pages)


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------ folders


def cache_folder() -> Path:
    """Where decoded images are kept: the first of these that can be written.

    ``YOLOSEARCH_CACHE_DIR``; ``yolosearch`` in ``XDG_CACHE_HOME`` or ``~/.cache``; a folder of this user's in the
    system's temporary folder.

    Raises:
        InputError: None can be written, or the one that the variable names.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folders = [Path(named)] if named else list(_default_cache_folders())
    for folder in folders:
        if _is_writable(folder):
            return folder
    allowed = f"allowed: a folder that can be written, named by {CACHE_VARIABLE}, or cache ram or none"
    raise InputError(f"cache disk: cannot write to {', '.join(map(str, folders))}; {allowed}")


def _default_cache_folders() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME")
    yield Path(home) / "yolosearch" if home else Path("~/.cache/yolosearch").expanduser()
    user = os.getuid() if hasattr(os, "getuid") else 0
    yield Path(tempfile.gettempdir()) / f"yolosearch-cache-{user}"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cached_file(folder: Path, source: Path) -> Path:
    """Where the decoded pixels of an image are kept; another place once the image has changed.

    Args:
        folder: From `cache_folder`.
        source: The image.

    Returns:
        A path below `folder`, by the image's absolute path, size and time of change.

    Raises:
        OSError: The image does not exist.
    """
    status = source.stat()
    key = f"{os.path.abspath(source)}\0{status.st_size}\0{status.st_mtime_ns}"  # noqa: PTH100 - links stay
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:40]
    return folder / name[:2] / f"{name}.npy"


def use_short_socket_folder(candidates: Iterable[str | None] = ()) -> None:
    """Let multiprocessing make its sockets where their paths are short enough, also with a long TMPDIR.

    To be called before the first process is started; what is started inherits the folder. Other temporary files stay in
    TMPDIR.

    Args:
        candidates: Folders to try instead of the usual ones.

    Raises:
        InputError: TMPDIR is too long and no shorter folder can be written.
    """
    usual = tempfile.gettempdir()
    if os.name == "nt" or len(os.fsencode(usual)) <= SOCKET_FOLDER_LENGTH:
        return
    tried = tuple(candidates) or (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm")
    for folder in tried:
        if folder and len(os.fsencode(folder)) <= SOCKET_FOLDER_LENGTH and _is_temporary(Path(folder)):
            tempfile.tempdir = folder
            try:
                util.get_temp_dir()  # made once per process, private to this user, removed at its end
            finally:
                tempfile.tempdir = usual
            return
    raise InputError(
        f"TMPDIR: {usual} has {len(os.fsencode(usual))} characters, too many for sockets in it; "
        f"allowed: a folder of at most {SOCKET_FOLDER_LENGTH} characters that can be written"
    )


def _is_temporary(folder: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False
