"""What a trainer may take of its host: memory within control groups, cores, folders."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from yolocore.errors import InputError
from yolocore.host import (
    CACHE_VARIABLE,
    MAX_LOADERS,
    WORKERS_VARIABLE,
    available_cores,
    cache_folder,
    cached_file,
    free_shared_memory,
    loader_processes,
    memory_share,
    use_short_socket_folder,
)

GB = 2**30


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (WORKERS_VARIABLE, CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def host(root: Path, groups: str, files: dict[str, str]) -> Path:
    """The files that the kernel shows, on a host with 64 GB of which 48 are free."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {48 * GB // 1024} kB\nHugePages: 0\n"
    )
    for name, text in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_memory_share_no_limit_what_is_free(tmp_path: Path) -> None:
    assert memory_share(host(tmp_path, "0::/\n", {})) == 48 * GB


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/pod/box\n", {"pod/box/memory.max": f"{8 * GB}\n", "pod/box/memory.current": f"{3 * GB}"}, 5),
        (
            "0::/pod/box\n",
            {"pod/box/memory.max": "max\n", "pod/memory.max": f"{6 * GB}", "pod/memory.current": f"{GB}"},
            5,
        ),
        (
            "0::/box\n",
            {
                "box/memory.max": f"{8 * GB}",
                "box/memory.current": f"{7 * GB}",
                "box/memory.stat": f"anon {GB}\ninactive_file {4 * GB}\n",
            },
            5,
        ),
        ("0::/box\n", {"box/memory.max": f"{8 * GB}", "box/memory.current": f"{9 * GB}"}, 0),
        (
            "9:cpu:/\n4:hugetlb,memory:/docker/1\n0::/\n",
            {"memory/docker/1/memory.limit_in_bytes": f"{4 * GB}", "memory/docker/1/memory.usage_in_bytes": f"{GB}"},
            3,
        ),
        # In the container the group's own folder is the mount, and no limit is a number beyond all memory.
        (
            "4:memory:/docker/1\n",
            {"memory/memory.limit_in_bytes": f"{4 * GB}", "memory/memory.usage_in_bytes": f"{GB}"},
            3,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 48),
    ],
)
def test_memory_share_control_groups_of_both_versions(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert memory_share(host(tmp_path, groups, files)) == expected * GB


def test_memory_share_several_trainers_each_its_part_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = host(tmp_path, "0::/\n", {})
    monkeypatch.setenv(WORKERS_VARIABLE, "4")
    assert memory_share(root) == 16 * GB
    monkeypatch.setenv(WORKERS_VARIABLE, "many")
    assert memory_share(root) == 48 * GB


def test_memory_share_of_this_machine_is_positive_and_unknown_elsewhere(tmp_path: Path) -> None:
    if Path("/proc/meminfo").exists():
        assert (memory_share() or 0) > 1_000_000
    assert memory_share(tmp_path) is None


def test_available_cores_counts_what_this_process_may_use() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_loader_processes_auto_none_on_cpu_else_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [loader_processes(3, kind) for kind in ("cpu", "cuda")] == [3, 3]
    assert loader_processes("auto", "cpu") == 0
    most = max(1, min(MAX_LOADERS, available_cores()))
    assert loader_processes("auto", "cuda") == most
    batch = 16 * 3 * 640 * 640
    assert loader_processes("auto", "cuda", batch, 64 * 2**20) == 0
    assert loader_processes("auto", "cuda", batch, 100 * 2**20) == 1
    assert loader_processes("auto", "cuda", batch, 2**40) == most
    monkeypatch.setenv(WORKERS_VARIABLE, "1000")
    assert loader_processes("auto", "cuda") == 1


def test_free_shared_memory_of_a_folder_and_of_none(tmp_path: Path) -> None:
    assert (free_shared_memory(str(tmp_path)) or 0) > 0
    assert free_shared_memory(str(tmp_path / "gone")) is None


def test_cache_folder_named_default_and_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "yolosearch"
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))  # stands for a file system that is read-only
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder().parent == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, str(blocker / "x"))
    with pytest.raises(InputError, match=r"cache disk: cannot write to .*file/x; allowed: .*YOLOSEARCH_CACHE_DIR"):
        cache_folder()


def test_cached_file_moves_when_the_image_changes(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"1")
    before = cached_file(tmp_path, image)
    assert before == cached_file(tmp_path, image)
    image.write_bytes(b"12")
    assert cached_file(tmp_path, image) != before


PROCESS = """
import multiprocessing, tempfile
from multiprocessing.connection import Listener, arbitrary_address
from yolocore.host import use_short_socket_folder

def main(pipe):
    with Listener(None, "AF_UNIX") as listener:
        pipe.send((listener.address, tempfile.gettempdir()))

if __name__ == "__main__":
    use_short_socket_folder()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=main, args=(there,))
    process.start()
    address, temporary = here.recv()
    process.join()
    print(address, temporary, sep="\\n")
"""


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no such sockets here")
def test_use_short_socket_folder_long_tmpdir_processes_start_and_files_stay(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 25)
    deep.mkdir()
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    environment = {**os.environ, "TMPDIR": str(deep)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    address, temporary = done.stdout.split()
    assert len(address) < 100
    assert temporary == str(deep)
    assert not Path(address).parent.exists()


def test_use_short_socket_folder_none_to_be_had_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("long" * 25)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(InputError, match=r"^TMPDIR: .* characters, too many for sockets in it; allowed: a folder"):
        use_short_socket_folder([str(tmp_path / "gone"), None])
    assert tempfile.gettempdir() == str(deep)
