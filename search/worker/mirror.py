"""Copies the ledger's rows to MLflow, and the ends of trials to Optuna as well.

The ledger is the truth and both copies may lag. Everything here can be repeated: a row carries its stored time, a
finished Optuna trial is left alone, a run is found again by its ticket's tag.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna

from search.config import objective_values
from search.confirm import ConfirmReport, latest_confirmation, noise_report, summary_metrics
from search.database import init_lock
from search.errors import LeaseLostError
from search.fidelity import spearman, value_pairs
from search.ledger import NOISE, RERUN_KINDS, EpochRow, Ledger, Ticket, TicketState, front
from search.recommendation import recommended
from search.study import tell
from search.tracking import TrackedState, Tracker
from search.transforms import hyperparameters
from search.weights import value_row
from search.worker.gallery import FINAL_SECONDS, Gallery
from search.worker.records import (
    FORECAST_FILE,
    HYP_FILE,
    MirrorContext,
    metric_name,
    objective_metrics,
    read_outlook,
    recommended_hyp,
    run_params,
    search_is_over,
    table_columns,
)
from yolocore.errors import CheckpointError, HyperparameterError

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 2.0
RETRY_SECONDS = 5.0
TRACKED_STATES = {
    TicketState.WAITING: TrackedState.SCHEDULED,
    TicketState.RUNNING: TrackedState.RUNNING,
    TicketState.COMPLETE: TrackedState.COMPLETE,
    TicketState.PRUNED: TrackedState.PRUNED,
    TicketState.FAIL: TrackedState.FAIL,
}


class Mirror:
    """A thread that brings MLflow up to the ledger's rows, off the training path.

    `notify` names a ticket whose rows changed. Where MLflow is away, tickets wait here; what is not sent when the
    process ends is sent by `reconcile`, in this worker or in a later one.
    """

    def __init__(self, ledger: Ledger, study: optuna.Study, tracker: Tracker, context: MirrorContext) -> None:
        self._ledger = ledger
        self._study = study
        self._tracker = tracker
        self._context = context
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._sent: dict[int, int] = {}
        self._sent_fidelity: dict[int, int] = {}
        self._shown: dict[int, TicketState] = {}
        self._summary: str | None = None
        self._gallery = Gallery(ledger, tracker, context)
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def notify(self, ticket_id: int) -> None:
        """Says that the rows or the state of a ticket changed. Returns at once."""
        self._queue.put(ticket_id)

    def close(self, timeout: float = 60.0) -> None:
        """Sends what is left, for at most `timeout` seconds."""
        self._closing.set()
        self._thread.join(timeout)
        if self._gallery.is_drawing:
            self._thread.join(FINAL_SECONDS)
        if self._thread.is_alive():
            logger.warning("some records are not in MLflow yet; the next worker of this study sends them")

    def reconcile(self) -> None:
        """Queues every ticket that a worker left without its final state in Optuna and MLflow."""
        for ticket_id in self._ledger.unsettled(self._context.record.name):
            self.notify(ticket_id)

    def sync(self, ticket_id: int) -> None:
        """Brings the copies of one ticket up to date; repeating it changes nothing."""
        ticket = self._ledger.ticket(ticket_id)
        if ticket.state.is_final and ticket.trial_id is not None:
            tell(self._study, ticket.trial_id, ticket.state, ticket.told)
        self._summary_run()
        if ticket.params is not None:
            self._sync_run(ticket)
        if ticket.state.is_final:
            self._sync_summary(ticket)
            self._ledger.mark_mirrored(ticket_id)
        elif not self._still(ticket):
            # Shown too late, for example by a process that was halted: what holds now is shown after it.
            self.notify(ticket_id)

    def _sync_run(self, ticket: Ticket) -> None:
        run_id = self._run_of(ticket)
        if self._context.config.fidelity is not None:
            self._sync_fidelity(run_id, ticket)
        rows = self._ledger.reports(ticket.id)
        unsent = [row for row in rows if row.epoch > self._sent.get(ticket.id, -1)]
        if unsent:
            self._tracker.log_epochs(run_id, [self._tracked(row) for row in unsent])
            self._sent[ticket.id] = unsent[-1].epoch
        if ticket.state.is_final:
            self._tracker.set_tags(run_id, self._final_tags(ticket))
            self._log_files(run_id, ticket, rows)
        if self._shown.get(ticket.id) is not ticket.state and self._still(ticket):
            # Last: a run whose state says FINISHED has everything in it.
            self._tracker.set_state(run_id, TRACKED_STATES[ticket.state], ticket.reason, ticket.finished)
            self._shown[ticket.id] = ticket.state

    def _still(self, ticket: Ticket) -> bool:
        """Whether its state holds: while rows were sent another worker may have ended it, and shown that."""
        return ticket.state.is_final or self._ledger.ticket(ticket.id).state is ticket.state

    def _sync_fidelity(self, run_id: str, ticket: Ticket) -> None:
        """The cheap training's epochs are metrics of their own, whose steps do not meet those of the full one."""
        rows = self._ledger.fidelity_reports(ticket.id)
        unsent = [row for row in rows if row.epoch > self._sent_fidelity.get(ticket.id, -1)]
        if unsent:
            tracked = [self._tracked(row) for row in unsent]
            named = [(epoch, {f"fidelity/{k}": v for k, v in metrics.items()}, at) for epoch, metrics, at in tracked]
            self._tracker.log_epochs(run_id, named)
            self._sent_fidelity[ticket.id] = unsent[-1].epoch

    def _run_of(self, ticket: Ticket) -> str:
        if ticket.run_id is not None:
            return ticket.run_id
        run_id = self._tracker.ensure_trial_run(
            self._context.record.name,
            self._ticket_key(ticket),
            run_name(ticket),
            run_params(self._context.config, ticket.params or {}),
            {**self._context.tags, **run_tags(ticket)},
            ticket.kind if ticket.is_rerun else "trial",
        )
        try:
            self._ledger.set_run(ticket, run_id)
        except LeaseLostError:
            # The tag finds the run again; the column only saves a look-up.
            logger.debug("run %s of ticket %d not stored: its attempt is over", run_id, ticket.id)
        return run_id

    def _ticket_key(self, ticket: Ticket) -> str:
        # The time keeps a study apart from a deleted one of the same name, whose runs MLflow still has.
        kind = f"{ticket.kind}-" if ticket.is_rerun else ""
        return f"{self._context.record.created:.0f}-{kind}{ticket.number:05d}"

    def _tracked(self, row: EpochRow) -> tuple[int, dict[str, float], float]:
        named = {metric_name(key, self._context.class_names): value for key, value in row.metrics.items()}
        if row.value is not None:
            named["objective"] = row.value
        values = objective_values(self._context.config, row.metrics, self._context.class_names)
        named.update(zip(objective_metrics(self._context.config, "objective"), values, strict=True))
        return row.epoch, named, row.stored_at

    def _final_tags(self, ticket: Ticket) -> dict[str, str]:
        tags = {"yolosearch.attempts": str(ticket.attempt)}
        if ticket.value is not None:
            tags["yolosearch.value"] = f"{ticket.value:.6g}"
        if ticket.fidelity_value is not None:
            tags["yolosearch.fidelity_value"] = f"{ticket.fidelity_value:.6g}"
        if ticket.objective_values is not None:
            tags["yolosearch.values"] = self._values_text(ticket.objective_values)
        return tags

    def _values_text(self, values: Sequence[float]) -> str:
        named = zip(self._context.config.objectives, values, strict=True)
        return ", ".join(f"{objective.name} {value:.6g}" for objective, value in named)

    def _log_files(self, run_id: str, ticket: Ticket, rows: Sequence[EpochRow]) -> None:
        curve = [{"epoch": row.epoch, "value": row.value, "stored_at": row.stored_at, **row.metrics} for row in rows]
        files: dict[str, Path | str] = {
            "hyp.yaml": self._hyp_text(ticket),
            "metrics.json": json.dumps(curve, indent=1),
        }
        self._tracker.log_artifacts(run_id, files)
        if self._is_best(ticket):
            self._log_weights(run_id, ticket, rows)

    def _log_weights(self, run_id: str, ticket: Ticket, rows: Sequence[EpochRow]) -> None:
        """Sends the weights of the best trial; those of one that was beaten meanwhile are not there any more."""
        store = self._context.weights
        try:
            file = None if store is None else store.find(ticket.number, value_row(ticket, rows))
            if store is not None and file is not None:
                with store.fetched(ticket.number, file) as local:
                    self._tracker.log_artifacts(run_id, {"weights/best.safetensors": local})
        except CheckpointError as error:
            logger.warning("%s", error)

    def _hyp_text(self, ticket: Ticket) -> str:
        try:
            hyp = hyperparameters(self._context.config, ticket.params or {})
        except HyperparameterError as error:
            return f"# {ticket.label} of study {ticket.study} was not trained: {error}\n"
        rerun = f": trial {ticket.candidate} again (0 is the base)" if ticket.is_rerun else ", unconfirmed"
        lines = [f"{ticket.label} of study {ticket.study}{rerun}"]
        if ticket.objective_values is not None:
            lines.append(self._values_text(ticket.objective_values))
        return hyp.to_yaml(lines)

    def _sync_summary(self, ticket: Ticket) -> None:
        """One point per finished trial on the summary run: the best value when that trial ended."""
        summary = self._summary_run()
        if ticket.is_rerun:
            self._sum_up_reruns(summary, ticket)
        if ticket.finished is None or ticket.trial_number is None:
            return
        best = self._best_until(ticket.study, ticket.finished)
        if best:
            self._tracker.log_epochs(summary, [(ticket.trial_number, best, ticket.finished)])
        if self._context.config.fidelity is not None:
            self._log_correlation(summary, ticket.trial_number, ticket.finished)
        if search_is_over(self._ledger, ticket.study):
            self._close_summary(summary, self._ledger.counts(ticket.study))

    def _log_correlation(self, run_id: str, trial_number: int, until: float) -> None:
        """How the ranks after the cheap training and after the full one went together when a trial ended."""
        pairs = value_pairs(self._ledger.tickets(self._context.record.name), until)
        correlation = spearman(pairs)
        if correlation is not None:
            point = {"fidelity/rank_correlation": correlation, "fidelity/pairs": float(len(pairs))}
            self._tracker.log_epochs(run_id, [(trial_number, point, until)])

    def _sum_up_reruns(self, summary: str, ticket: Ticket) -> None:
        """After the last rerun of its kind: what they show together."""
        config = self._context.config
        if any(self._ledger.open_counts(config.name, (ticket.kind,)).values()):
            return
        found = (
            noise_report(self._ledger, config) if ticket.kind == NOISE else latest_confirmation(self._ledger, config)
        )
        if found is None or ticket.finished is None:
            return
        self._tracker.log_epochs(summary, [(found.done, summary_metrics(found), ticket.finished)])
        self._tracker.log_artifacts(summary, {f"{ticket.kind}.json": json.dumps(found.to_json(), indent=1)})
        if isinstance(found, ConfirmReport):
            # What it decides is what the study recommends from now on.
            self._tracker.set_tags(summary, {"yolosearch.confirmation": found.verdict(), **self._recommend(summary)})

    def _conclude(self) -> None:
        """A study that was stopped between two trials has no last one that would close its summary."""
        record = self._ledger.study(self._context.record.name)
        if record.summary_run_id is None or not search_is_over(self._ledger, record.name):
            return
        if record.stop_kind is not None:
            self._close_summary(record.summary_run_id, self._ledger.counts(record.name))
        self._tracker.log_artifacts(record.summary_run_id, {FORECAST_FILE: self._forecast()})

    def _forecast(self) -> str:
        return json.dumps(read_outlook(self._ledger, self._context.config).to_json(), indent=1)

    def _best_until(self, study: str, moment: float) -> dict[str, float]:
        """The best value of each objective among the trials that had ended, and how many made up the front."""
        if not self._context.config.objectives:
            best = self._ledger.best_value(study, until=moment)
            return {} if best is None else {"study/best_objective": best}
        ended = [ticket for ticket in self._ledger.tickets(study) if (ticket.finished or math.inf) <= moment]
        found = front(ended)
        bests = [max(values) for values in zip(*(ticket.objective_values or () for ticket in found), strict=True)]
        names = objective_metrics(self._context.config, "study/best")
        named = dict(zip(names, bests, strict=True)) if found else {}
        return {**named, "study/front_trials": float(len(found))} if found else {}

    def _close_summary(self, run_id: str, counts: Mapping[TicketState, int]) -> None:
        tags = {f"yolosearch.trials.{state.lower()}": str(count) for state, count in counts.items()}
        if self._context.config.objectives:
            best = front(self._ledger.tickets(self._context.record.name))
            tags["yolosearch.front"] = ", ".join(str(ticket.trial_number) for ticket in best)
            files = {f"hyp.pareto-{ticket.trial_number}.yaml": self._hyp_text(ticket) for ticket in best}
            self._tracker.log_artifacts(run_id, files)
        else:
            tags |= self._recommend(run_id)
        reason = self._ledger.study(self._context.record.name).stop_reason
        tags["yolosearch.stopped"] = reason or ""
        self._tracker.set_tags(run_id, tags)
        self._tracker.set_state(run_id, TrackedState.COMPLETE)

    def _recommend(self, run_id: str) -> dict[str, str]:
        """Stores the hyp YAML that the study recommends as its ledger stands; tags that name the trial."""
        found = recommended(self._ledger, self._context.config)
        if found is None:
            return {}
        self._tracker.log_artifacts(run_id, {HYP_FILE: recommended_hyp(self._context.config, found)})
        return {"yolosearch.best_trial": str(found.trial)}

    def _summary_run(self) -> str:
        """The study's summary run, made once under the database's lock."""
        if self._summary is not None:
            return self._summary
        name = self._context.record.name
        run_id = self._ledger.study(name).summary_run_id
        if run_id is None:
            forecast = self._forecast()
            with init_lock(self._context.storage_url):
                settings = json.dumps(self._context.record.config, indent=1)
                self._tracker.ensure_experiment(name, settings)
                # The luckiest reruns would stand above the trials.
                self._tracker.set_table(name, table_columns(self._context.config), RERUN_KINDS)
                run_id = self._tracker.ensure_summary(name, self._context.tags, _flat(self._context.record.config))
                self._tracker.log_artifacts(run_id, {"study.json": settings, FORECAST_FILE: forecast})
                self._ledger.set_summary_run(name, run_id)
        self._summary = run_id
        return run_id

    def _is_best(self, ticket: Ticket) -> bool:
        if self._context.config.objectives:
            return ticket.id in {best.id for best in front(self._ledger.tickets(ticket.study))}
        best = self._ledger.best(self._context.record.name)
        return best is not None and best.id == ticket.id

    def _run(self) -> None:
        pending: dict[int, None] = {}
        closing = False
        while not (closing and not pending):
            # The pause gathers several epochs into one request; training has the processor meanwhile.
            closing = self._closing.wait(PAUSE_SECONDS)
            pending.update(self._noticed())
            for ticket_id in list(pending):
                del pending[ticket_id]
                if not self._try_sync(ticket_id):
                    # Behind the others, which need not have its trouble.
                    pending[ticket_id] = None
                    time.sleep(RETRY_SECONDS)
                    break
            if not closing:
                self._try("plots of the study", lambda: self._gallery.poll(self._summary_run))
        self._try("plots of the study", lambda: self._gallery.finish(self._summary_run))
        self._try("the end of the study", self._conclude)
        self._gallery.close()

    def _noticed(self) -> dict[int, None]:
        """Ticket ids that were named since the last look, each once, in order."""
        noticed: dict[int, None] = {}
        while True:
            try:
                noticed[self._queue.get_nowait()] = None
            except queue.Empty:
                return noticed

    def _try_sync(self, ticket_id: int) -> bool:
        return self._try(f"records of ticket {ticket_id}", lambda: self.sync(ticket_id))

    @staticmethod
    def _try(what: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:
            logger.warning("%s could not be sent, trying again: %s", what, error)
            return False
        return True


def run_name(ticket: Ticket) -> str:
    """What MLflow's table calls the run of a ticket."""
    if not ticket.is_rerun:
        return f"trial-{ticket.trial_number:05d}"
    who = f"trial-{ticket.candidate:05d}" if ticket.candidate else "base"
    return f"{ticket.kind}-{ticket.number:05d}-{who}-seed-{ticket.seed}"


def run_tags(ticket: Ticket) -> dict[str, str]:
    """What tells the runs of tickets apart."""
    if not ticket.is_rerun:
        return {"yolosearch.trial_number": str(ticket.trial_number)}
    return {
        "yolosearch.seed": str(ticket.seed),
        "yolosearch.epochs": str(ticket.epochs),
        "yolosearch.candidate": str(ticket.candidate),
    }


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted parameters."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
