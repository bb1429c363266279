"""The trained weights of trials, beside their checkpoints: in a folder that workers share or in an object store.

A trial's weights are one file `trials/<number>/weights-<epochs>-<attempt>-<digest>.safetensors` under official key
names: the moving average after so many epochs, written by that attempt before the epoch is reported. What counts is in
the ledger alone: the row of the epoch that gives a trial its value names the attempt that trained it. So a stale
attempt cannot put its weights in the place of its successor's, and a file that was torn is known by its name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from search.checkpoints import Place, StoredCheckpoint, digest_of, failures_of, open_place
from search.database import check_study_name
from search.errors import UserInputError
from search.ledger import CONFIRM, SEARCH, EpochRow, Ticket, TicketState, base_numbers, front
from search.paths import StudyFolder
from yolocore.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from yolocore.details import EvaluationDetails

DETAILS_NAME = "details.npz"
"""Beside a trial's weights, until its pictures are drawn."""

BEST_TRIALS = 3
"""Besides the base, whose weights and pictures stay: as many as `confirm` takes for candidates by itself."""

_NAME = re.compile(r"weights-(?P<epochs>\d{4,})-(?P<attempt>\d{4,})-(?P<digest>[0-9a-f]{32})\.safetensors")


class WeightsStore:
    """Saves, finds and deletes the weights of one study's trials. Every failure is a `CheckpointError` of one line."""

    def __init__(self, place: Place, study: str) -> None:
        """Opens the store; writes nothing.

        Args:
            place: Where the checkpoints are.
            study: Name of the study.
        """
        self._layout = StudyFolder(Path(), check_study_name(study))
        self._place = place

    @classmethod
    def open(cls, root: str | Path, study: str) -> Self:
        """The store below the runs folder, or below a URL that fsspec knows.

        Raises:
            UserInputError: The URL's protocol is unknown, or its back end is not installed.
        """
        return cls(open_place(root), study)

    def __str__(self) -> str:
        """Where the study's files are, without a password."""
        return self._place.show(self._layout.root.as_posix())

    def save(
        self,
        ticket_number: int,
        attempt: int,
        epochs_done: int,
        weights: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Stores the weights of a trial after so many epochs.

        Args:
            ticket_number: Number of the trial's ticket.
            attempt: The holder's attempt.
            epochs_done: Epochs behind them.
            weights: An official state dict.
            metadata: What safetensors keeps beside the tensors.

        Raises:
            CheckpointError: They cannot be written.
        """
        from yolocore.checkpoint import save_weights

        folder = self._folder(ticket_number)
        label = f"weights-{epochs_done:04d}-{attempt:04d}"
        what = f"trial {ticket_number}, epoch {epochs_done}: its weights cannot be written to"
        with failures_of(self._place, what, folder), self._place.staging(folder) as staging:
            staged = staging / f".{label}.{os.getpid()}.safetensors"
            try:
                save_weights(staged, weights, metadata)
                self._place.publish(staged, folder / f"{label}-{digest_of(staged)}.safetensors")
            finally:
                staged.unlink(missing_ok=True)

    def files(self, ticket_number: int) -> tuple[StoredCheckpoint, ...]:
        """The weights of a trial, the latest first."""
        folder = self._folder(ticket_number)
        with failures_of(self._place, f"trial {ticket_number}: its weights cannot be listed in", folder):
            found = [_parse(name, size) for name, size in self._place.files(folder)]
        return tuple(sorted((file for file in found if file is not None), key=_latest_first))

    def find(self, ticket_number: int, row: EpochRow | None) -> StoredCheckpoint | None:
        """The weights of the epoch that a row of the ledger stands for, from the attempt that it names if possible.

        Args:
            ticket_number: Number of the trial's ticket.
            row: The epoch that gives the trial its value; None finds nothing.
        """
        of_epoch = [file for file in self.files(ticket_number) if row and file.epochs_done == row.epoch + 1]
        return next((file for file in of_epoch if row and file.attempt == row.attempt), next(iter(of_epoch), None))

    @contextmanager
    def fetched(self, ticket_number: int, file: StoredCheckpoint) -> Iterator[Path]:
        """Context manager: the file as a local one, checked against its name.

        Raises:
            CheckpointError: It cannot be read, or is damaged.
        """
        path = self._folder(ticket_number) / file.name
        what = f"{file.name} cannot be read from"
        with failures_of(self._place, what, path.parent), self._place.fetched(path) as local:
            if digest_of(local) != file.digest:
                raise CheckpointError(f"{file.name}: damaged: its SHA-256 is not that of its name")
            yield local

    def keep(self, ticket_number: int, file: StoredCheckpoint | None, *, dry_run: bool = False) -> int:
        """Deletes all weights of a trial but this file. Returns the bytes freed."""
        return self._remove(ticket_number, [other for other in self.files(ticket_number) if other != file], dry_run)

    def drop_before(self, ticket_number: int, file: StoredCheckpoint) -> int:
        """Deletes weights of earlier epochs, which this file has beaten. Returns the bytes freed."""
        earlier = [other for other in self.files(ticket_number) if other.epochs_done < file.epochs_done]
        return self._remove(ticket_number, earlier, dry_run=False)

    def copy(self, ticket_number: int, file: StoredCheckpoint, output: Path) -> Path:
        """Copies weights to a file of the user's, which appears whole or not at all.

        Args:
            ticket_number: Number of the trial's ticket.
            file: Which weights.
            output: The suffix chooses: `.safetensors` as stored, `.pt` as a state dict.

        Raises:
            UserInputError: Another suffix, or a file that cannot be written.
            CheckpointError: They cannot be read.
        """
        if output.suffix not in (".safetensors", ".pt"):
            raise UserInputError(f"{output}: suffix '{output.suffix}'; allowed: .safetensors, .pt")
        with self.fetched(ticket_number, file) as local:
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                _copy(local, output)
            except OSError as error:
                raise UserInputError(
                    f"{output}: cannot be written: {error.strerror}; allowed: a path in a writable folder"
                ) from None
        return output

    def save_details(self, ticket_number: int, details: EvaluationDetails) -> None:
        """Stores what pictures of a trial are drawn from, in the place of what an earlier epoch left.

        Raises:
            CheckpointError: It cannot be written.
        """
        from yolocore.details import save_details

        folder = self._folder(ticket_number)
        what = f"trial {ticket_number}: the details of its evaluation cannot be written to"
        with failures_of(self._place, what, folder), self._place.staging(folder) as staging:
            staged = staging / f".details.{os.getpid()}.npz"
            try:
                save_details(staged, details)
                self._place.publish(staged, folder / DETAILS_NAME)
            finally:
                staged.unlink(missing_ok=True)

    def copy_details(self, ticket_number: int, output: Path) -> bool:
        """Copies the details of a trial's evaluation to a local file; False if there are none.

        Raises:
            CheckpointError: They cannot be read.
        """
        folder = self._folder(ticket_number)
        with failures_of(self._place, f"trial {ticket_number}: its details cannot be read from", folder):
            if not any(name == DETAILS_NAME for name, _ in self._place.files(folder)):
                return False
            with self._place.fetched(folder / DETAILS_NAME) as local:
                shutil.copyfile(local, output)
        return True

    def drop_details(self, ticket_number: int) -> None:
        """Deletes the details of a trial's evaluation, if there are any."""
        folder = self._folder(ticket_number)
        with failures_of(self._place, f"trial {ticket_number}: its details cannot be deleted from", folder):
            if any(name == DETAILS_NAME for name, _ in self._place.files(folder)):
                self._place.remove(folder / DETAILS_NAME)

    def _remove(self, ticket_number: int, files: Sequence[StoredCheckpoint], dry_run: bool) -> int:
        folder = self._folder(ticket_number)
        for file in () if dry_run else files:
            with failures_of(self._place, f"{file.name} cannot be deleted from", folder):
                self._place.remove(folder / file.name)
        return sum(file.size for file in files)

    def _folder(self, ticket_number: int) -> PurePosixPath:
        return PurePosixPath(self._layout.trial(ticket_number).as_posix())


def _copy(local: Path, output: Path) -> None:
    if output.suffix == ".pt":
        from yolocore.checkpoint import load_weights, save_weights

        save_weights(output, load_weights(local))
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(local, temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(name: str, size: int) -> StoredCheckpoint | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    epochs, attempt, digest = int(match["epochs"]), int(match["attempt"]), match["digest"]
    return StoredCheckpoint(name=name, epochs_done=epochs, attempt=attempt, digest=digest, size=size)


def _latest_first(file: StoredCheckpoint) -> tuple[int, int, str]:
    return -file.epochs_done, -file.attempt, file.digest


def value_row(ticket: Ticket, rows: Sequence[EpochRow]) -> EpochRow | None:
    """The stored epoch that gave a finished trial its value."""
    return next((row for row in rows if row.epoch == ticket.best_epoch), None)


def complete_trials(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The trials that `export` chooses from, the best first; of equals the earliest, so that the base wins a tie."""
    complete = [t for t in tickets if t.kind == "search" and t.state is TicketState.COMPLETE and t.value is not None]
    return sorted(complete, key=lambda ticket: (-(ticket.value or 0.0), ticket.number))


def best_trials(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The best complete trial; with several objectives those that no other one beats in all of them."""
    return front(tickets) or complete_trials(tickets)[:1]


def best_candidates(trials: Sequence[Ticket]) -> list[Ticket]:
    """The complete trials of a search, the best first, each set of parameters once, without the base's."""
    bases = base_numbers(trials)
    seen = [ticket.params for ticket in trials if ticket.number in bases]
    found = []
    for ticket in complete_trials(trials):
        if ticket.params not in seen:
            seen.append(ticket.params)
            found.append(ticket)
    return found


def shown_trials(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The complete trials that a study may yet recommend: the base, the best few, candidates of a confirmation.

    With several objectives, where nothing is confirmed, the base and the front.

    Args:
        tickets: All of the study, reruns included.
    """
    trials = [ticket for ticket in tickets if ticket.kind == SEARCH]
    bases, best = base_numbers(trials), best_trials(trials)
    if not front(trials):
        best = [*best, *best_candidates(trials)[:BEST_TRIALS]]
    rerun = {ticket.candidate for ticket in tickets if ticket.kind == CONFIRM}
    numbers = {ticket.number for ticket in best} | bases | rerun
    return [ticket for ticket in complete_trials(trials) if ticket.number in numbers]


def kept_numbers(tickets: Sequence[Ticket], policy: str) -> frozenset[int]:
    """Numbers of the finished trials whose weights stay.

    Args:
        tickets: All of the study, reruns included.
        policy: `train.keep_weights`: `best` keeps those of the trials that may yet be recommended, `all` of every
            complete one.
    """
    complete = shown_trials(tickets) if policy == "best" else complete_trials(tickets)
    return frozenset(ticket.number for ticket in complete if policy != "none")
