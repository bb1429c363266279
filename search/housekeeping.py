"""What is behind `yolosearch list | clone | delete | clean | retry`.

Optuna and torch are imported where they are used: `list` and `clean` do not wait for them.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search.checkpoints import LEFTOVER_SECONDS, STAGING_PREFIX, CheckpointStore, remove_leftovers
from search.config import StudyConfig, parse_study
from search.database import (
    STORAGE_URL_VARIABLE,
    check_study_name,
    default_storage_url,
    make_engine,
    mask_url,
    resolve_storage_url,
    sqlite_path,
)
from search.errors import DatabaseError, UserInputError
from search.ledger import KINDS, RERUN_KINDS, Ledger, StateCount, StudyRecord, Ticket, TicketState
from search.paths import StudyFolder
from search.weights import WeightsStore, complete_trials, kept_numbers, value_row
from search.worker.host import release_dead_neighbours

IMAGES_PREFIX = "yolosearch-images-"
"""Decoded images that loader processes share, in the system's temporary folder; a killed worker leaves them."""

SHARED_FOLDERS = frozenset({"data", "mlartifacts"})
"""Folders below the runs folder that belong to all studies."""


# ---- list ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One line of `yolosearch list`."""

    name: str
    created: float
    """UTC epoch seconds."""
    counts: Mapping[TicketState, int]
    """Trials in each state; every state is a key."""
    best: float | None
    """Best objective of a COMPLETE trial; None with several objectives, where no trial is the best."""
    stop_reason: str | None
    storage: str = ""
    """The database, without a password; where `list_databases` read several."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "study": self.name,
            "created": self.created,
            "counts": {state.value: count for state, count in self.counts.items()},
            "best": self.best,
            "stop_reason": self.stop_reason,
            "storage": self.storage,
        }


def list_studies(ledger: Ledger, storage: str = "") -> tuple[StudyRow, ...]:
    """The studies of one database, oldest first."""
    by_study: dict[str, list[StateCount]] = {}
    for entry in ledger.state_counts():
        by_study.setdefault(entry.study, []).append(entry)
    return tuple(_row(record, by_study.get(record.name, ()), storage) for record in ledger.studies())


def _row(record: StudyRecord, entries: Sequence[StateCount], storage: str) -> StudyRow:
    found = {entry.state: entry for entry in entries}
    complete = found.get(TicketState.COMPLETE)
    return StudyRow(
        name=record.name,
        created=record.created,
        counts={state: found[state].count if state in found else 0 for state in TicketState},
        best=None if complete is None or record.config.get("objectives") else complete.best,
        stop_reason=record.stop_reason,
        storage=storage,
    )


def study_databases(explicit: str | None, runs_dir: Path) -> tuple[str, ...]:
    """Where studies may be: the database that is named, or else every `<runs_dir>/*/study.db`.

    Args:
        explicit: what the command line says; None for nothing, then the environment counts.
        runs_dir: folder of all studies.

    Raises:
        UserInputError: a URL that cannot be used.
    """
    if explicit or os.environ.get(STORAGE_URL_VARIABLE):
        return (resolve_storage_url(explicit, runs_dir, "any"),)
    return tuple(default_storage_url(runs_dir, path.parent.name) for path in sorted(runs_dir.glob("[!.]*/study.db")))


def list_databases(urls: Iterable[str]) -> tuple[tuple[StudyRow, ...], tuple[str, ...]]:
    """The studies of several databases, oldest first, and one line for each database that cannot be read."""
    rows: list[StudyRow] = []
    problems: list[str] = []
    for url in urls:
        try:
            ledger = Ledger(make_engine(url, create=False))
            ledger.check_schema()
            rows.extend(list_studies(ledger, mask_url(url)))
        except DatabaseError as error:
            problems.append(str(error))
    return tuple(sorted(rows, key=lambda row: (row.created, row.name))), tuple(problems)


# ---- clone -----------------------------------------------------------------------------------------------------------


def clone(source: StudyConfig, new_name: str) -> StudyConfig:
    """The configuration of a study under another name: with its own trials, and with the whole base hyp in it.

    Raises:
        UserInputError: a name that is not allowed, or the same one.
    """
    if new_name == source.name:
        raise UserInputError(f"clone: got the name {new_name}, which is the source's; allowed: another name")
    return parse_study({**source.to_json(), "name": new_name}, source=f"clone of {source.name}")


def study_yaml(config: StudyConfig, comment: str) -> str:
    """A study file that `load_study_config` reads back as the same configuration.

    Args:
        config: the study.
        comment: one line for the top.
    """
    return f"# {comment}\n{yaml.safe_dump(config.to_json(), sort_keys=False, allow_unicode=True)}"


# ---- delete ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteReport:
    """What `delete` did."""

    study: str
    trials: int
    """Tickets that were deleted with it."""
    freed: int
    """Bytes of files."""
    kept: tuple[str, ...]
    """One line for each thing that is still there."""


def delete(
    ledger: Ledger,
    storage_url: str,
    name: str,
    runs_dir: Path,
    store: CheckpointStore | None = None,
    *,
    force: bool = False,
) -> DeleteReport:
    """Deletes a study: our rows, Optuna's, its checkpoints and its folder. MLflow's runs stay.

    Our rows go last, so that a deletion which was interrupted can be repeated.

    Args:
        ledger: the ledger in the study's database.
        storage_url: that database.
        name: the study.
        runs_dir: its folder is below this one; nothing outside is touched.
        store: where its checkpoints are, if not in its folder.
        force: also while workers hold its trials; they notice at their next report.

    Raises:
        UnknownStudyError: no such study.
        StudyConflictError: somebody works on it, and not `force`.
        UserInputError: its folder is a link to somewhere else.
    """
    from search.study import delete_study, open_storage

    folder = StudyFolder(runs_dir, check_study_name(name))
    record = ledger.study(name)
    _refuse_link(folder)
    if not force:
        release_dead_neighbours(ledger, name)
        ledger.refuse_if_running(name)
    tickets = ledger.tickets(name)
    ledger.stop(name, "`yolosearch delete` was interrupted: run it again")
    delete_study(name, open_storage(storage_url))
    freed = 0
    if store is not None:
        weights = WeightsStore(store.place, name)
        freed += sum(weights.keep(ticket.number, None) for ticket in tickets)
        freed += sum(store.of_kind(kind).clear() for kind in KINDS)
    database = _database_files(storage_url)
    freed += _remove_entries(folder, keep=database)
    ledger.delete_study(name, force=force)
    kept = list(_kept_records(record))
    others = [record.name for record in ledger.studies()]
    if others and any(path.parent == folder.root.resolve() for path in database):
        kept.append(f"{mask_url(storage_url)} holds other studies: {', '.join(others)}")
    else:
        freed += _remove_entries(folder, keep=())
    if folder.root.exists():
        with suppress(OSError):
            folder.root.rmdir()
    return DeleteReport(study=name, trials=len(tickets), freed=freed, kept=tuple(kept))


def _refuse_link(folder: StudyFolder) -> None:
    if folder.root.is_symlink():
        raise UserInputError(
            f"{folder.root}: a link to {folder.root.readlink()}; allowed: a folder (move what it points to there, "
            "or remove the link first and the files by hand)"
        )


def _kept_records(record: StudyRecord) -> Iterator[str]:
    tracking = record.config.get("tracking") or {}
    if tracking.get("enabled", True):
        experiment = tracking.get("experiment") or record.name
        yield f"MLflow's runs of experiment {experiment!r} (MLflow's own UI deletes them)"


def _database_files(storage_url: str) -> tuple[Path, ...]:
    """The SQLite file with its journals and locks; none for a server."""
    path = sqlite_path(storage_url)
    return () if path is None else tuple(sorted(path.resolve().parent.glob(f"{path.name}*")))


def _remove_entries(folder: StudyFolder, keep: Collection[Path]) -> int:
    """Removes what is in a study's folder. Links are removed, never followed. Returns the bytes freed."""
    if not folder.root.is_dir():
        return 0
    root = folder.root.resolve()
    entries = [entry for entry in root.iterdir() if entry not in keep]
    if folder.study in SHARED_FOLDERS:
        own = {folder.best_hyp.name, folder.log("").parent.name, *(folder.trial(0, kind).parent.name for kind in KINDS)}
        entries = [entry for entry in entries if entry.name in own or entry.name.startswith("study.db")]
    return sum(_remove_tree(entry) for entry in entries)


def _remove_tree(path: Path) -> int:
    freed = _size(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return freed


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            return sum(_size(entry) for entry in path.iterdir())
        return path.lstat().st_size
    return 0


# ---- clean -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanReport:
    """Bytes that `clean` freed, or would free."""

    checkpoints: int
    """Of trials that have ended."""
    weights: int
    """Of trials that are not the best."""
    temporary: int
    """Left by processes that were killed."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.weights + self.temporary

    def to_json(self) -> dict[str, int]:
        """Plain data for `--json`."""
        return {
            "checkpoints": self.checkpoints,
            "weights": self.weights,
            "temporary": self.temporary,
            "total": self.total,
        }


def clean(ledger: Ledger, folder: StudyFolder, store: CheckpointStore, *, dry_run: bool = False) -> CleanReport:
    """Deletes what nobody needs any more; may run while workers do.

    Args:
        ledger: the ledger in the study's database.
        folder: the study's folder.
        store: where its checkpoints are.
        dry_run: only count.

    Raises:
        UnknownStudyError: no such study.
    """
    tickets = ledger.tickets(ledger.study(folder.study).name)
    checkpoints = _clean_checkpoints(store, _ended_numbers(tickets), dry_run=dry_run)
    for kind in RERUN_KINDS:
        ended = _ended_numbers(ledger.tickets(folder.study, (kind,)))
        checkpoints += _clean_checkpoints(store.of_kind(kind), ended, dry_run=dry_run)
    return CleanReport(
        checkpoints=checkpoints,
        weights=_clean_weights(ledger, tickets, WeightsStore(store.place, folder.study), dry_run=dry_run),
        temporary=remove_leftovers(folder.root, dry_run=dry_run) + remove_temporary_files(dry_run=dry_run),
    )


def _ended_numbers(tickets: Sequence[Ticket]) -> frozenset[int]:
    """Numbers of the tickets that are spent."""
    open_numbers = {ticket.number for ticket in tickets if not ticket.state.is_final}
    return frozenset(ticket.number for ticket in tickets) - open_numbers


def _clean_checkpoints(store: CheckpointStore, ended: Collection[int], *, dry_run: bool) -> int:
    freed = 0
    for number in store.ticket_numbers():
        if number in ended and dry_run:
            freed += sum(stored.size for stored in store.checkpoints(number))
        elif number in ended:
            freed += store.delete(number)
    return freed


def _clean_weights(ledger: Ledger, tickets: Sequence[Ticket], weights: WeightsStore, *, dry_run: bool) -> int:
    """Without a complete trial nothing is the best yet, and all weights stay."""
    if not complete_trials(tickets):
        return 0
    policy = (ledger.study(tickets[0].study).config.get("train") or {}).get("keep_weights", "best")
    kept = kept_numbers(ledger.tickets(tickets[0].study, KINDS), policy)
    freed = sum(weights.keep(number, None, dry_run=dry_run) for number in sorted(_ended_numbers(tickets) - kept))
    for ticket in complete_trials(tickets):
        file = weights.find(ticket.number, value_row(ticket, ledger.reports(ticket.id)))
        if ticket.number in kept and file is not None:
            freed += weights.keep(ticket.number, file, dry_run=dry_run)
    return freed


def remove_temporary_files(
    folder: Path | None = None, older_than: float = LEFTOVER_SECONDS, *, dry_run: bool = False
) -> int:
    """Deletes what killed workers left in the system's temporary folder. Returns the bytes freed.

    Only files of this user that no process has mapped. Where there is no `/proc` to see that, images stay.

    Args:
        folder: another temporary folder.
        older_than: Seconds since the last write.
        dry_run: only count.
    """
    folder = folder or Path(tempfile.gettempdir())
    found = [*folder.glob(f"{IMAGES_PREFIX}*"), *folder.glob(f"{STAGING_PREFIX}*")]
    left = [path for path in found if _is_left(path, older_than)]
    mapped = _mapped_files() if left else frozenset()
    freed = 0
    for path in left:
        is_image = path.name.startswith(IMAGES_PREFIX)
        if is_image and (mapped is None or str(path.resolve()) in mapped):
            continue
        freed += _size(path) if dry_run else _remove_tree(path)
    return freed


def _is_left(path: Path, older_than: float) -> bool:
    """Whether it is this user's, no link, and nobody wrote to it (or into it) for a while."""
    try:
        status = path.lstat()
        newest = max([status.st_mtime, *(entry.lstat().st_mtime for entry in path.glob("*"))])
    except FileNotFoundError:
        return False
    is_own = status.st_uid == os.getuid() and not stat.S_ISLNK(status.st_mode)
    return is_own and time.time() - newest >= older_than


def _mapped_files() -> frozenset[str] | None:
    """Paths that this user's processes have in their memory; None where the system does not tell."""
    if not Path("/proc/self/maps").exists():
        return None
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it ended, or is another user's, who cannot have mapped our private files
            mapped.update(line[line.index("/") :] for line in maps.read_text().splitlines() if "/" in line)
    return frozenset(mapped)


# ---- retry -----------------------------------------------------------------------------------------------------------


def retry(ledger: Ledger, config: StudyConfig, numbers: Collection[int] | None = None) -> tuple[Ticket, ...]:
    """Gives failed trials another chance: for each a new ticket with the same parameters.

    A trial that Optuna was told has failed cannot be reopened, so it stays FAIL in every record, and the budget grows
    by as many as are retried. A study that was stopped because of its failures may go on.

    Args:
        ledger: the ledger in the study's database.
        config: the study.
        numbers: which trials; None for all that are FAIL and were not retried yet.

    Returns:
        The new tickets; () if there is nothing to retry.

    Raises:
        UserInputError: a trial that is not FAIL, or was retried before; nothing was written.
    """
    tickets = {ticket.number: ticket for ticket in ledger.tickets(config.name)}
    if numbers is None:
        retried = {ticket.retry_of for ticket in tickets.values()}
        failed = [ticket for ticket in tickets.values() if ticket.state is TicketState.FAIL]
        numbers = [ticket.number for ticket in failed if ticket.number not in retried]
    params = {number: _same_params(config, number, tickets.get(number)) for number in sorted(set(numbers))}
    return ledger.retry_tickets(config.name, params) if params else ()


def _same_params(config: StudyConfig, number: int, ticket: Ticket | None) -> dict[str, Any] | None:
    """The failed trial's parameters; None if it failed before it had any and the sampler chooses."""
    if ticket is None:
        return None  # the ledger refuses it
    if ticket.params is None and ticket.fixed_params is None and config.sampler.name == "grid":
        from search.space import grid_points

        return dict(grid_points(config)[number])
    return ticket.params or ticket.fixed_params
