"""Keeps the study's summary run in MLflow up to date: numbers, plots, the report, the note, the registered model.

All of it is drawn by another process (`search.render`); this module decides when, and sends what came out. Called from
the mirror's thread only.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from search.ledger import KINDS, Ledger, Ticket, WorkerState
from search.render import LOWEST_PRIORITY, NOTE_FILE, STUDY, TRIALS, RenderJob, start
from search.review import StudyData, findings, read_study_data
from search.space import hyperparameters
from search.tracking import NOTE_TAG, Tracker, TrackingError
from search.weights import value_row
from search.worker.records import MirrorContext, metric_name
from yolocore.errors import CheckpointError

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
"""At most so often while the study runs."""

COST_SHARE = 0.02
"""Of the time drawing may take so much."""

FINAL_SECONDS = 120.0
"""How long the end of a worker may wait for the last drawing."""

TOP_TRIALS = 3
"""Trials besides the base that get pictures."""

POLL_SECONDS = 0.1
REVIEWED_TAG = "yolosearch.reviewed"
"""How many trials had ended when the summary was drawn last."""

CHAMPION_FILE = "weights/best.safetensors"


class Gallery:
    """One drawing at a time, by the first of the study's live workers."""

    def __init__(self, ledger: Ledger, tracker: Tracker, context: MirrorContext) -> None:
        self._ledger = ledger
        self._tracker = tracker
        self._context = context
        self._study = context.record.name
        # The review is about one objective, and of several no trial is the champion.
        is_single = not context.config.objectives
        self._wanted = is_single and context.config.tracking.enabled and context.config.tracking.review
        self._process: BaseProcess | None = None
        self._folder: Path | None = None
        self._data: StudyData | None = None
        self._began = 0.0
        self._next = time.monotonic() + EVERY_SECONDS
        self._drawn = -1
        """Trials that had ended at the last drawing."""
        self._pictured: set[int] = set()
        """Tickets whose pictures were sent."""
        self._tidied: set[int] = set()
        self._champion: tuple[str, dict[str, str]] | None = None
        """Run and tags of the model version that was registered last."""

    def poll(self, summary: Callable[[], str]) -> None:
        """Starts a drawing that is due, or sends one that is done. Takes as long as sending takes.

        Args:
            summary: Gives the summary run, which exists once there is something to show.
        """
        if not self._wanted:
            return
        if self._process is not None:
            if not self._process.is_alive():
                self._send(summary())
        elif time.monotonic() >= self._next and self._is_first():
            self._next = time.monotonic() + EVERY_SECONDS
            if self._ended() > max(self._drawn, 0):
                self._start()

    def finish(self, summary: Callable[[], str]) -> None:
        """What a finished study shows; where trials are still open, somebody else draws it."""
        if not self._wanted or any(self._ledger.open_counts(self._study, KINDS).values()):
            self.close()
            return
        run_id, ended = summary(), self._ended()
        if self._tracker.tags(run_id).get(REVIEWED_TAG) == str(ended):
            self.close()
            return
        if self._process is None or self._drawn != ended:
            self.close()
            self._start(priority=0)  # no training is left to be disturbed
        deadline = time.monotonic() + FINAL_SECONDS
        while self._process is not None and self._process.is_alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._send(run_id)

    def close(self) -> None:
        """Ends a drawing that nobody will send."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None

    def _is_first(self) -> bool:
        workers = self._ledger.workers(self._study, WorkerState.RUNNING)
        first = min(workers, key=lambda worker: (worker.started, worker.id), default=None)
        return first is None or first.id == self._context.worker_id

    def _ended(self) -> int:
        counts = self._ledger.counts(self._study, KINDS)
        return sum(count for state, count in counts.items() if state.is_final)

    @property
    def is_drawing(self) -> bool:
        """Whether a drawing is under way."""
        return self._process is not None

    def _start(self, priority: int = LOWEST_PRIORITY) -> None:
        data = read_study_data(self._ledger, self._context.config, self._context.class_names)
        self._folder = Path(tempfile.mkdtemp(prefix="yolosearch-"))
        self._data, self._drawn, self._began = data, self._ended(), time.monotonic()
        pictures = self._details_of(self._shown_trials(data))
        job = RenderJob(data=data, hyp=self._hyp_text(data), folder=self._folder, pictures=pictures)
        self._process = start(job, priority)

    def _shown_trials(self, data: StudyData) -> list[Ticket]:
        """The base and the best trials so far."""
        shown = {ticket.id: ticket for ticket in (data.base, data.best, *data.complete[:TOP_TRIALS]) if ticket}
        return list(shown.values())

    def _details_of(self, tickets: Sequence[Ticket]) -> dict[int, Path]:
        """Local copies of what pictures are drawn from, of the trials that have none yet."""
        assert self._folder is not None
        store, found = self._context.weights, {}
        for ticket in tickets if store is not None else ():
            file = self._folder / f"{ticket.id}.npz"
            try:
                if ticket.id not in self._pictured and store is not None and store.copy_details(ticket.number, file):
                    found[ticket.id] = file
            except CheckpointError as error:
                logger.warning("%s", error)
        return found

    def _hyp_text(self, data: StudyData) -> str | None:
        best = data.best
        if best is None:
            return None
        hyp = hyperparameters(self._context.config, best.params or {})
        how = "confirmed" if findings(data).standing == "confirmed" else "the best so far, unconfirmed"
        return hyp.to_yaml([f"trial {best.trial_number} of study {self._study}, {how}"])

    def _send(self, run_id: str) -> None:
        """Sends what was drawn, and the numbers that belong to it."""
        process, folder, data = self._process, self._folder, self._data
        assert process is not None
        assert folder is not None
        assert data is not None
        self._next = time.monotonic() + max(EVERY_SECONDS, (time.monotonic() - self._began) / COST_SHARE)
        try:
            self._register(data)
            if process.exitcode != 0:
                why = "takes too long" if process.exitcode is None else f"ended with code {process.exitcode}"
                logger.warning("the plots of study %s are not in MLflow: drawing %s", self._study, why)
                return
            for ticket in self._shown_trials(data):
                self._send_pictures(ticket, folder / TRIALS / str(ticket.id))
            self._send_study(run_id, folder / STUDY, data)
            self._tidy(data)
        finally:
            self.close()

    def _send_pictures(self, ticket: Ticket, folder: Path) -> None:
        if ticket.run_id is None or not folder.is_dir():
            return
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self._tracker.log_artifacts(ticket.run_id, files)
        self._pictured.add(ticket.id)

    def _tidy(self, data: StudyData) -> None:
        """Deletes what pictures are drawn from, of trials that have them or will never be among the best."""
        shown = {ticket.id for ticket in self._shown_trials(data)} - self._pictured
        for ticket in data.tickets:
            if ticket.state.is_final and ticket.id not in shown | self._tidied and self._context.weights is not None:
                try:
                    self._context.weights.drop_details(ticket.number)
                except CheckpointError as error:
                    logger.warning("%s", error)
                self._tidied.add(ticket.id)

    def _send_study(self, run_id: str, folder: Path, data: StudyData) -> None:
        files: dict[str, Path | str] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        text = Path(files.pop(NOTE_FILE)).read_text(encoding="utf-8")
        if (hyp := self._hyp_text(data)) is not None:
            files["hyp.best.yaml"] = hyp
        files["study.yaml"] = yaml.safe_dump(self._context.config.to_json(), sort_keys=False, allow_unicode=True)
        self._tracker.log_artifacts(run_id, files)
        ended = [ticket for ticket in data.every_ticket if ticket.state.is_final]
        moment = max((ticket.finished or 0.0 for ticket in ended), default=data.now)
        self._tracker.log_epochs(run_id, [(len(ended), self._numbers(data), moment)])
        counts = {f"yolosearch.trials.{state.lower()}": str(count) for state, count in findings(data).counts.items()}
        best = {} if data.best is None else {"yolosearch.best_trial": str(data.best.trial_number)}
        # Last: who finds the tag takes everything for sent.
        self._tracker.set_tags(run_id, {**counts, **best, NOTE_TAG: text, REVIEWED_TAG: str(len(ended))})

    def _numbers(self, data: StudyData) -> dict[str, float]:
        """Counts by state, and the metrics of base and best.

        All below `study/`: each prefix is a section of MLflow's chart page, and those of the trials come first there.
        """
        found = findings(data)
        numbers = {f"study/trials_{state.lower()}": float(count) for state, count in found.counts.items()}
        numbers["study/epochs"] = float(found.cost.slot_epochs)
        for role, ticket in (("base", data.base), ("best", data.best)):
            if ticket is not None and ticket.value is not None:
                numbers |= {f"study/{role}_{name}": value for name, value in self._metrics(data, ticket).items()}
        if data.base is not None and data.base.value is not None:
            numbers["study/base_objective"] = data.base.value  # the best one's is there trial by trial
        if found.gain is not None:
            numbers["study/gain"] = found.gain
        return numbers

    def _metrics(self, data: StudyData, ticket: Ticket) -> Mapping[str, float]:
        named = {metric_name(key, self._context.class_names): value for key, value in data.metrics(ticket).items()}
        return {
            name.removeprefix("metrics/").replace("/", "_"): value
            for name, value in named.items()
            if name.startswith(("metrics/", "class_ap/"))
        }

    def _send_weights(self, data: StudyData, best: Ticket) -> bool:
        """Whether there are trained weights of a trial; its run has them then."""
        store = self._context.weights
        file = None if store is None else store.find(best.number, value_row(best, data.rows(best)))
        if store is None or file is None or best.run_id is None:
            return False
        with store.fetched(best.number, file) as local:
            self._tracker.log_artifacts(best.run_id, {CHAMPION_FILE: local})
        return True

    def _register(self, data: StudyData) -> None:
        """Makes the best trial's weights the champion of the study's registered model."""
        best = data.best
        if best is None or best.run_id is None:
            return
        champion = (best.run_id, self._champion_tags(data, best))
        if champion == self._champion or not self._send_weights(data, best):
            return
        try:
            self._tracker.set_champion(self._study, best.run_id, CHAMPION_FILE, champion[1])
            self._champion = champion
        except TrackingError as error:
            # A store without a registry: everything else is there.
            logger.warning("the best weights are not registered: %s", error)

    def _champion_tags(self, data: StudyData, best: Ticket) -> dict[str, str]:
        return {
            "yolosearch.study": self._study,
            "yolosearch.trial": str(best.trial_number),
            "yolosearch.standing": findings(data).standing,
            "yolosearch.value": "" if best.value is None else f"{best.value:.6g}",
            "yolosearch.objective": self._context.config.objective.describe(),
        }
