"""The package in a notebook or a script: one class.

    from search import Study

    study = Study.create("my-study.yaml")
    study.run()
    study.trials()
    study.export("hyp.yaml")

Everything here returns data and raises the exceptions of `search.errors`, whose text says what is allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from search.config import StudyConfig, load_study_config, parse_study
from search.database import check_study_name, mask_url, resolve_storage_url
from search.errors import SearchError, StudyStoppedError, UserInputError
from search.ledger import CONFIRM, KINDS, NOISE, SEARCH, Ledger, StopKind, Ticket, TicketState
from search.paths import ExportFormat, StudyFolder, default_runs_dir
from search.report import StudyRows, StudyStatus, headline, study_status
from search.snapshot import Snapshot, take_snapshot
from search.transforms import shown_params
from search.worker.existing import HANG_SECONDS, OUTAGE_SECONDS, open_existing, refuse_shared_database

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from search.confirm import ConfirmReport, NoiseReport
    from search.export import BestTrial
    from search.launch.launcher import Launcher
    from search.launch.plan import LaunchPlan
    from search.launch.prepare import StudyPlan
    from search.page import Review

POLL_SECONDS = 0.5

Progress = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Study:
    """A study in its database; made by `create` or `open`."""

    config: StudyConfig
    """As it was frozen when the study was created."""
    storage_url: str
    runs_dir: Path
    ledger: Ledger

    @classmethod
    def create(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        more_trials: int = 0,
        storage: str | None = None,
        runs_dir: str | Path | None = None,
        data: str | Path | None = None,
    ) -> Study:
        """Creates a study, or takes it up again. Trains nothing yet.

        Args:
            source: A study file, or what stands in one; relative paths of a mapping start at the current folder.
            more_trials: To add to its budget.
            storage: Database URL; by default `YOLOSEARCH_STORAGE_URL`, else a file below `runs_dir`.
            runs_dir: Where everything is written; by default `YOLOSEARCH_RUNS_DIR`, else `runs`.
            data: The data set's YAML, where it lies elsewhere on this host.

        Raises:
            UserInputError: One line per mistake.
        """
        plan = cls.plan(source, storage=storage, runs_dir=runs_dir, data=data)
        from search.launch.prepare import create_or_resume

        create_or_resume(plan, more_trials)
        return cls.open(plan.config.name, storage=plan.storage_url, runs_dir=plan.folder.runs_dir)

    @classmethod
    def plan(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        storage: str | None = None,
        runs_dir: str | Path | None = None,
        data: str | Path | None = None,
    ) -> StudyPlan:
        """Checks a study and its data without creating it; `plan.rows()` says what it will do. See `create`."""
        config = _config(source)
        runs = _runs(runs_dir)
        url = resolve_storage_url(storage, runs, config.name)
        # Before torch is imported, which takes seconds.
        refuse_shared_database(config, url, runs)
        from search.launch.prepare import plan_study

        return plan_study(config, url, runs, None if data is None else Path(data))

    @classmethod
    def open(
        cls,
        name: str,
        *,
        storage: str | None = None,
        runs_dir: str | Path | None = None,
        patience: float = 60.0,
    ) -> Study:
        """A study that exists.

        Args:
            name: Its name.
            storage: As in `create`.
            runs_dir: As in `create`.
            patience: Seconds for which readings are repeated while the database is away.

        Raises:
            UnknownStudyError: There is none of that name.
            DatabaseError: The database cannot be reached, or is another version's.
        """
        runs = _runs(runs_dir)
        url = resolve_storage_url(storage, runs, check_study_name(name))
        ledger = open_existing(url, name, patience)
        ledger.check_schema()
        config = StudyConfig.from_json(ledger.study(name).config)
        return cls(config=config, storage_url=url, runs_dir=runs, ledger=ledger)

    @property
    def name(self) -> str:
        """Of the study."""
        return self.config.name

    @property
    def folder(self) -> StudyFolder:
        """Its files below the runs folder."""
        return StudyFolder(self.runs_dir, self.name)

    def __repr__(self) -> str:
        return f"<Study {self.name} in {mask_url(self.storage_url)}: {headline(self.status)}>"

    # -- working on it ------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        workers: int = 1,
        devices: Sequence[str] = (),
        hang_seconds: float = HANG_SECONDS,
        progress: Progress | None = print,
    ) -> StudyStatus:
        """Trains on this host until the budget is spent; an interrupt hands the running trials back.

        Args:
            workers: Processes.
            devices: Dealt out to them, such as `cuda:0`; by default the study's.
            hang_seconds: After which a silent trainer is killed.
            progress: Is called with a line whenever the counts change; None for nothing.

        Returns:
            The study as it is then.

        Raises:
            StudyStoppedError: It gave up, for example after too many failed trials in a row.
            SearchError: No worker is left, and trials are.
        """
        from search.launch.plan import LaunchPlan

        plan = LaunchPlan(
            storage_url=self.storage_url,
            folder=self.folder,
            workers=workers,
            devices=tuple(devices),
            hang_seconds=hang_seconds,
            timeout=self.config.timeout,
        )
        self._work(plan, progress)
        return self.status

    def noise(
        self,
        seeds: int | None = None,
        *,
        workers: int = 1,
        devices: Sequence[str] = (),
        train: bool = True,
        progress: Progress | None = print,
    ) -> NoiseReport:
        """How far apart equal trainings of the base are, and which gain could be told from that.

        Args:
            seeds: Trains the base on so many, where it has not been; None only finishes what was asked for.
            workers: As in `run`.
            devices: As in `run`.
            train: False leaves the training to workers elsewhere.
            progress: As in `run`.

        Returns:
            What is known so far.
        """
        from search.confirm import add_noise, noise_report

        if seeds is not None:
            add_noise(self.ledger, self.config, seeds)
        self._rerun(NOISE, workers, devices, train, progress)
        return noise_report(self.ledger, self.config)

    def confirm(
        self,
        top: int | None = None,
        seeds: int | None = None,
        *,
        epochs: int | None = None,
        workers: int = 1,
        devices: Sequence[str] = (),
        train: bool = True,
        progress: Progress | None = print,
    ) -> ConfirmReport:
        """Trains base and best trials again on the same seeds: `.verdict()` says which are really better.

        Called again without options it shows, or finishes, the confirmation that was asked for last.

        Args:
            top: So many of the best trials; 3 at first.
            seeds: Other ones than the search's; 5 at first.
            epochs: Of each training; the study's unless said otherwise.
            workers: As in `run`.
            devices: As in `run`.
            train: False leaves the training to workers elsewhere.
            progress: As in `run`.

        Returns:
            What is known so far.

        Raises:
            UserInputError: There is nothing to confirm yet.
        """
        from search.confirm import ask_confirmation, confirm_report

        length = ask_confirmation(self.ledger, self.config, top, seeds, epochs, retry=train)
        self._rerun(CONFIRM, workers, devices, train, progress)
        return confirm_report(self.ledger, self.config, length)

    def _rerun(self, kind: str, workers: int, devices: Sequence[str], train: bool, progress: Progress | None) -> None:
        from search.launch.plan import LaunchPlan

        plan = LaunchPlan(
            storage_url=self.storage_url, folder=self.folder, workers=workers, devices=tuple(devices), only=kind
        )
        if train:
            self._work(plan, progress)

    def has_work(self, kinds: Sequence[str] = KINDS) -> bool:
        """Whether trials (of some kinds of tickets) wait or run, or records are to be sent."""
        is_open = any(self.ledger.open_counts(self.name, tuple(kinds)).values())
        return is_open or bool(self.ledger.unmirrored(self.name))

    def _work(self, plan: LaunchPlan, progress: Progress | None) -> None:
        """Looks after local workers until none is left."""
        from search.launch.local import LocalLauncher

        if not self.has_work(plan.kinds):
            return
        shown = ""
        with LocalLauncher(plan, open_existing(self.storage_url, self.name, OUTAGE_SECONDS)) as launcher:
            while launcher.poll():
                line = headline(self.status, with_eta=False) if progress is not None else shown
                if progress is not None and line != shown:
                    shown = line
                    progress(line)
                time.sleep(POLL_SECONDS)
        raise_failures(launcher, self.ledger, self.name, plan.kinds)

    # -- reading it ---------------------------------------------------------------------------------------------------

    @property
    def status(self) -> StudyStatus:
        """Counts, trials, best and base as the database has them now."""
        return study_status(self.ledger, self.config)

    def snapshot(self) -> Snapshot:
        """What `yolosearch watch` shows: workers, the curves of what trains, queue, failures."""
        return take_snapshot(StudyRows.read(self.ledger, self.name), self.config)

    @property
    def front(self) -> tuple[BestTrial, ...]:
        """The Pareto front of several objectives, by the first one. Raises UserInputError where there is none."""
        from search.export import front_trials

        return front_trials(self.ledger, self.config)

    @property
    def best(self) -> BestTrial:
        """The trial that `export` writes. Raises UserInputError where there is none, as of several objectives."""
        from search.export import best_trial

        return best_trial(self.ledger, self.config)

    def trials(self) -> pd.DataFrame:
        """Every trial of the search, by number: state, value, parameters, and the metrics of the epoch that counts.

        A trial that is pruned or still trains has the metrics of its last evaluated epoch; one that nobody has begun
        has neither parameters nor metrics. AP of single classes is called `class_ap/NUMBER`.
        """
        import pandas as pd

        rows = StudyRows.read(self.ledger, self.name)
        tickets = [ticket for ticket in rows.tickets if ticket.kind == "search"]
        records = [_record(ticket, rows, self.config) for ticket in tickets]
        return pd.DataFrame.from_records(records, columns=_columns(records)).set_index("trial")

    def curves(self) -> pd.DataFrame:
        """Every evaluated epoch of every trial of the search: trial, epoch (from 1), value, metrics."""
        import pandas as pd

        rows = StudyRows.read(self.ledger, self.name)
        records = [
            {"trial": ticket.number, "epoch": report.epoch + 1, "value": report.value, **report.metrics}
            for ticket in rows.tickets
            if ticket.kind == "search"
            for report in rows.reports.get(ticket.id, ())
        ]
        return pd.DataFrame.from_records(records, columns=_columns(records) or ["trial", "epoch", "value"])

    # -- what it found ------------------------------------------------------------------------------------------------

    def review(self, data: str | Path | None = None) -> Review:
        """Findings and plots, worked out from the trials as they are now; a second or two.

        Args:
            data: The data set's YAML, where it lies elsewhere on this host; it names the classes.
        """
        from search.page import Review
        from search.review import read_study_data

        return Review.of(read_study_data(self.ledger, self.config, self.class_names(data)))

    def report(self, path: str | Path | None = None, data: str | Path | None = None) -> Path:
        """Writes the review as one HTML page, which needs no network.

        Args:
            path: By default `report.html` in the study's folder.
            data: As in `review`.

        Returns:
            The file.
        """
        return write_report(self, self.review(data), self.folder.root / "report.html" if path is None else Path(path))

    def plot(self, key: str) -> go.Figure:
        """One of the report's plots.

        Args:
            key: history, importance, classes, confirmation, curves, slice, parallel, contour or precision_recall; of
                several objectives front, classes, history, importance or parallel.

        Raises:
            NoPlotError: It cannot be drawn of what the study has so far.
            UserInputError: There is no such plot.
        """
        from search.plots import NoPlotError

        plots = {plot.key: plot for plot in self.review().plots}
        if key not in plots:
            count = len(self.config.all_objectives)
            of = "one objective" if count == 1 else f"{count} objectives"
            raise UserInputError(f"plot: got {key!r} for a study of {of}; allowed: {', '.join(plots)}")
        figure = plots[key].figure
        if figure is None:
            raise NoPlotError(f"{plots[key].title}: {plots[key].missing}")
        return figure

    def plot_front(self) -> go.Figure:
        """Of several objectives: the complete trials by them, the Pareto front, the base."""
        return self.plot("front")

    def plot_history(self) -> go.Figure:
        """Every trial's value in order, the best so far, the base."""
        return self.plot("history")

    def plot_importance(self) -> go.Figure:
        """How much of the spread of the values each searched key explains."""
        return self.plot("importance")

    def plot_classes(self) -> go.Figure:
        """AP of each class, best trial (or those of the front) against base."""
        return self.plot("classes")

    def plot_confirmation(self) -> go.Figure:
        """The candidates' gains over the base on paired seeds, with their intervals."""
        return self.plot("confirmation")

    def plot_curves(self) -> go.Figure:
        """The value of every trial after each evaluated epoch."""
        return self.plot("curves")

    def plot_slice(self) -> go.Figure:
        """Values over each searched key."""
        return self.plot("slice")

    def plot_parallel(self) -> go.Figure:
        """All searched keys together, a line for each complete trial."""
        return self.plot("parallel")

    def plot_contour(self) -> go.Figure:
        """The value over the two keys that mattered most."""
        return self.plot("contour")

    def plot_precision_recall(self) -> go.Figure:
        """Precision against recall of the complete trials."""
        return self.plot("precision_recall")

    def class_names(self, data: str | Path | None = None) -> tuple[str, ...]:
        """The data set's class names; none where it is not on this host."""
        from search.worker.session import data_yaml
        from yolocore.data.dataset import load_dataset_config
        from yolocore.errors import InputError

        try:
            path = data_yaml(self.config, self.runs_dir) if data is None else Path(data)
            return load_dataset_config(path, single_class=self.config.train.single_cls).names
        except (InputError, SearchError, OSError):
            return ()

    @overload
    def export(
        self,
        path: str | Path | None = None,
        *,
        trial: int | None = None,
        format: str = "yolov5",
        pareto: int | None = None,
        weights: str | Path | None = None,
        checkpoints: str | Path | None = None,
    ) -> Path: ...

    @overload
    def export(self, path: str | Path | None = None, *, pareto: Literal["all"]) -> dict[int, Path]: ...

    def export(
        self,
        path: str | Path | None = None,
        *,
        trial: int | None = None,
        format: str = "yolov5",
        pareto: int | Literal["all"] | None = None,
        weights: str | Path | None = None,
        checkpoints: str | Path | None = None,
    ) -> Path | dict[int, Path]:
        """Writes a hyp file: the confirmed winner's, or the best trial's, as YAML for YOLOv5's `train.py --hyp`.

        Args:
            path: By default `hyp.best.yaml` in the study's folder; for the whole front a folder.
            trial: This one's, whatever was confirmed.
            format: `yolov5`, `ultralytics` or `json`.
            pareto: Of several objectives: the number of a trial of the front, or `all`.
            weights: Where to write that trial's trained weights as well (.safetensors, or .pt).
            checkpoints: Folder or URL where its workers kept them; by default the runs folder.

        Returns:
            The file; of the whole front each one's by the trial's number.

        Raises:
            UserInputError: There is nothing to export yet, or not that.
        """
        from search.formats import ExportRequest, export_trials

        asked = ExportRequest(
            path=None if path is None else Path(path),
            trial=trial,
            form=_export_format(format),
            pareto=None if pareto is None else str(pareto),
            weights=None if weights is None else Path(weights),
        )
        written = export_trials(self.ledger, self.config, self.folder, asked, checkpoints or self.runs_dir)
        return {one.best.trial_number: one.path for one in written} if pareto == "all" else written[0].path


def _export_format(name: str) -> ExportFormat:
    try:
        return ExportFormat(name)
    except ValueError:
        allowed = ", ".join(form.value for form in ExportFormat)
        raise UserInputError(f"format: got {name!r}; allowed: {allowed}") from None


def write_report(study: Study, review: Review, path: Path) -> Path:
    """Writes a review as one HTML page; the path. Raises UserInputError where that cannot be written."""
    from search.export import header
    from search.page import report_page

    try:
        best = study.best
        hyp = best.hyperparameters.to_yaml(header(best))
    except UserInputError:
        hyp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report_page(review, hyp), encoding="utf-8")
    except OSError as error:
        raise UserInputError(
            f"{path}: cannot be written: {error.strerror}; allowed: a path in a writable folder"
        ) from None
    return path


def raise_failures(launcher: Launcher, ledger: Ledger, study: str, kinds: tuple[str, ...]) -> None:
    """Raises what the workers ended with, where that kept these kinds of tickets from their end."""
    record, counts = ledger.study(study), ledger.open_counts(study, kinds)
    if SEARCH in kinds and record.stop_kind is StopKind.FAILED:
        reason = record.stop_reason
        raise StudyStoppedError(f"study {study} stopped: {reason}; `run` takes it up again once that is mended")
    if record.stop_kind is not None:  # as somebody wanted: what waits is to wait
        counts[TicketState.WAITING] = 0
    if launcher.failures and any(counts.values()):
        failure = "; ".join(launcher.failures)
        raise UserInputError(failure) if launcher.bad_input else SearchError(failure)


def _config(source: str | Path | Mapping[str, Any]) -> StudyConfig:
    if isinstance(source, Mapping):
        return parse_study(dict(source), source="the study", folder=Path.cwd())
    return load_study_config(Path(source))


def _runs(runs_dir: str | Path | None) -> Path:
    return Path(runs_dir or default_runs_dir()).resolve()


def _record(ticket: Ticket, rows: StudyRows, config: StudyConfig) -> dict[str, Any]:
    """One trial as a row of a table."""
    reports = rows.reports.get(ticket.id, ())
    counted = [report for report in reports if report.epoch == ticket.best_epoch] or list(reports)
    last = counted[-1] if counted else None
    return {
        "trial": ticket.number,
        "state": ticket.state.value,
        "value": ticket.value if ticket.value is not None or last is None else last.value,
        "epochs": max([ticket.epochs_done, *(report.epoch + 1 for report in reports)]),
        "seconds": None if ticket.started is None else (ticket.finished or rows.now) - ticket.started,
        "reason": ticket.reason,
        **shown_params(config, ticket.params or {}),
        **({} if last is None else last.metrics),
    }


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys, in the order in which they first come."""
    return list(dict.fromkeys(key for record in records for key in record))
