"""Keeps the study's summary run in MLflow up to date: numbers, plots, the report, the note, the registered model.

All of it is drawn by another process (`search.render`); this module decides when, and sends what came out. Called from
the mirror's thread only.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from search.ledger import KINDS, RERUN_KINDS, Ledger, Ticket, WorkerState
from search.recommendation import Recommendation
from search.render import LOWEST_PRIORITY, NOTE_FILE, STUDY, TRIALS, RenderJob, start
from search.review import StudyData, findings, read_study_data
from search.tracking import CANDIDATE, CHAMPION, NOTE_TAG, STANDING_TAG, Tracker, TrackingError
from search.weights import shown_trials, value_row
from search.worker.records import (
    FORECAST_FILE,
    HYP_FILE,
    MirrorContext,
    metric_name,
    read_outlook,
    recommended_hyp,
    search_is_over,
)
from yolocore.errors import CheckpointError

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
"""At most so often while the study runs."""

COST_SHARE = 0.02
"""Of the time drawing may take so much."""

FINAL_SECONDS = 120.0
"""How long the end of a worker may wait for the last drawing."""

POLL_SECONDS = 0.1
REVIEWED_TAG = "yolosearch.reviewed"
"""How many trials had ended when the summary was drawn last."""

WEIGHTS_FILE = "weights/best.safetensors"


class Gallery:
    """One drawing at a time, by the first of the study's live workers."""

    def __init__(self, ledger: Ledger, tracker: Tracker, context: MirrorContext) -> None:
        self._ledger = ledger
        self._tracker = tracker
        self._context = context
        self._study = context.record.name
        self._wanted = context.config.tracking.enabled and context.config.tracking.review
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
        self._registered: tuple[str, str, dict[str, str]] | None = None
        """Run, alias and tags of the model version that was registered last."""
        self._weights_line = ""
        """What the note says about it."""

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
        if not self._wanted or not self._is_over():
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

    def _is_over(self) -> bool:
        """Whether nothing waits or runs; trials that wait in a study that was stopped do not count."""
        reruns = self._ledger.open_counts(self._study, RERUN_KINDS)
        return not any(reruns.values()) and search_is_over(self._ledger, self._study)

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
        pictures = self._details_of(shown_trials(data.every_ticket))
        job = RenderJob(data=data, hyp=self._hyp_text(data), folder=self._folder, pictures=pictures)
        self._process = start(job, priority)

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
        found = data.recommendation
        return None if found is None else recommended_hyp(self._context.config, found)

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
            for ticket in shown_trials(data.every_ticket):
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
        shown = {ticket.id for ticket in shown_trials(data.every_ticket)} - self._pictured
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
        outlook = read_outlook(self._ledger, self._context.config)
        text = Path(files.pop(NOTE_FILE)).read_text(encoding="utf-8")
        text = "\n\n".join([text.rstrip(), f"Forecast: {outlook.line()}.", *filter(None, [self._weights_line])])
        if (hyp := self._hyp_text(data)) is not None:
            files[HYP_FILE] = hyp
        files[FORECAST_FILE] = json.dumps(outlook.to_json(), indent=1)
        files["study.yaml"] = yaml.safe_dump(self._context.config.to_json(), sort_keys=False, allow_unicode=True)
        self._tracker.log_artifacts(run_id, files)
        ended = [ticket for ticket in data.every_ticket if ticket.state.is_final]
        moment = max((ticket.finished or 0.0 for ticket in ended), default=data.now)
        self._tracker.log_epochs(run_id, [(len(ended), self._numbers(data), moment)])
        counts = {f"yolosearch.trials.{state.lower()}": str(count) for state, count in findings(data).counts.items()}
        found = data.recommendation
        best = {} if found is None else {"yolosearch.best_trial": str(found.trial)}
        if data.front:
            best["yolosearch.front"] = ", ".join(str(ticket.trial_number) for ticket in data.front)
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

    def _register(self, data: StudyData) -> None:
        """Makes the recommended trial's weights a version of the study's registered model.

        Only what a confirmation decided is the champion: its winner, or the base where it found none. The best single
        run is the candidate.
        """
        found = data.recommendation
        if found is None or found.ticket.run_id is None or self._context.config.train.keep_weights == "none":
            return
        alias = CHAMPION if found.is_decided else CANDIDATE
        wanted = (found.ticket.run_id, alias, self._version_tags(data, found))
        if wanted == self._registered:
            return
        has_weights = self._registered is not None and self._registered[0] == found.ticket.run_id
        has_weights = has_weights or self._send_weights(data, found.ticket)
        try:
            if has_weights:
                version = self._tracker.register_weights(self._study, wanted[0], WEIGHTS_FILE, alias, wanted[2])
                self._registered = wanted
                self._weights_line = f"Weights: version {version} of the registered model, alias `{alias}`."
            elif found.is_decided:
                self._miss_champion(found)
        except TrackingError as error:
            # A store without a registry: everything else is there.
            logger.warning("the best weights are not registered: %s", error)

    def _send_weights(self, data: StudyData, best: Ticket) -> bool:
        """Whether there are trained weights of a trial; its run has them then."""
        store = self._context.weights
        if store is None or best.run_id is None:
            return False
        try:
            file = store.find(best.number, value_row(best, data.rows(best)))
            if file is None:
                return False
            with store.fetched(best.number, file) as local:
                self._tracker.log_artifacts(best.run_id, {WEIGHTS_FILE: local})
        except CheckpointError as error:
            logger.warning("%s", error)
            return False
        return True

    def _miss_champion(self, found: Recommendation) -> None:
        """Says that a confirmation's outcome has no weights, and that what was the champion is none any more."""
        self._tracker.withdraw_champion(self._study)
        where = f"no weights of trial {found.trial} ({found.why}) are in {self._context.weights}"
        if not self._weights_line.startswith("No weights"):
            logger.warning("study %s: %s, so no model version is its champion", self._study, where)
        self._weights_line = f"No weights of trial {found.trial} are kept, so no model version is the champion."

    def _version_tags(self, data: StudyData, found: Recommendation) -> dict[str, str]:
        review = findings(data)
        return {
            "yolosearch.study": self._study,
            "yolosearch.trial": str(found.trial),
            STANDING_TAG: review.standing,
            "yolosearch.verdict": review.verdict,
            "yolosearch.value": "" if found.ticket.value is None else f"{found.ticket.value:.6g}",
            "yolosearch.objective": self._context.config.objective.describe(),
        }
