"""States of trials: whole or recognised as torn, in a folder and behind fsspec."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from search.checkpoints import CheckpointStore, remove_leftovers
from search.errors import UserInputError
from search.paths import StudyFolder
from yolocore.checkpoint import save_atomic
from yolocore.errors import CheckpointError


@dataclass(frozen=True)
class Backend:
    """A root and how to reach the files below it without the store."""

    root: str

    def store(self, **options: str) -> CheckpointStore:
        return CheckpointStore(self.root, "s", **options)

    def path(self, reference: str) -> str:
        return f"{self.root}/{reference}"

    def read(self, reference: str) -> bytes:
        with fsspec.open(self.path(reference), "rb") as file:
            content: bytes = file.read()
        return content

    def write(self, reference: str, content: bytes) -> None:
        with fsspec.open(self.path(reference), "wb") as file:
            file.write(content)

    def names(self, ticket_number: int) -> list[str]:
        filesystem, folder = fsspec.url_to_fs(self.path(f"s/trials/{ticket_number:05d}"))
        filesystem.invalidate_cache()
        return sorted(path.rpartition("/")[2] for path in filesystem.ls(folder, detail=False))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3, in this process."""
    pytest.importorskip("s3fs", reason="needs s3fs (the extra s3)")
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(params=["folder", "memory", "local", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    if request.param == "s3":
        yield Backend(request.getfixturevalue("s3_root"))
    elif request.param == "memory":
        root = f"memory://{uuid.uuid4().hex}/prefix"
        yield Backend(root)
        with suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(root.rpartition("/")[0], recursive=True)
    else:
        yield Backend(f"local://{tmp_path}/a b" if request.param == "local" else f"{tmp_path}/runs")


def tree(value: float) -> dict[str, Any]:
    return {"epoch": int(value), "weights": torch.full((3, 4), value), "log": [(1, 0.5), None]}


def saved(backend: Backend, *epochs: int, attempt: int = 1) -> list[str]:
    """References of the checkpoints of trial 3 after these epochs; the state of epoch e holds e."""
    return [backend.store().save(3, attempt, epoch, tree(epoch)) for epoch in epochs]


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_load_after_save_returns_the_tree(backend: Backend) -> None:
    reference = backend.store().save(3, 1, 4, tree(4))
    loaded = backend.store().load(3, 4, reference)
    assert loaded.tree["epoch"] == 4
    assert loaded.tree["log"] == [(1, 0.5), None]
    assert torch.equal(loaded.tree["weights"], torch.full((3, 4), 4.0))
    assert (loaded.epochs_done, loaded.reference, loaded.skipped) == (4, reference, ())


def test_save_returns_a_path_below_the_root_with_the_digest(backend: Backend) -> None:
    reference = backend.store().save(3, 2, 4, tree(4))
    digest = hashlib.sha256(backend.read(reference)).hexdigest()[:32]
    assert reference == f"s/trials/00003/checkpoint-0004-0002-{digest}.pt"
    assert backend.names(3) == [reference.rpartition("/")[2]]


def test_save_in_a_folder_uses_the_studys_trial_folder(tmp_path: Path) -> None:
    reference = CheckpointStore(tmp_path, "s").save(3, 1, 4, tree(4))
    assert (tmp_path / reference).parent == StudyFolder(tmp_path, "s").trial(3)
    assert [str(path.relative_to(tmp_path)) for path in StudyFolder(tmp_path, "s").trial(3).iterdir()] == [reference]


def test_load_without_reference_takes_the_latest_attempt(backend: Backend) -> None:
    for attempt in (2, 3, 1):
        backend.store().save(3, attempt, 4, tree(attempt))
    assert backend.store().load(3, 4).tree["epoch"] == 3


def test_load_with_reference_takes_that_attempt(backend: Backend) -> None:
    references = [backend.store().save(3, attempt, 4, tree(attempt)) for attempt in (1, 2)]
    assert backend.store().load(3, 4, references[0]).tree["epoch"] == 1


def test_load_reference_of_a_folder_elsewhere_takes_its_name_only(backend: Backend) -> None:
    (reference,) = saved(backend, 4)
    elsewhere = f"/other/../../mount/{reference.rpartition('/')[2]}"
    assert backend.store().load(3, 4, elsewhere).reference == reference


def test_load_leaves_epochs_alone_that_the_ledger_does_not_have(backend: Backend) -> None:
    saved(backend, 3, 4, 5)
    assert backend.store().load(3, 4).tree["epoch"] == 4


def test_save_by_a_stale_attempt_overwrites_nothing(backend: Backend) -> None:
    newer = backend.store().save(3, 2, 4, tree(2))
    before = backend.read(newer)
    backend.store().save(3, 1, 4, tree(1))
    assert backend.read(newer) == before
    assert backend.store().load(3, 4).tree["epoch"] == 2


def test_save_what_cannot_be_read_again_raises(backend: Backend) -> None:
    with pytest.raises(TypeError, match="Path"):
        backend.store().save(3, 1, 4, {"folder": Path("x")})
    assert backend.store().checkpoints(3) == ()


# -- damage -----------------------------------------------------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def truncated(content: bytes) -> bytes:
    return content[:-100]


def emptied(_content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [flipped, truncated, emptied])
def test_load_damaged_falls_back_to_the_previous(backend: Backend, damage: Callable[[bytes], bytes]) -> None:
    previous, last = saved(backend, 3, 4)
    backend.write(last, damage(backend.read(last)))
    loaded = backend.store().load(3, 4, last)
    assert (loaded.epochs_done, loaded.reference, loaded.tree["epoch"]) == (3, previous, 3)
    assert loaded.skipped == (f"{last.rpartition('/')[2]}: damaged: its SHA-256 is not that of its name",)


def test_load_missing_falls_back_to_the_previous(backend: Backend) -> None:
    saved(backend, 2, 3)
    loaded = backend.store().load(3, 4)
    assert (loaded.epochs_done, loaded.skipped) == (3, ("no checkpoint of epoch 4",))


def test_load_referenced_but_gone_falls_back_and_says_so(backend: Backend) -> None:
    _, last = saved(backend, 3, 4)
    backend.store().keep_latest(3, 3)
    loaded = backend.store().load(3, 4, last)
    assert loaded.epochs_done == 3
    (reason,) = loaded.skipped
    assert last.rpartition("/")[2] in reason
    assert "\n" not in reason


def test_load_all_damaged_raises_with_all_reasons(backend: Backend) -> None:
    previous, last = saved(backend, 3, 4)
    for reference in (previous, last):
        backend.write(reference, flipped(backend.read(reference)))
    with pytest.raises(CheckpointError, match=r"trial 3: no usable checkpoint in .*checkpoint-0004.*; checkpoint-0003"):
        backend.store().load(3, 4, last)


def test_load_none_there_raises_naming_the_place(backend: Backend) -> None:
    with pytest.raises(CheckpointError, match="s/trials/00003: none of epoch 4 or before is there"):
        backend.store().load(3, 4)


def test_load_of_an_earlier_study_of_that_name_raises(backend: Backend) -> None:
    reference = backend.store(owner="1763").save(3, 1, 4, tree(4))
    assert backend.store(owner="1763").load(3, 4).epochs_done == 4
    with pytest.raises(CheckpointError, match="owner '1763' in it, not '1800'"):
        backend.store(owner="1800").load(3, 4, reference)


def test_load_copied_from_another_trial_is_not_used(backend: Backend) -> None:
    reference = backend.store().save(7, 1, 4, tree(4))
    saved(backend, 1)
    backend.write(reference.replace("00007", "00003"), backend.read(reference))
    loaded = backend.store().load(3, 4, reference)
    assert loaded.epochs_done == 1
    assert loaded.skipped == (f"{reference.rpartition('/')[2]}: ticket 7 in it, not 3",)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._marker),)


def test_load_executes_nothing(backend: Backend, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for number, content in enumerate((pickle.dumps(_Payload(marker)), _as_torch_file(_Payload(marker), tmp_path))):
        saved(backend, 1)
        digest = hashlib.sha256(content).hexdigest()[:32]
        backend.write(f"s/trials/00003/checkpoint-0004-000{number}-{digest}.pt", content)
    loaded = backend.store().load(3, 4)
    assert loaded.epochs_done == 1
    assert len(loaded.skipped) == 2
    assert not marker.exists()


def _as_torch_file(payload: object, folder: Path) -> bytes:
    torch.save(payload, folder / "payload.pt")
    return (folder / "payload.pt").read_bytes()


def test_load_a_whole_file_that_is_no_checkpoint_raises(backend: Backend, tmp_path: Path) -> None:
    save_atomic(tmp_path / "other.pt", {"weights": 1})
    content = (tmp_path / "other.pt").read_bytes()
    saved(backend, 9)
    name = f"checkpoint-0004-0001-{hashlib.sha256(content).hexdigest()[:32]}.pt"
    backend.write(f"s/trials/00003/{name}", content)
    with pytest.raises(CheckpointError, match=f"{name}: not a checkpoint of a trial"):
        backend.store().load(3, 4)


# -- listing and deleting ---------------------------------------------------------------------------------------------


def epochs_and_attempts(backend: Backend) -> list[tuple[int, int]]:
    return [(stored.epochs_done, stored.attempt) for stored in backend.store().checkpoints(3)]


def test_checkpoints_lists_the_preferred_first_and_ignores_other_files(backend: Backend) -> None:
    saved(backend, 9, 10)
    saved(backend, 10, attempt=2)
    backend.write("s/trials/00003/best.safetensors", b"weights")
    backend.write("s/trials/00003/checkpoint-0011.pt", b"of somebody else")
    assert epochs_and_attempts(backend) == [(10, 2), (10, 1), (9, 1)]


def test_keep_latest_keeps_the_last_and_the_one_to_fall_back_to(backend: Backend) -> None:
    references = saved(backend, 1, 2, 3, 4)
    sizes = [len(backend.read(reference)) for reference in references]
    assert backend.store().keep_latest(3, 4) == sizes[0] + sizes[1]
    assert epochs_and_attempts(backend) == [(4, 1), (3, 1)]


def test_keep_latest_after_a_start_over_keeps_the_new_ones(backend: Backend) -> None:
    saved(backend, 7, 8)
    saved(backend, 1, attempt=2)
    backend.store().keep_latest(3, 1)
    assert epochs_and_attempts(backend) == [(1, 2)]


def test_delete_removes_checkpoints_of_one_trial_only(backend: Backend) -> None:
    saved(backend, 1, 2)
    other = backend.store().save(4, 1, 1, tree(1))
    backend.write("s/trials/00003/best.safetensors", b"weights")
    assert backend.store().delete(3) > 0
    assert backend.names(3) == ["best.safetensors"]
    assert backend.store().load(4, 1).reference == other
    assert backend.store().delete(3) == 0


def test_ticket_numbers_names_the_trials_that_have_files(backend: Backend) -> None:
    assert backend.store().ticket_numbers() == ()
    for number in (12, 3):
        backend.store().save(number, 1, 1, tree(1))
    assert backend.store().ticket_numbers() == (3, 12)


def test_clear_removes_all_checkpoints_of_the_study_and_nothing_else(backend: Backend) -> None:
    saved(backend, 1, 2)
    other = CheckpointStore(backend.root, "s-2").save(3, 1, 1, tree(1))
    backend.write("s/trials/00003/best.safetensors", b"weights")
    backend.store().save(4, 1, 1, tree(1))
    assert backend.store().clear() > 0
    assert backend.store().checkpoints(3) == backend.store().checkpoints(4) == ()
    assert backend.names(3) == ["best.safetensors"]
    assert CheckpointStore(backend.root, "s-2").load(3, 1).reference == other


def test_clear_leaves_no_empty_folder(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, "s").save(3, 1, 1, tree(1))
    CheckpointStore(tmp_path, "s").clear()
    assert list(tmp_path.iterdir()) == []


# -- what can go wrong around it --------------------------------------------------------------------------------------


def test_save_disk_full_raises_one_line_and_keeps_the_previous(backend: Backend) -> None:
    saved(backend, 3)
    before = backend.names(3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            backend.store().save(3, 1, 4, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith("trial 3, epoch 4: its checkpoint cannot be written to ")
    assert message.endswith(f"s/trials/00003: {os.strerror(errno.EFBIG)}")
    assert backend.names(3) == before
    assert backend.store().load(3, 4).epochs_done == 3


def test_save_into_a_mistyped_bucket_raises_and_makes_none(s3_root: str) -> None:
    mistyped = s3_root.replace("bucket-", "bukcet-")
    with pytest.raises(CheckpointError, match="its checkpoint cannot be written to s3://bukcet-") as caught:
        CheckpointStore(mistyped, "s").save(3, 1, 4, tree(4))
    assert "\n" not in str(caught.value)
    buckets = fsspec.filesystem("s3", skip_instance_cache=True).ls("")
    assert [name for name in buckets if str(name).startswith("bukcet-")] == []


def test_save_folder_is_a_file_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(CheckpointError, match="s/trials/00003: Not a directory") as caught:
        CheckpointStore(tmp_path, "s").save(3, 1, 4, tree(4))
    assert "\n" not in str(caught.value)


def test_load_folder_is_a_file_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(CheckpointError, match=r"its checkpoints cannot be listed in .*: Not a directory"):
        CheckpointStore(tmp_path, "s").load(3, 4)


@pytest.mark.parametrize("name", ["../s", "a/b", ".hidden", ""])
def test_store_study_name_that_leads_elsewhere_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="study name"):
        CheckpointStore(tmp_path, name)


def test_store_unknown_protocol_raises_what_is_allowed() -> None:
    with pytest.raises(UserInputError, match=r"carrier-pigeon://coop: .*allowed: a folder, or a URL"):
        CheckpointStore("carrier-pigeon://coop", "s")


def test_store_back_end_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserInputError, match=r"gs://bucket/prefix: .* gcsfs .*: pip install '\.\[gcs\]'"):
        CheckpointStore("gs://bucket/prefix", "s")


def test_store_message_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(UserInputError, match=r"sftp://me:\*\*\*@host/prefix: ") as caught:
        CheckpointStore("sftp://me:secret@host/prefix", "s")
    assert "secret" not in str(caught.value)


# -- killed writers ---------------------------------------------------------------------------------------------------


def _save_for_ever(folder: Path, started: int, told: Connection) -> None:
    """Saves 30 MB after 30 MB, and tells each one that the ledger would have."""
    store = CheckpointStore(folder, "s")
    epoch = started
    while True:
        epoch += 1
        state = {"epoch": epoch, "weights": torch.full((7_500_000,), float(epoch))}
        reference = store.save(3, 1, epoch, state)
        told.send((epoch, reference))
        store.keep_latest(3, epoch)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_save_killed_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "s").trial(3)
    # Not "fork": a copy of a process in which OpenMP has run waits for threads that it does not have.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["yolocore.checkpoint"])
    known: tuple[int, str | None] = (0, None)
    torn = 0
    for _ in range(20):
        ours, theirs = server.Pipe(duplex=False)
        writer = server.Process(target=_save_for_ever, args=(tmp_path, known[0], theirs))
        before = set(folder.glob(".*.tmp"))
        writer.start()
        theirs.close()
        known = ours.recv()
        while not any(_size(path) for path in set(folder.glob(".*.tmp")) - before):
            time.sleep(0.001)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        while ours.poll():
            try:
                known = ours.recv()
            except EOFError:
                break
        torn += bool(set(folder.glob(".*.tmp")) - before)
        loaded = CheckpointStore(tmp_path, "s").load(3, *known)
        assert (loaded.epochs_done, loaded.skipped) == (known[0], ())
        assert loaded.tree["weights"].unique().tolist() == [float(known[0])]
        if torn == 3:
            break
    assert torn == 3
    assert remove_leftovers(tmp_path / "s") == 0
    assert remove_leftovers(tmp_path / "s", older_than=0, dry_run=True) > 0
    assert remove_leftovers(tmp_path / "s", older_than=0) > 0
    assert list(folder.glob(".*.tmp")) == []
    assert CheckpointStore(tmp_path, "s").load(3, *known).epochs_done == known[0]


def test_remove_leftovers_takes_old_temporary_files_only(tmp_path: Path) -> None:
    old = time.time() - 7200
    for name in (".a.tmp", "trials/00001/.b.7.tmp", ".young.tmp", "visible.tmp", ".hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
        if "young" not in name:
            os.utime(path, (old, old))
    assert remove_leftovers(tmp_path) == 10
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hidden", ".young.tmp", "visible.tmp"]
