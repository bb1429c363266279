"""The `Ledger`: the only truth of what a study's trials are and who owns them."""

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from search.database import READ_ONLY, check_study_name, database_errors, retry
from search.errors import DatabaseError, StudyConflictError, UserInputError
from search.ledger import claims, rungs, schema
from search.ledger.records import (
    RERUN_KINDS,
    SEARCH,
    EpochRow,
    Rerun,
    StateCount,
    StopKind,
    StudyRecord,
    Ticket,
    TicketState,
    WorkerRow,
    WorkerState,
)
from search.ledger.rows import (
    TICKET_COLUMNS,
    clock,
    epoch_of,
    finite_or_none,
    held,
    lock_held,
    lost,
    read_epoch,
    read_study,
    read_ticket,
    study_of,
    ticket_of,
    update_attempt,
    update_held,
    worker_of,
)
from search.ledger.tables import epoch_table, fidelity_table, study_table, ticket_table, worker_table

FINAL = tuple(state for state in TicketState if state.is_final)

T = TypeVar("T")


class TrialTakenError(DatabaseError):
    """The Optuna trial belongs to another ticket already; nothing was written."""


class Ledger:
    """Tickets, epoch reports, studies and workers in a database that many processes share.

    Contract:
    - A write of a ticket's holder takes effect only while (id, attempt) is RUNNING; else `LeaseLostError` is raised and
      nothing is written. An expired lease still counts as held until somebody takes the ticket over.
    - Every method is one transaction, and repeating it changes nothing more. Lost connections, restarts and busy files
      are retried for `patience` seconds, then `DatabaseError` is raised with the password masked.
    - Leases and heartbeats run on the database's clock (on SQLite: this host's). All times are UTC epoch seconds.
    - Numbers that are not finite: an objective `value` becomes None, a metric keeps its value.
    """

    def __init__(self, engine: Engine, *, patience: float = 60.0) -> None:
        """Uses `engine` (from `search.database.make_engine`); connects to nothing yet."""
        self._engine = engine
        self._patience = patience

    # -- schema and studies -------------------------------------------------------------------------------------------

    def initialise(self) -> None:
        """Creates or upgrades the tables under a lock. Raises DatabaseError for a foreign or a newer schema."""
        schema.initialise(self._engine)

    def check_schema(self) -> None:
        """For readers: raises DatabaseError unless this version's tables are there. Writes nothing."""
        schema.check_schema(self._engine)

    def create_study(
        self,
        record: StudyRecord,
        tickets: Sequence[Mapping[str, Any] | None],
        link0: tuple[int, int, Mapping[str, Any]] | None = None,
    ) -> bool:
        """Creates a study and its budget in one step.

        Args:
            record: name, frozen configuration, fingerprint, versions and time of creation.
            tickets: for each ticket in order of its number the fixed parameters, None to let the sampler choose.
            link0: trial id, trial number and parameters of the trial that ticket 0 owns already.

        Returns:
            False if a study of this name exists; then nothing was written.
        """
        check_study_name(record.name)
        token = uuid.uuid4().hex

        def create(connection: Connection) -> None:
            values = {name: getattr(record, name) for name in StudyRecord.__dataclass_fields__}
            connection.execute(sa.insert(study_table).values(**values, token=token))
            _insert_tickets(connection, record.name, SEARCH, 0, [_proposal(params) for params in tickets], token)
            if link0 is not None:
                trial_id, trial_number, params = link0
                of_search = (ticket_table.c.study == record.name) & (ticket_table.c.kind == SEARCH)
                first = of_search & (ticket_table.c.number == 0)
                link = {"trial_id": trial_id, "trial_number": trial_number, "params": dict(params)}
                connection.execute(sa.update(ticket_table).where(first).values(**link))

        try:
            self._write(create)
        except IntegrityError:
            creator = sa.select(study_table.c.token).where(study_table.c.name == record.name)
            return self._read(lambda connection: connection.execute(creator).scalar_one_or_none()) == token
        return True

    def study(self, name: str) -> StudyRecord:
        """The study's record. Raises UnknownStudyError naming those that exist."""
        return self._read(lambda connection: study_of(read_study(connection, name)))

    def studies(self) -> tuple[StudyRecord, ...]:
        """All studies, oldest first."""
        query = sa.select(study_table).order_by(study_table.c.created, study_table.c.name)
        return self._read(lambda connection: tuple(study_of(row) for row in connection.execute(query)))

    def set_summary_run(self, name: str, run_id: str) -> None:
        """Stores the MLflow run that sums the study up."""
        self._update_study(name, {"summary_run_id": run_id})

    def stop(self, name: str, reason: str | None, kind: StopKind = StopKind.FAILED) -> None:
        """No more tickets are given out, for `reason`; None lets the study go on, and old failures count no more."""

        def update(connection: Connection) -> None:
            if reason is None:
                _let_go_on(connection, name)
            else:
                _update_study(connection, name, {"stop_reason": reason, "stop_kind": kind})

        self._write(update)

    def update_config(self, name: str, changes: Mapping[str, Any]) -> None:
        """Replaces top-level keys of a study's frozen configuration: those of its budget, when it is taken up again."""

        def update(connection: Connection) -> None:
            config = dict(read_study(connection, name, lock=True).config)
            _update_study(connection, name, {"config": {**config, **changes}})

        self._write(update)

    def add_tickets(
        self, study: str, count: int, *, kind: str = SEARCH, fixed_params: Sequence[Mapping[str, Any] | None] = ()
    ) -> None:
        """Raises the budget by `count`; the numbers stay gapless whoever else does so at the same time.

        Args:
            study: its name.
            count: how many.
            kind: which budget.
            fixed_params: of the first of them, None to let the sampler choose, as it does for the rest.
        """
        if len(fixed_params) > count:
            raise ValueError(f"{len(fixed_params)} sets of parameters for {count} tickets")
        params = [*fixed_params, *[None] * (count - len(fixed_params))]
        self._add(study, kind, lambda _: [_proposal(entry) for entry in params])

    def add_reruns(self, study: str, kind: str, reruns: Sequence[Rerun]) -> tuple[Ticket, ...]:
        """Adds a ticket for each rerun that has none yet, or has only failed ones; whoever else does so as well.

        Args:
            study: its name.
            kind: noise or confirm.
            reruns: all that are wanted, in the order in which they should be trained.

        Returns:
            The tickets that were added.
        """
        columns = ticket_table.c
        key = (columns.candidate, columns.seed, columns.epochs)

        def missing(connection: Connection) -> list[dict[str, Any]]:
            sound = (columns.study == study) & (columns.kind == kind) & (columns.state != TicketState.FAIL)
            known = {tuple(row) for row in connection.execute(sa.select(*key).where(sound))}
            wanted = {(rerun.candidate, rerun.seed, rerun.epochs): rerun for rerun in reruns}
            return [
                {"candidate": rerun.candidate, "seed": rerun.seed, "epochs": rerun.epochs, "params": dict(rerun.params)}
                for name, rerun in wanted.items()
                if name not in known
            ]

        return self._add(study, kind, missing)

    def fix_params(self, study: str, params: Sequence[Mapping[str, Any]], *, kind: str = SEARCH) -> tuple[int, ...]:
        """Gives parameters to the first tickets that nobody has claimed yet; the budget stays as it is.

        Args:
            study: its name.
            params: of one ticket each.
            kind: which budget.

        Returns:
            The tickets' numbers; fewer than `params` where fewer are left.
        """
        columns = ticket_table.c
        # One that was claimed before may have a trial with other parameters already.
        untouched = (columns.state == TicketState.WAITING) & (columns.attempt == 0) & columns.fixed_params.is_(None)
        token = uuid.uuid4().hex
        of_kind = (columns.study == study) & (columns.kind == kind)

        def fix(connection: Connection) -> tuple[int, ...]:
            read_study(connection, study, lock=True)
            done = sa.select(columns.number).where(of_kind & (columns.token == token)).order_by(columns.number)
            if earlier := tuple(connection.execute(done).scalars()):
                return earlier
            query = sa.select(columns.id, columns.number).where(of_kind & untouched & columns.trial_id.is_(None))
            rows = connection.execute(query.order_by(columns.number).limit(len(params)).with_for_update()).all()
            for row, one in zip(rows, params, strict=False):
                update = sa.update(ticket_table).where(columns.id == row.id)
                connection.execute(update.values(fixed_params=dict(one), token=token))
            return tuple(row.number for row in rows)

        return self._write(fix) if params else ()

    def retry_tickets(
        self, study: str, fixed_params: Mapping[int, Mapping[str, Any] | None], *, kind: str = SEARCH
    ) -> tuple[Ticket, ...]:
        """Adds a new ticket for each of some failed ones, which stay as they are; a study that was stopped goes on.

        Args:
            study: its name.
            fixed_params: number of each failed ticket, and the parameters of its new one; None: the sampler's.
            kind: which budget.

        Returns:
            The new tickets; their `retry_of` names the failed ones.

        Raises:
            UserInputError: a ticket that is not FAIL, or that was retried before; nothing was written.
        """
        numbers = list(fixed_params)
        columns = ticket_table.c

        def retries(connection: Connection) -> list[dict[str, Any]]:
            of_kind = (columns.study == study) & (columns.kind == kind)
            query = sa.select(columns.number, columns.state, columns.retry_of).where(of_kind)
            rows = connection.execute(query).all()
            states = {row.number: row.state for row in rows}
            retried = {row.retry_of: row.number for row in rows if row.retry_of is not None}
            for number in numbers:
                if number in retried:
                    _refuse_retry(study, number, f"was retried already, as trial {retried[number]}")
                if (state := states.get(number)) != TicketState.FAIL:
                    _refuse_retry(study, number, "does not exist" if state is None else f"is {state}")
            # With the tickets: asked once more after a crash in between, there would be nothing left to retry.
            if numbers and kind == SEARCH:
                _let_go_on(connection, study)
            return [_proposal(params, retry_of=number) for number, params in fixed_params.items()]

        return self._add(study, kind, retries)

    def _add(
        self, study: str, kind: str, wanted: Callable[[Connection], Sequence[Mapping[str, Any]]]
    ) -> tuple[Ticket, ...]:
        """Adds tickets with what `wanted` finds, inside the transaction, to be their own."""
        token = uuid.uuid4().hex
        mine = ticket_table.c.token == token

        def add(connection: Connection) -> tuple[Ticket, ...]:
            read_study(connection, study, lock=True)
            of_kind = (ticket_table.c.study == study) & (ticket_table.c.kind == kind)
            added = sa.select(*TICKET_COLUMNS).where(of_kind & mine).order_by(ticket_table.c.number)
            if not (rows := connection.execute(added).all()):
                rows_wanted = wanted(connection)
                highest = connection.execute(sa.select(sa.func.max(ticket_table.c.number)).where(of_kind)).scalar()
                start = 0 if highest is None else highest + 1
                _insert_tickets(connection, study, kind, start, rows_wanted, token)
                rows = connection.execute(added).all()
            return tuple(ticket_of(row) for row in rows)

        return self._write(add)

    def delete_study(self, name: str, *, force: bool = False) -> None:
        """Deletes a study with its tickets, reports and workers, or nothing.

        Args:
            name: the study; nothing happens if there is none of this name.
            force: also if tickets are held. Their holders lose them.

        Raises:
            StudyConflictError: tickets are RUNNING with a lease that has not expired.
        """
        columns = ticket_table.c

        def delete(connection: Connection) -> None:
            study = sa.select(study_table.c.name).where(study_table.c.name == name).with_for_update()
            if connection.execute(study).one_or_none() is None:
                return
            # Locked in the order of the ids, as everywhere.
            query = sa.select(*TICKET_COLUMNS).where(columns.study == name).order_by(columns.id).with_for_update()
            tickets = [ticket_of(row) for row in connection.execute(query)]
            now = clock(connection)
            live = [ticket for ticket in tickets if ticket.state is TicketState.RUNNING and not _expired(ticket, now)]
            if live and not force:
                raise StudyConflictError(_still_running(name, live, now))
            of_study = sa.select(columns.id).where(columns.study == name)
            for reports in (epoch_table, fidelity_table):
                connection.execute(sa.delete(reports).where(reports.c.ticket_id.in_(of_study)))
            for table in (ticket_table, worker_table):
                connection.execute(sa.delete(table).where(table.c.study == name))
            connection.execute(sa.delete(study_table).where(study_table.c.name == name))

        self._write(delete)

    def refuse_if_running(self, name: str) -> None:
        """Raises StudyConflictError if tickets of the study are RUNNING with a lease that has not expired."""
        running = (ticket_table.c.study == name) & (ticket_table.c.state == TicketState.RUNNING)
        query = sa.select(*TICKET_COLUMNS).where(running).order_by(ticket_table.c.number)

        def read(connection: Connection) -> tuple[list[Ticket], float]:
            return [ticket_of(row) for row in connection.execute(query)], clock(connection)

        tickets, now = self._read(read)
        if live := [ticket for ticket in tickets if not _expired(ticket, now)]:
            raise StudyConflictError(_still_running(name, live, now))

    # -- claiming -----------------------------------------------------------------------------------------------------

    def claim(
        self,
        study: str,
        worker: str,
        limit: int,
        lease_seconds: float,
        *,
        kind: str = SEARCH,
        joining: bool = False,
        accept: Callable[[Ticket], bool] | None = None,
        alike: Callable[[Ticket, Ticket], bool] | None = None,
    ) -> tuple[Ticket, ...]:
        """Leases up to `limit` tickets to `worker`; () if none is free now.

        Interrupted trials come first, then by number. A ticket with `trial_id` continues that trial. Tickets whose
        lease expired are taken over; one that made no progress in `MAX_STALLED` attempts in a row becomes FAIL instead,
        and one attempt before that it is claimed alone.

        Args:
            study: its name.
            worker: who claims.
            limit: at most so many.
            lease_seconds: how long a silent worker keeps them.
            kind: which budget.
            joining: they join trials that the worker is training: none that is on its last chance.
            accept: of those that join, only the ones for which this holds; it is asked about all that are free.
            alike: of those that come with the first, only the ones for which this holds of the first and them.

        Raises:
            UnknownStudyError: no such study.
            StudyStoppedError: the study's search gives out no more tickets.
        """
        token = uuid.uuid4().hex
        tries = 0

        def claim(connection: Connection) -> tuple[Ticket, ...]:
            nonlocal tries
            tries += 1
            # An earlier try may have been committed although its answer was lost.
            earlier = claims.claimed_with(connection, token) if tries > 1 else ()
            return earlier or claims.claim(
                connection,
                study,
                kind,
                worker,
                limit,
                lease_seconds,
                token,
                joining=joining,
                accept=accept,
                alike=alike,
            )

        return self._write(claim) if limit > 0 else ()

    def renew(self, worker: str, ticket_ids: Iterable[int], lease_seconds: float) -> set[int]:
        """Extends the leases that `worker` still holds, counted from now; returns their ticket ids."""
        mine = (
            ticket_table.c.id.in_(sorted(ticket_ids))
            & (ticket_table.c.worker == worker)
            & (ticket_table.c.state == TicketState.RUNNING)
        )

        def renew(connection: Connection) -> set[int]:
            # Locked in the order of the ids, as everywhere, so that two renewals cannot wait for each other.
            query = sa.select(ticket_table.c.id).where(mine).order_by(ticket_table.c.id).with_for_update()
            ids = set(connection.execute(query).scalars())
            expires = clock(connection) + lease_seconds
            connection.execute(sa.update(ticket_table).where(ticket_table.c.id.in_(ids)).values(lease_expires=expires))
            return ids

        return self._write(renew)

    def hand_back(self, tickets: Iterable[Ticket]) -> set[int]:
        """Gives tickets back gracefully, at their last checkpoint and at no charge.

        Returns:
            The ids that went back; a ticket that is no longer held is left alone.
        """

        def hand_back(connection: Connection) -> set[int]:
            given = set()
            values = {"state": TicketState.WAITING, "worker": None, "lease_expires": None}
            for ticket in sorted(tickets, key=lambda ticket: ticket.id):
                if connection.execute(sa.update(ticket_table).where(held(ticket)).values(**values)).rowcount:
                    given.add(ticket.id)
            return given

        tickets = tuple(tickets)
        return self._write(hand_back)

    def abandon(self, ticket: Ticket, reason: str) -> Ticket:
        """Ends this attempt as a crash: WAITING again, or FAIL after too many without progress."""

        def abandon(connection: Connection) -> Ticket:
            lock_held(connection, ticket)
            return claims.end_attempt(connection, read_ticket(connection, ticket.id), reason)

        return self._write(abandon)

    def release_worker(self, worker_id: str, reason: str = "its worker died") -> int:
        """For the launcher of a dead worker: its tickets can be claimed at once, and each attempt counts as a crash.

        Returns:
            How many tickets it held.
        """

        def release(connection: Connection) -> int:
            dead = sa.update(worker_table).where(worker_table.c.id == worker_id)
            connection.execute(dead.values(state=WorkerState.DEAD))
            return claims.release(connection, worker_id, reason)

        return self._write(release)

    # -- a holder's writes --------------------------------------------------------------------------------------------

    def owned_trial_ids(self, ticket: Ticket, running: Mapping[int, int | None]) -> set[int]:
        """Which RUNNING trials of Optuna the ticket may not have: others own them, or may be about to link them.

        A trial's maker may still link it as long as the ticket it was made for is open and has no trial. One that was
        made for `ticket` itself is what an earlier attempt left.

        Args:
            ticket: as claimed; it has no trial yet.
            running: id of each such trial, and the number of the ticket that it was made for.

        Raises:
            LeaseLostError: the ticket is no longer held.
        """

        def read(connection: Connection) -> set[int]:
            if connection.execute(sa.select(ticket_table.c.id).where(held(ticket))).one_or_none() is None:
                raise lost(ticket)
            return _claimed_trials(connection, ticket.study, ticket.kind, running, but=ticket.id)

        return self._read(read)

    def claimed_trial_ids(self, study: str, running: Mapping[int, int | None]) -> set[int]:
        """As `owned_trial_ids`, for nobody: which RUNNING trials of Optuna tickets own, or may be about to link."""
        return self._read(lambda connection: _claimed_trials(connection, study, SEARCH, running))

    @staticmethod
    def condition(ticket: Ticket) -> Callable[[Connection], None]:
        """For writes by others in this database: raises LeaseLostError in their transaction unless the lease holds."""
        return lambda connection: lock_held(connection, ticket)

    def link_trial(self, ticket: Ticket, trial_id: int, trial_number: int, params: Mapping[str, Any]) -> Ticket:
        """Stores which Optuna trial, with which parameters, this ticket pays for; once and for all its attempts.

        Raises:
            LeaseLostError: the ticket is no longer held.
            TrialTakenError: another ticket has this trial.
            DatabaseError: the ticket has another trial already.
        """

        def link(connection: Connection) -> Ticket:
            lock_held(connection, ticket)
            linked = read_ticket(connection, ticket.id).trial_id
            if linked not in {None, trial_id}:
                raise DatabaseError(f"ticket {ticket.number} of study {ticket.study!r} already owns trial id {linked}")
            return update_held(connection, ticket, trial_id=trial_id, trial_number=trial_number, params=dict(params))

        try:
            return self._write(link)
        except IntegrityError:
            raise TrialTakenError(f"trial id {trial_id} of study {ticket.study!r} belongs to another ticket") from None

    def set_run(self, ticket: Ticket, run_id: str) -> Ticket:
        """Stores the MLflow run of the trial; also when the attempt has ended it, since the mirror may lag behind.

        Raises:
            LeaseLostError: A later attempt has begun.
        """
        return self._write(lambda connection: update_attempt(connection, ticket, run_id=run_id))

    def record_epoch(
        self,
        ticket: Ticket,
        epoch: int,
        value: float | None,
        metrics: Mapping[str, float],
        stored_at: float | None = None,
    ) -> EpochRow:
        """Stores the report of an evaluated epoch, unless an earlier attempt already did.

        Args:
            ticket: as claimed.
            epoch: 0-based.
            value: the objective; stored as None if it is not finite.
            metrics: what the mirrors send.
            stored_at: UTC epoch seconds; by default now on the database's clock.

        Returns:
            The row as stored: the first commit's numbers, whatever was passed.

        Raises:
            LeaseLostError: the ticket is no longer held; nothing was written.
        """

        def record(connection: Connection) -> EpochRow:
            lock_held(connection, ticket)
            if stored := read_epoch(connection, ticket.id, epoch):
                return stored
            row = {
                "ticket_id": ticket.id,
                "epoch": epoch,
                "attempt": ticket.attempt,
                "value": finite_or_none(value),
                "metrics": {key: float(number) for key, number in metrics.items()},
                "stored_at": clock(connection) if stored_at is None else stored_at,
            }
            connection.execute(sa.insert(epoch_table).values(**row))
            return _existing_epoch(connection, ticket, epoch)

        return self._write(record)

    def decide(self, ticket: Ticket, epoch: int, prune: bool) -> EpochRow:
        """Stores the pruner's decision on a reported epoch unless it has one; returns the row with what holds.

        Raises:
            LeaseLostError: the ticket is no longer held; nothing was written.
            LookupError: the epoch was not reported.
        """

        def decide(connection: Connection) -> EpochRow:
            lock_held(connection, ticket)
            columns = epoch_table.c
            undecided = (columns.ticket_id == ticket.id) & (columns.epoch == epoch) & columns.prune.is_(None)
            connection.execute(sa.update(epoch_table).where(undecided).values(prune=bool(prune)))
            return _existing_epoch(connection, ticket, epoch)

        return self._write(decide)

    def save_progress(self, ticket: Ticket, epochs_done: int, checkpoint: str | None) -> Ticket:
        """Stores where the next attempt starts. Call it once the checkpoint is on disk.

        A lower `epochs_done` than before (the checkpoint could not be read: the trial starts over) is allowed.
        Progress clears `stalled_attempts`. Raises LeaseLostError.
        """
        columns = ticket_table.c
        values = {
            "epochs_done": epochs_done,
            "checkpoint": checkpoint,
            "stalled_attempts": sa.case((columns.epochs_at_claim < epochs_done, 0), else_=columns.stalled_attempts),
            "epochs_at_claim": sa.case(
                (columns.epochs_at_claim > epochs_done, epochs_done), else_=columns.epochs_at_claim
            ),
        }
        return self._write(lambda connection: update_held(connection, ticket, **values))

    def finish(
        self,
        ticket: Ticket,
        state: TicketState,
        value: float | None,
        reason: str | None,
        best_epoch: int | None = None,
        objective_values: Sequence[float] | None = None,
    ) -> Ticket:
        """Spends the ticket. Finishing twice with the same state is allowed.

        Args:
            ticket: as claimed.
            state: how it ended.
            value: the objective; of several the first.
            reason: why, if there is something to say.
            best_epoch: the epoch that gave it its value, 0-based.
            objective_values: all of them in a study of several objectives.

        Raises:
            LeaseLostError: the ticket is no longer held; nothing was written.
            ValueError: `state` is not final, or COMPLETE comes without finite values.
        """
        if not state.is_final:
            raise ValueError(f"{state} does not finish a ticket")
        for number in (value, *(objective_values or ())) if state is TicketState.COMPLETE else ():
            if finite_or_none(number) is None:
                raise ValueError(f"COMPLETE needs a finite value, not {number}")

        def finish(connection: Connection) -> Ticket:
            # Locked, which waits for an earlier try whose connection was lost while its commit went on.
            stored = read_ticket(connection, ticket.id, lock=True)
            if stored.attempt == ticket.attempt and stored.state is state:
                return stored
            return update_held(
                connection,
                ticket,
                state=state,
                value=finite_or_none(value),
                reason=reason,
                best_epoch=best_epoch,
                objective_values=None if objective_values is None else list(objective_values),
                lease_expires=None,
                finished=clock(connection),
            )

        return self._write(finish)

    # -- the cheap training before the full one -----------------------------------------------------------------------

    def record_fidelity(
        self, ticket: Ticket, epoch: int, value: float | None, metrics: Mapping[str, float], *, is_last: bool
    ) -> EpochRow:
        """As `record_epoch`, for the cheap training; the last epoch's value becomes the ticket's `fidelity_value`."""
        return self._write(
            lambda connection: rungs.record(connection, ticket, epoch, value, metrics, None, is_last=is_last)
        )

    def settle_fidelity(self, ticket: Ticket, promote: rungs.Promote) -> Ticket:
        """Decides once whether a trial goes on to the full training; one that does is back in the queue, uncharged.

        Returns:
            The ticket as it is now: WAITING and promoted, or still held and not promoted.

        Raises:
            LeaseLostError: the ticket is no longer held.
        """
        return self._write(lambda connection: rungs.settle(connection, ticket, promote))

    def fidelity_reports(self, ticket_id: int) -> tuple[EpochRow, ...]:
        """The evaluated epochs of a ticket's cheap training, in order."""
        return self._read(lambda connection: rungs.read(connection, ticket_id))

    def waiting_promoted(self, study: str) -> int:
        """How many trials have passed the cheap training and wait for the full one."""
        columns = ticket_table.c
        waiting = (columns.study == study) & (columns.state == TicketState.WAITING) & columns.promoted.is_(True)
        query = sa.select(sa.func.count()).where(waiting)
        return int(self._read(lambda connection: connection.execute(query).scalar_one()))

    # -- reading ------------------------------------------------------------------------------------------------------

    def ticket(self, ticket_id: int) -> Ticket:
        """One ticket. Raises LookupError."""
        return self._read(lambda connection: read_ticket(connection, ticket_id))

    def tickets(self, study: str, kinds: Collection[str] = (SEARCH,)) -> tuple[Ticket, ...]:
        """All tickets of a study by kind and number; those of its search unless `kinds` says otherwise."""
        return self._tickets((ticket_table.c.study == study) & ticket_table.c.kind.in_(sorted(kinds)))

    def unmirrored(self, study: str) -> tuple[Ticket, ...]:
        """Finished tickets whose final state Optuna and MLflow may not have yet."""
        final = ticket_table.c.state.in_([state for state in TicketState if state.is_final])
        return self._tickets((ticket_table.c.study == study) & final & ticket_table.c.mirrored.is_(False))

    def mark_mirrored(self, ticket_id: int) -> None:
        """Notes that Optuna and MLflow have the final state; nothing happens for a ticket that is not final."""
        final = ticket_table.c.state.in_([state for state in TicketState if state.is_final])
        statement = sa.update(ticket_table).where((ticket_table.c.id == ticket_id) & final).values(mirrored=True)
        self._write(lambda connection: connection.execute(statement))

    def reports(self, ticket_id: int) -> tuple[EpochRow, ...]:
        """The epoch rows of a ticket by epoch."""
        query = sa.select(epoch_table).where(epoch_table.c.ticket_id == ticket_id).order_by(epoch_table.c.epoch)
        return self._read(lambda connection: tuple(epoch_of(row) for row in connection.execute(query)))

    def all_reports(self, study: str, kinds: Collection[str] = (SEARCH,)) -> dict[int, tuple[EpochRow, ...]]:
        """The epoch rows of every ticket of a study (of its search) that has some, by ticket id."""
        query = (
            sa.select(epoch_table)
            .join(ticket_table, ticket_table.c.id == epoch_table.c.ticket_id)
            .where((ticket_table.c.study == study) & ticket_table.c.kind.in_(sorted(kinds)))
            .order_by(epoch_table.c.ticket_id, epoch_table.c.epoch)
        )
        grouped: dict[int, list[EpochRow]] = {}
        for report in self._read(lambda connection: [epoch_of(row) for row in connection.execute(query)]):
            grouped.setdefault(report.ticket_id, []).append(report)
        return {ticket_id: tuple(rows) for ticket_id, rows in grouped.items()}

    def counts(self, study: str, kinds: Collection[str] = (SEARCH,)) -> dict[TicketState, int]:
        """How many tickets (of the search) are in each state; every state is a key."""
        state = ticket_table.c.state
        wanted = (ticket_table.c.study == study) & ticket_table.c.kind.in_(sorted(kinds))
        query = sa.select(state, sa.func.count()).where(wanted).group_by(state)
        found = self._read(lambda connection: {row[0]: row[1] for row in connection.execute(query)})
        return {state: found.get(state, 0) for state in TicketState}

    def state_counts(self) -> tuple[StateCount, ...]:
        """How many search tickets every study has in each state, and the best value among them; one query."""
        columns = ticket_table.c
        query = (
            sa.select(columns.study, columns.state, sa.func.count().label("count"), sa.func.max(columns.value))
            .where(columns.kind == SEARCH)
            .group_by(columns.study, columns.state)
            .order_by(columns.study, columns.state)
        )

        def read(connection: Connection) -> tuple[StateCount, ...]:
            return tuple(
                StateCount(study=study, state=TicketState(state), count=count, best=best)
                for study, state, count, best in connection.execute(query)
            )

        return self._read(read)

    def failures_in_a_row(self, study: str) -> int:
        """How many tickets of the search failed since the last that did not (or since the study was told to go on)."""
        columns = ticket_table.c
        of_study = (columns.study == study) & (columns.kind == SEARCH)

        def last(connection: Connection, state: TicketState) -> float:
            query = sa.select(sa.func.max(columns.finished)).where(of_study & (columns.state == state))
            return connection.execute(query).scalar() or 0.0

        def count(connection: Connection) -> int:
            resumed = read_study(connection, study).resumed or 0.0
            # Each is the end of an index; the three in one query would read all that is finished.
            success = max(last(connection, TicketState.COMPLETE), last(connection, TicketState.PRUNED))
            after = columns.finished > max(resumed, success)
            failed = sa.select(sa.func.count()).where(of_study & (columns.state == TicketState.FAIL) & after)
            return int(connection.execute(failed).scalar_one())

        return self._read(count)

    def latest_failures(self, study: str, count: int) -> tuple[Ticket, ...]:
        """The last `count` tickets of the search that failed, oldest first."""
        columns = ticket_table.c
        failed = (columns.study == study) & (columns.kind == SEARCH) & (columns.state == TicketState.FAIL)
        query = sa.select(*TICKET_COLUMNS).where(failed).order_by(columns.finished.desc()).limit(count)
        found = self._read(lambda connection: [ticket_of(row) for row in connection.execute(query)])
        return tuple(reversed(found))

    # -- sums over a study, which cost the same however many trials are finished --------------------------------------

    def open_counts(self, study: str, kinds: Collection[str] = (SEARCH,)) -> dict[TicketState, int]:
        """How many tickets wait and how many run; those of the search unless `kinds` says otherwise."""
        columns = ticket_table.c
        states = (TicketState.WAITING, TicketState.RUNNING)
        query = (
            sa.select(columns.state, sa.func.count())
            .where((columns.study == study) & columns.kind.in_(sorted(kinds)) & columns.state.in_(states))
            .group_by(columns.state)
        )
        found = self._read(lambda connection: {row[0]: row[1] for row in connection.execute(query)})
        return {state: found.get(state, 0) for state in states}

    def largest_cohort(self, study: str) -> int:
        """How many open reruns of one kind, seed and length there are at most: they would share a pack."""
        columns = ticket_table.c
        open_ = columns.state.in_((TicketState.WAITING, TicketState.RUNNING))
        query = (
            sa.select(sa.func.count())
            .where((columns.study == study) & columns.kind.in_(RERUN_KINDS) & open_)
            .group_by(columns.kind, columns.seed, columns.epochs)
        )
        return max(self._read(lambda connection: list(connection.execute(query).scalars())), default=0)

    def best(self, study: str) -> Ticket | None:
        """The complete search ticket of the highest value, the first of equals."""
        columns = ticket_table.c
        complete = (columns.study == study) & (columns.state == TicketState.COMPLETE) & columns.value.is_not(None)
        query = sa.select(*TICKET_COLUMNS).where(complete & (columns.kind == SEARCH))
        first = query.order_by(columns.value.desc(), columns.number).limit(1)
        row = self._read(lambda connection: connection.execute(first).one_or_none())
        return None if row is None else ticket_of(row)

    def best_value(self, study: str, until: float) -> float | None:
        """The highest value among the search tickets that were complete at a time (UTC epoch seconds)."""
        columns = ticket_table.c
        complete = (columns.study == study) & (columns.state == TicketState.COMPLETE) & (columns.kind == SEARCH)
        query = sa.select(sa.func.max(columns.value)).where(complete & (columns.finished <= until))
        return self._read(lambda connection: connection.execute(query).scalar())

    def parked(self, study: str) -> int:
        """How many trials wait for a pack that they fit into: proposed already, and not trained yet."""
        columns = ticket_table.c
        waiting = (columns.study == study) & (columns.state == TicketState.WAITING)
        unfit = columns.trial_id.is_not(None) & (columns.epochs_done == 0) & columns.promoted.is_not(True)
        query = sa.select(sa.func.count()).where(waiting & unfit)
        return int(self._read(lambda connection: connection.execute(query).scalar_one()))

    def progress(self, study: str) -> int:
        """A number that grows with every secured epoch and every ended trial."""
        columns = ticket_table.c
        ended = sa.case((columns.state.in_(FINAL), 1), else_=0)
        query = sa.select(sa.func.sum(columns.epochs_done + ended)).where(columns.study == study)
        return int(self._read(lambda connection: connection.execute(query).scalar()) or 0)

    def budget(self, study: str, *, kind: str = SEARCH) -> int:
        """How many tickets there are; a retry is another attempt at a trial of the budget and does not count."""
        columns = ticket_table.c
        counted = (columns.study == study) & (columns.kind == kind) & columns.retry_of.is_(None)
        query = sa.select(sa.func.count()).where(counted)
        return int(self._read(lambda connection: connection.execute(query).scalar_one()))

    def held_by(self, workers: Iterable[str]) -> tuple[Ticket, ...]:
        """The tickets that some workers hold."""
        names = sorted(workers)
        held_now = ticket_table.c.worker.in_(names) & (ticket_table.c.state == TicketState.RUNNING)
        return self._tickets(held_now) if names else ()

    def ended_by(self, worker: str) -> int:
        """How many tickets a worker has spent."""
        mine = (ticket_table.c.worker == worker) & ticket_table.c.state.in_(FINAL)
        query = sa.select(sa.func.count()).where(mine)
        return int(self._read(lambda connection: connection.execute(query).scalar_one()))

    def unsettled(self, study: str) -> tuple[int, ...]:
        """Ids of the tickets whose end, or return to the queue, Optuna and MLflow may not know yet."""
        columns = ticket_table.c
        unmirrored = columns.state.in_(FINAL) & columns.mirrored.is_(False)
        handed_back = (columns.state == TicketState.WAITING) & columns.run_id.is_not(None)
        query = sa.select(columns.id).where((columns.study == study) & (unmirrored | handed_back)).order_by(columns.id)
        return self._read(lambda connection: tuple(connection.execute(query).scalars()))

    # -- workers ------------------------------------------------------------------------------------------------------

    def register_worker(self, worker_id: str, study: str, host: str, pid: int, device: str) -> WorkerRow:
        """Announces a worker; its id must be new for every process start."""

        def register(connection: Connection) -> WorkerRow:
            read_study(connection, study)
            now = clock(connection)
            connection.execute(sa.delete(worker_table).where(worker_table.c.id == worker_id))
            row = WorkerRow(id=worker_id, study=study, host=host, pid=pid, device=device, started=now, heartbeat=now)
            values = {name: getattr(row, name) for name in WorkerRow.__dataclass_fields__}
            connection.execute(sa.insert(worker_table).values(**values))
            return row

        return self._write(register)

    def heartbeat(self, worker_id: str) -> None:
        """Notes that the worker is alive."""
        mine = sa.update(worker_table).where(worker_table.c.id == worker_id)
        self._write(lambda connection: connection.execute(mine.values(heartbeat=clock(connection))))

    def set_pack(self, worker_id: str, pack: int) -> None:
        """Notes how many trials the worker's packs have at most."""
        mine = sa.update(worker_table).where(worker_table.c.id == worker_id)
        self._write(lambda connection: connection.execute(mine.values(pack=pack)))

    def retire_worker(self, worker_id: str) -> None:
        """Notes that the worker leaves by itself (after it handed its tickets back)."""
        mine = sa.update(worker_table).where(worker_table.c.id == worker_id)
        self._write(lambda connection: connection.execute(mine.values(state=WorkerState.EXITED)))

    def now(self) -> float:
        """UTC epoch seconds on the clock that leases and heartbeats run on."""
        return self._read(clock)

    def workers(self, study: str, state: WorkerState | None = None) -> tuple[WorkerRow, ...]:
        """All workers that ever registered, or those in one state, oldest first."""
        query = sa.select(worker_table).where(worker_table.c.study == study)
        if state is not None:
            query = query.where(worker_table.c.state == state)
        ordered = query.order_by(worker_table.c.started, worker_table.c.id)
        return self._read(lambda connection: tuple(worker_of(row) for row in connection.execute(ordered)))

    # -- transactions -------------------------------------------------------------------------------------------------

    def _write(self, operation: Callable[[Connection], T]) -> T:
        def transaction() -> T:
            with self._engine.begin() as connection:
                return operation(connection)

        return self._run(transaction)

    def _read(self, operation: Callable[[Connection], T]) -> T:
        def transaction() -> T:
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                return operation(connection)

        return self._run(transaction)

    def _run(self, transaction: Callable[[], T]) -> T:
        with database_errors(self._engine.url):
            return retry(transaction, self._patience)

    def _tickets(self, condition: sa.ColumnElement[bool]) -> tuple[Ticket, ...]:
        query = sa.select(*TICKET_COLUMNS).where(condition).order_by(ticket_table.c.kind.desc(), ticket_table.c.number)
        return self._read(lambda connection: tuple(ticket_of(row) for row in connection.execute(query)))

    def _update_study(self, name: str, values: Mapping[str, Any]) -> None:
        self._write(lambda connection: _update_study(connection, name, values))


def _let_go_on(connection: Connection, name: str) -> None:
    _update_study(connection, name, {"stop_reason": None, "stop_kind": None, "resumed": clock(connection)})


def _update_study(connection: Connection, name: str, values: Mapping[str, Any]) -> None:
    read_study(connection, name)
    connection.execute(sa.update(study_table).where(study_table.c.name == name).values(**values))


def _claimed_trials(
    connection: Connection, study: str, kind: str, running: Mapping[int, int | None], but: int | None = None
) -> set[int]:
    """Those of some trials (id, number of the maker) that tickets own, or whose maker, other than `but`, may link."""
    columns = ticket_table.c
    linked = columns.trial_id.in_(sorted(running))
    makers = {number for number in running.values() if number is not None}
    made = (columns.kind == kind) & columns.number.in_(sorted(makers))
    query = sa.select(columns.id, columns.number, columns.state, columns.trial_id)
    rows = connection.execute(query.where((columns.study == study) & (linked | made))).all()
    open_makers = {row.number for row in rows if row.trial_id is None and row.state not in FINAL and row.id != but}
    taken = {row.trial_id for row in rows if row.trial_id is not None}
    return {id_ for id_, maker in running.items() if id_ in taken or maker in open_makers}


def _expired(ticket: Ticket, now: float) -> bool:
    return ticket.lease_expires is None or ticket.lease_expires < now


def _still_running(study: str, tickets: Sequence[Ticket], now: float) -> str:
    holders = ", ".join(dict.fromkeys(str(ticket.worker) for ticket in tickets))
    seconds = max((ticket.lease_expires or now) - now for ticket in tickets)
    return (
        f"study {study}: {len(tickets)} of its trials are running on {holders} (leases end in {seconds:.0f} s); "
        "allowed: a study that nobody works on, or --force"
    )


def _refuse_retry(study: str, number: int, why: str) -> NoReturn:
    raise UserInputError(f"study {study}: trial {number} {why}; allowed: trials that are FAIL and not retried yet")


def _existing_epoch(connection: Connection, ticket: Ticket, epoch: int) -> EpochRow:
    row = read_epoch(connection, ticket.id, epoch)
    if row is None:
        raise LookupError(f"trial {ticket.number} of study {ticket.study!r} has no report of epoch {epoch}")
    return row


def _proposal(fixed_params: Mapping[str, Any] | None, retry_of: int | None = None) -> dict[str, Any]:
    """What is a search ticket's own."""
    return {"fixed_params": None if fixed_params is None else dict(fixed_params), "retry_of": retry_of}


def _insert_tickets(
    connection: Connection, study: str, kind: str, start: int, own: Sequence[Mapping[str, Any]], token: str
) -> None:
    """Inserts tickets with consecutive numbers; `own` has the columns in which they differ, the same in all."""
    common = {
        "study": study,
        "kind": kind,
        "state": TicketState.WAITING,
        "attempt": 0,
        "epochs_done": 0,
        "epochs_at_claim": 0,
        "stalled_attempts": 0,
        "history": [],
        "mirrored": False,
        "created": clock(connection),
        "token": token,
    }
    rows = [{**common, **values, "number": start + index} for index, values in enumerate(own)]
    if rows:
        connection.execute(sa.insert(ticket_table), rows)
