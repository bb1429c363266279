"""Resumable states of trials, in a folder that workers share or in an object store.

A checkpoint is one file `trials/<number>/checkpoint-<epochs>-<attempt>-<digest>.pt`. The digest (the first half of the
SHA-256 of the file) is part of the name, so that a file says by itself whether it is whole: there is no second file to
keep in step, and a torn upload is recognised on every store. A digest also means that no two writers can meet in one
file, and the attempt that a stale worker's file is told from that of its successor.

torch and fsspec are imported where they are used: commands that only list or delete do not wait for them.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from search.database import check_study_name, mask_url
from search.errors import UserInputError, install_extra
from search.paths import StudyFolder
from yolocore.errors import CheckpointError

KEPT = 2
"""Checkpoints of a trial that runs: the last one, and the one to fall back to."""

LEFTOVER_SECONDS = 3600.0
"""A temporary file that was not written to for so long has lost its writer."""

STAGING_PREFIX = "yolosearch-checkpoint-"
"""Folders in the system's temporary folder through which uploads and downloads go."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of this package that brings the back end of a protocol."""

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci"})
"""Protocols without folders. To make one there would make a bucket of a mistyped name."""

DIGEST_CHARS = 32
_NAME = re.compile(r"checkpoint-(?P<epochs>\d{4,})-(?P<attempt>\d{4,})-(?P<digest>[0-9a-f]{32})\.pt")
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """One checkpoint as its store lists it."""

    name: str
    """File name, without folder."""
    epochs_done: int
    attempt: int
    digest: str
    size: int = field(compare=False)
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A state that was read and found whole."""

    tree: Any
    """What `save` was given, tensors on the CPU."""
    epochs_done: int
    """Where training goes on: less than what was asked for if newer checkpoints could not be read."""
    reference: str
    """For the ledger, as `save` returns it."""
    skipped: tuple[str, ...]
    """One line for each newer checkpoint that is missing or unusable."""


class CheckpointStore:
    """Saves, loads, lists and deletes the checkpoints of one study.

    Contract:
    - A checkpoint appears whole or is recognised as torn; a crash at any moment leaves the earlier ones as they were.
    - Every failure of the store, the disk or the network is a `CheckpointError` of one line without passwords.
    - Nothing in a file is executed when it is read.
    - An attempt never overwrites the file of another one. Only the holder of a ticket may delete: call `save`, then
      the ledger's `save_progress` (which a stale attempt does not survive), then `keep_latest`.
    """

    def __init__(self, root: str | Path, study: str, *, owner: str = "", kind: str = "search") -> None:
        """Opens the store; writes nothing.

        Args:
            root: The runs folder, or a URL that fsspec knows (`s3://bucket/prefix`, `gs://...`, `memory://...`).
            study: Name of the study; its checkpoints lie below `<root>/<study>/trials`.
            owner: Tells this study from an earlier one of the same name, for example by its time of creation. A
                checkpoint of another owner is not used.
            kind: Of the tickets; each kind has numbers of its own, and a folder.

        Raises:
            UserInputError: The URL's protocol is unknown, or its back end is not installed (naming the extra).
        """
        self.layout = StudyFolder(Path(), check_study_name(study))
        self._owner = owner
        self._kind = kind
        self.place = open_place(root)
        """The files below the root."""

    def of_kind(self, kind: str) -> CheckpointStore:
        """The store of this study's tickets of another kind."""
        other = copy.copy(self)
        other._kind = kind
        return other

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder of this host (or one that is mounted here)."""
        return isinstance(self.place, _Folder)

    def __str__(self) -> str:
        """Where the study's files are, without a password."""
        return self.place.show(self.layout.root.as_posix())

    def save(self, ticket_number: int, attempt: int, epochs_done: int, tree: object) -> str:
        """Stores the state of a trial.

        Args:
            ticket_number: Number of the trial's ticket.
            attempt: The holder's attempt.
            epochs_done: Epochs that the state has behind it.
            tree: Dicts, lists, tuples, tensors and plain scalars only.

        Returns:
            The reference for the ledger's `checkpoint`: its path below the root, the same on every host.

        Raises:
            CheckpointError: It cannot be written: a full disk, a lost permission, a store that is away.
        """
        from yolocore.checkpoint import save_atomic

        # Who a state belongs to is inside as well: a file can be copied or renamed.
        envelope = {**self._identity(ticket_number, attempt, epochs_done), "tree": tree}
        folder = self._folder(ticket_number)
        label = f"checkpoint-{epochs_done:04d}-{attempt:04d}"
        what = f"trial {ticket_number}, epoch {epochs_done}: its checkpoint cannot be written to"
        with self._failures(what, folder), self.place.staging(folder) as staging:
            staged = staging / f".{label}.{os.getpid()}.tmp"
            try:
                save_atomic(staged, envelope)
                name = f"{label}-{digest_of(staged)}.pt"
                self.place.publish(staged, folder / name)
            finally:
                staged.unlink(missing_ok=True)
        return (folder / name).as_posix()

    def load(self, ticket_number: int, epochs_done: int, reference: str | None = None) -> LoadedCheckpoint:
        """Reads the state of a trial, or the last one before it that is whole.

        Args:
            ticket_number: Number of the trial's ticket.
            epochs_done: What the ledger says; newer files are left alone, a stale attempt may have written them.
            reference: The ledger's `checkpoint`, which is tried first: on a network file system a listing may lag.

        Raises:
            CheckpointError: None can be read; one line with all reasons.
        """
        skipped: list[str] = []
        for stored in self._candidates(ticket_number, epochs_done, reference):
            if not skipped and stored.epochs_done < epochs_done:
                skipped.append(f"no checkpoint of epoch {epochs_done}")
            try:
                tree = self._read(ticket_number, stored)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            path = (self._folder(ticket_number) / stored.name).as_posix()
            return LoadedCheckpoint(tree=tree, epochs_done=stored.epochs_done, reference=path, skipped=tuple(skipped))
        where = self.place.show(self._folder(ticket_number).as_posix())
        reasons = "; ".join(skipped) or f"none of epoch {epochs_done} or before is there"
        raise CheckpointError(f"trial {ticket_number}: no usable checkpoint in {where}: {reasons}")

    def checkpoints(self, ticket_number: int) -> tuple[StoredCheckpoint, ...]:
        """The checkpoints of a trial, the one to prefer first: by epochs, then by attempt, both descending."""
        folder = self._folder(ticket_number)
        with self._failures(f"trial {ticket_number}: its checkpoints cannot be listed in", folder):
            found = [_parse(name, size) for name, size in self.place.files(folder)]
        return tuple(sorted((stored for stored in found if stored is not None), key=_preference))

    def keep_latest(self, ticket_number: int, epochs_done: int, count: int = KEPT) -> int:
        """Deletes all checkpoints of a trial but the `count` that `load` would try first.

        Args:
            ticket_number: Number of the trial's ticket.
            epochs_done: What the ledger has; newer ones are leftovers of a stale attempt, and go.
            count: How many stay.

        Returns:
            Bytes freed.
        """
        stored = self.checkpoints(ticket_number)
        kept = [entry for entry in stored if entry.epochs_done <= epochs_done][:count]
        return sum(self._remove(ticket_number, entry) for entry in stored if entry not in kept)

    def delete(self, ticket_number: int) -> int:
        """Deletes all checkpoints of a trial; its other files stay. Returns the bytes freed."""
        return sum(self._remove(ticket_number, stored) for stored in self.checkpoints(ticket_number))

    def clear(self) -> int:
        """Deletes all checkpoints of the study and the folders that are empty then. Returns the bytes freed."""
        freed = sum(self.delete(number) for number in self.ticket_numbers())
        study = PurePosixPath(self.layout.root.as_posix())
        with self._failures("empty folders cannot be removed from", study):
            self.place.prune(study)
        return freed

    def ticket_numbers(self) -> tuple[int, ...]:
        """Numbers of the trials that have a folder here."""
        trials = PurePosixPath(self._folder(0).parent)
        with self._failures("its trials cannot be listed in", trials):
            return tuple(sorted(int(name) for name in self.place.folders(trials) if name.isdecimal()))

    def _identity(self, ticket_number: int, attempt: int, epochs_done: int) -> dict[str, int | str]:
        return {
            "format": _FORMAT,
            "owner": self._owner if self._kind == "search" else f"{self._owner}/{self._kind}",
            "ticket": ticket_number,
            "attempt": attempt,
            "epochs_done": epochs_done,
        }

    def _folder(self, ticket_number: int) -> PurePosixPath:
        return PurePosixPath(self.layout.trial(ticket_number, self._kind).as_posix())

    def _candidates(self, ticket_number: int, epochs_done: int, reference: str | None) -> Iterator[StoredCheckpoint]:
        named = _parse(PurePosixPath(reference or "").name, 0)
        if named is not None and named.epochs_done == epochs_done:
            yield named
        for stored in self.checkpoints(ticket_number):
            if stored.epochs_done <= epochs_done and stored != named:
                yield stored

    def _read(self, ticket_number: int, stored: StoredCheckpoint) -> Any:
        """The tree of a checkpoint, verified."""
        from yolocore.checkpoint import load

        path = self._folder(ticket_number) / stored.name
        with self._failures(f"{stored.name} cannot be read from", path.parent), self.place.fetched(path) as file:
            if digest_of(file) != stored.digest:
                raise CheckpointError(f"{stored.name}: damaged: its SHA-256 is not that of its name")
            envelope = load(file)
        expected = self._identity(ticket_number, stored.attempt, stored.epochs_done)
        if not isinstance(envelope, Mapping) or "tree" not in envelope:
            raise CheckpointError(f"{stored.name}: not a checkpoint of a trial")
        for key, value in expected.items():
            if envelope.get(key) != value:
                raise CheckpointError(f"{stored.name}: {key} {envelope.get(key)!r} in it, not {value!r}")
        return envelope["tree"]

    def _remove(self, ticket_number: int, stored: StoredCheckpoint) -> int:
        folder = self._folder(ticket_number)
        with self._failures(f"{stored.name} cannot be deleted from", folder):
            self.place.remove(folder / stored.name)
        return stored.size

    def _failures(self, what: str, folder: PurePosixPath) -> AbstractContextManager[None]:
        return failures_of(self.place, what, folder)


@contextmanager
def failures_of(place: Place, what: str, folder: PurePosixPath) -> Iterator[None]:
    """Turns whatever the disk, torch or a back end raises into a `CheckpointError` of one line.

    Args:
        place: the files.
        what: what could not be done, up to the name of the folder.
        folder: where.
    """
    try:
        yield
    except TypeError:
        raise  # a tree that cannot be stored is a mistake of the caller
    except Exception as error:  # every back end has its own errors
        if isinstance(error, CheckpointError) and _system_error(error) is None:
            raise
        where = place.show(folder.as_posix())
        raise CheckpointError(f"{what} {where}: {mask_url(_reason(error))}") from error


def remove_leftovers(folder: Path, older_than: float = LEFTOVER_SECONDS, *, dry_run: bool = False) -> int:
    """Deletes the hidden temporary files that killed writers left anywhere below a local folder.

    Args:
        folder: A study's folder.
        older_than: Seconds since the last write.
        dry_run: Only count.

    Returns:
        Bytes freed.
    """
    freed = 0
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            if path.is_file() and time.time() - status.st_mtime >= older_than:
                if not dry_run:
                    path.unlink()
                freed += status.st_size
    return freed


class Place(ABC):
    """Files below a root by their relative paths. Whatever fails raises the back end's own error."""

    @abstractmethod
    def show(self, path: str) -> str:
        """A path for messages."""

    @abstractmethod
    def staging(self, folder: PurePosixPath) -> AbstractContextManager[Path]:
        """Context manager: a local folder to write into before a file is published in `folder`."""

    @abstractmethod
    def publish(self, staged: Path, path: PurePosixPath) -> None:
        """Puts a complete local file in its place."""

    @abstractmethod
    def fetched(self, path: PurePosixPath) -> AbstractContextManager[Path]:
        """Context manager: the file as a local one."""

    @abstractmethod
    def files(self, folder: PurePosixPath) -> Iterator[tuple[str, int]]:
        """Names and sizes of the files in a folder; nothing if there is no such folder."""

    @abstractmethod
    def folders(self, folder: PurePosixPath) -> Iterator[str]:
        """Names of the folders in a folder; nothing if there is no such folder."""

    @abstractmethod
    def remove(self, path: PurePosixPath) -> None:
        """Deletes a file; one that is gone already is no error."""

    @abstractmethod
    def prune(self, folder: PurePosixPath) -> None:
        """Removes a folder and those below it as far as they are empty."""


class _Folder(Place):
    """A local or mounted folder. Files appear by a rename within their folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def show(self, path: str) -> str:
        return str(self._root / path)

    @contextmanager
    def staging(self, folder: PurePosixPath) -> Iterator[Path]:
        yield self._root / folder

    def publish(self, staged: Path, path: PurePosixPath) -> None:
        target = self._root / path
        staged.replace(target)
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # makes the rename durable
        finally:
            os.close(handle)

    @contextmanager
    def fetched(self, path: PurePosixPath) -> Iterator[Path]:
        yield self._root / path

    def files(self, folder: PurePosixPath) -> Iterator[tuple[str, int]]:
        with suppress(FileNotFoundError), os.scandir(self._root / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        yield entry.name, entry.stat(follow_symlinks=False).st_size

    def folders(self, folder: PurePosixPath) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self._root / folder) as entries:
            yield from (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def remove(self, path: PurePosixPath) -> None:
        (self._root / path).unlink(missing_ok=True)

    def prune(self, folder: PurePosixPath) -> None:
        for current, _, _ in os.walk(self._root / folder, topdown=False):
            with suppress(OSError):  # most often: not empty
                Path(current).rmdir()


class _Remote(Place):
    """A store behind fsspec. Uploads and downloads stream through a local temporary file."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._system = filesystem
        protocols = filesystem.protocol
        self._has_folders = _OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        self._root = root.rstrip("/")

    def show(self, path: str) -> str:
        return mask_url(self._system.unstrip_protocol(self._at(path)))

    @contextmanager
    def staging(self, folder: PurePosixPath) -> Iterator[Path]:
        del folder
        with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX) as name:
            yield Path(name)

    def publish(self, staged: Path, path: PurePosixPath) -> None:
        target = self._at(path)
        if self._has_folders:
            self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(staged), target)

    @contextmanager
    def fetched(self, path: PurePosixPath) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX) as name:
            file = Path(name) / path.name
            self._system.get_file(self._at(path), str(file))
            yield file

    def files(self, folder: PurePosixPath) -> Iterator[tuple[str, int]]:
        yield from ((name, entry["size"]) for name, entry in self._entries(folder) if entry["type"] == "file")

    def folders(self, folder: PurePosixPath) -> Iterator[str]:
        yield from (name for name, entry in self._entries(folder) if entry["type"] == "directory")

    def remove(self, path: PurePosixPath) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(self._at(path))

    def prune(self, folder: PurePosixPath) -> None:
        pass  # object stores have no folders, and elsewhere an empty one does no harm

    def _entries(self, folder: PurePosixPath) -> Iterator[tuple[str, Mapping[str, Any]]]:
        self._system.invalidate_cache()  # other hosts write here
        with suppress(FileNotFoundError):
            for entry in self._system.ls(self._at(folder), detail=True):
                yield entry["name"].rstrip("/").rpartition("/")[2], entry

    def _at(self, path: PurePosixPath | str) -> str:
        return f"{self._root}/{path}"


def open_place(root: str | Path) -> Place:
    """The files below a folder or a URL; `CheckpointStore` says which errors to expect."""
    text = str(root)
    if "://" not in text:
        return _Folder(Path(root))
    import fsspec  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    protocol = text.partition("://")[0]
    try:
        filesystem, path = fsspec.url_to_fs(text)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = install_extra(extra) if extra else "install that package"
        raise UserInputError(f"{mask_url(text)}: {_reason(error)}: {remedy}") from None
    except ValueError as error:
        allowed = "a folder, or a URL such as s3://bucket/prefix or gs://bucket/prefix"
        raise UserInputError(f"{mask_url(text)}: {mask_url(_reason(error))}; allowed: {allowed}") from None
    if isinstance(filesystem, LocalFileSystem):
        return _Folder(Path(path))
    return _Remote(filesystem, path)


def _parse(name: str, size: int) -> StoredCheckpoint | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return StoredCheckpoint(
        name=name,
        epochs_done=int(match["epochs"]),
        attempt=int(match["attempt"]),
        digest=match["digest"],
        size=size,
    )


def _preference(stored: StoredCheckpoint) -> tuple[int, int, str]:
    return -stored.epochs_done, -stored.attempt, stored.digest


def digest_of(file: Path) -> str:
    """What stands in the name of a stored file: the first half of its SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGEST_CHARS]


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that another one was raised for."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _reason(error: BaseException) -> str:
    """What went wrong in a few words."""
    system = _system_error(error)
    if system is not None and system.strerror:
        return system.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
