"""MLflow as a mirror of the ledger: one experiment per study, one flat run per trial and one for the study's summary.

Only this module knows MLflow. It uses `MlflowClient` with explicit run ids: the fluent API keeps an active run per
process, ends it as FINISHED when the process crashes and is of no use to a worker that drives several trials at once.

Everything can be repeated. A run is found by its tags `yolosearch.study` and `yolosearch.ticket` before it is created,
metrics carry the time that the ledger stored with their epoch (MLflow keeps equal points once), states are set and not
added up. What cannot be repeated with another value is a parameter: the first value stays.

MLflow takes seconds to import, so that happens at the first call and not with this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from search.database import make_engine, mask_url, named_lock, same_schema, schema_owner, sqlite_path
from search.errors import DatabaseError, SearchError, UserInputError

logger = logging.getLogger(__name__)

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "DATABRICKS_TOKEN",
    "MLFLOW_DB_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "POSTGRES_PASSWORD",
    "RAY_AUTH_TOKEN",
    "STUDIES_DB_PASSWORD",
)
STUDY_TAG = "yolosearch.study"
TICKET_TAG = "yolosearch.ticket"
KIND_TAG = "yolosearch.kind"
STATE_TAG = "yolosearch.state"
REASON_TAG = "yolosearch.reason"
CHANGED_PARAMS_TAG = "yolosearch.changed_params"
NOTE_TAG = "mlflow.note.content"
VIEW_KEY = "yolosearch"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
"""Where MLflow's UI looks for the columns of a table that a link names by its key."""

SUMMARY_TICKET = "summary"
CHAMPION = "champion"
"""Alias of the registered model's version that a study recommends since a confirmation decided so."""

CANDIDATE = "candidate"
"""Alias of the version that is the best so far, as long as no confirmation has decided."""

STANDING_TAG = "yolosearch.standing"
SUPERSEDED = "superseded"
"""Standing of a version that has lost its alias."""

# Limits of the oldest servers in use; today's MLflow allows more.
METRICS_PER_BATCH = 1000
ITEMS_PER_BATCH = 100
PARAM_LENGTH = 500
TAG_LENGTH = 5000

INIT_LOCK_SECONDS = 120.0
BUSY_RETRIES = 5

PRIVACY_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
"""Nothing may leave the machine but what the user asked for: set whatever the environment says."""

CLIENT_ENVIRONMENT = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Defaults, kept where the user says otherwise. Every failure reaches us as an exception, so MLflow's own log (with
tracebacks) is silent. Its 7 retries with growing pauses are minutes; our caller retries, and knows when to stop."""

_URI_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")
_ALLOWED_URIS = "http(s)://HOST:PORT, sqlite:///PATH, postgresql://USER@HOST/DATABASE or another store of MLflow"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9 ._-]{0,127}")

T = TypeVar("T")
Metrics = Mapping[str, float]
EpochMetrics = tuple[int, Metrics, float]
"""Epoch, metric values by name, and the UTC epoch seconds at which the ledger stored them."""


class TrackingError(SearchError):
    """MLflow refused something. One line, passwords masked."""


class TrackingUnavailableError(TrackingError):
    """The tracking store cannot be reached now; the same call may succeed later."""


class TrackingLoginError(TrackingError):
    """The MLflow server refuses user and password. Training goes on; the records are completed once they are right."""


class TrackingConfigError(TrackingError, UserInputError):
    """The tracking store that the user named cannot be used."""


class TrackedState(StrEnum):
    """What a run shows. SCHEDULED: handed back, to be continued."""

    RUNNING = "RUNNING"
    SCHEDULED = "SCHEDULED"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"


_RUN_STATUS = {
    TrackedState.RUNNING: "RUNNING",
    TrackedState.SCHEDULED: "SCHEDULED",
    TrackedState.COMPLETE: "FINISHED",
    TrackedState.PRUNED: "KILLED",
    TrackedState.FAIL: "FAILED",
}
_UNFINISHED = {TrackedState.RUNNING, TrackedState.SCHEDULED}


class Tracker(Protocol):
    """Where a study's records are shown. Every method may be called again with the same arguments and changes nothing.

    All methods raise `TrackingError`, or its `TrackingUnavailableError` where trying again later may help.
    """

    @property
    def address(self) -> str:
        """The store, without password, to be shown to the user."""

    def ensure_experiment(self, study: str, config_text: str = "") -> str:
        """The id of the study's experiment, which is created (with `config_text` as its note) where it is missing."""

    def set_table(self, study: str, columns: Sequence[str], left_out: Sequence[str] = ()) -> None:
        """What the study's table of runs shows at its deep link (`experiment_url`), the best run first.

        Args:
            study: name of the study, whose experiment exists.
            columns: `metrics/fitness` is a metric, `params.box` a parameter, `tags.x` a tag; the first one sorts.
            left_out: kinds of runs that are only shown once the search field is emptied.
        """

    def ensure_summary(self, study: str, tags: Mapping[str, str], params: Mapping[str, object]) -> str:
        """The id of the run that sums up the study."""

    def ensure_trial_run(
        self,
        study: str,
        ticket_key: str,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        kind: str = "trial",
    ) -> str:
        """The id of the run of one ticket, found again by its tag before it is created.

        Args:
            study: name of the study.
            ticket_key: names the ticket within the study, whatever its attempt.
            name: shown in the table of runs; kept from the first call.
            params: logged once. A value that differs from the one logged earlier does not replace it and is no error:
                the tag `yolosearch.changed_params` tells of it.
            tags: written over those that the run has.
            kind: of run: a trial of the search, or a rerun (noise, confirm).
        """

    def log_epochs(self, run_id: str, rows: Sequence[EpochMetrics]) -> None:
        """Writes metrics of many epochs in few requests; the epoch is MLflow's step.

        The time has to be the stored one, since MLflow takes the same value at another time for a second point. Values
        that are not finite are left out: MLflow would show NaN as 0 and infinity as 1.8e308.
        """

    def log_artifacts(self, run_id: str, files: Mapping[str, Path | str]) -> None:
        """Stores files under the keys' names (`weights/best.safetensors`): a `Path` is copied, a `str` is the text."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Writes tags, passwords in URLs masked."""

    def tags(self, run_id: str) -> Mapping[str, str]:
        """The tags of a run."""

    def register_weights(self, model: str, run_id: str, artifact: str, alias: str, tags: Mapping[str, str]) -> str:
        """Makes an artifact the version of a registered model that has an alias.

        The same artifact does not become a second version; its tags are written again. A version that loses its alias
        is tagged as superseded. A champion ends the time of candidates; a candidate leaves the champion as it is.

        Args:
            model: name of the registered model, created where it is missing.
            run_id: of the run that has the artifact.
            artifact: its name, for example `weights/best.safetensors`.
            alias: champion or candidate.
            tags: written over those that the version has.

        Returns:
            The version.
        """

    def withdraw_champion(self, model: str) -> None:
        """Takes the alias `champion` from the version that has it, if one does."""

    def set_state(
        self, run_id: str, state: TrackedState, reason: str | None = None, end_time: float | None = None
    ) -> None:
        """COMPLETE becomes FINISHED, PRUNED KILLED, FAIL FAILED; tags `yolosearch.state`, `.reason` tell more.

        Args:
            run_id: of the run.
            state: to be shown.
            reason: why a trial failed or was pruned.
            end_time: UTC epoch seconds; None keeps an end that is known already and is now otherwise.
        """

    def experiment_url(self, study: str, base_url: str | None = None) -> str | None:
        """Deep link to the study's table of runs below the address of a UI; None where no UI is known."""

    def run_url(self, run_id: str, base_url: str | None = None) -> str | None:
        """Deep link to one run below the address of a UI; None where no UI is known."""


def open_tracker(*, enabled: bool, uri: str | None, runs_dir: Path, experiment: str | None = None) -> Tracker:
    """The tracker that a study's settings ask for. Returns at once: the store is opened by the first call.

    Args:
        enabled: False gives a tracker that keeps nothing.
        uri: the store; None for `default_tracking_uri(runs_dir)`.
        runs_dir: artifacts go to its `mlartifacts`, except where an MLflow server decides.
        experiment: name of the experiment; None for the study's name.

    Raises:
        TrackingConfigError: a URI that MLflow cannot use.
    """
    if not enabled:
        return NullTracker()
    return MlflowTracker(uri or default_tracking_uri(runs_dir), runs_dir / "mlartifacts", experiment)


def default_tracking_uri(runs_dir: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, otherwise the SQLite file `mlflow.db` in the runs folder."""
    return os.environ.get(TRACKING_URI_VARIABLE) or f"sqlite:///{(runs_dir / 'mlflow.db').resolve()}"


def checked_tracking_uri(uri: str) -> str:
    """`uri` with a relative SQLite path or folder made absolute: processes in other folders mean the same store.

    Raises:
        TrackingConfigError: neither a path nor a scheme that MLflow knows.
    """
    scheme, separator, _ = uri.partition(":")
    if not separator:
        return uri if uri in _URI_SCHEMES else Path(uri).resolve().as_uri()
    if scheme.partition("+")[0] not in _URI_SCHEMES:
        raise TrackingConfigError(f"tracking uri: {mask_secrets(uri)!r} is no tracking store; allowed: {_ALLOWED_URIS}")
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path is None or str(path) == ":memory:":
            raise TrackingConfigError(
                f"tracking uri: {uri!r} names no file; allowed: sqlite:///relative.db or sqlite:////absolute.db"
            )
        return f"sqlite:///{path.resolve()}"
    return uri


def refuse_studys_database(uri: str, storage_url: str) -> None:
    """Call before anything is written: MLflow and Optuna both own a table `alembic_version`.

    A database that cannot be reached now is not refused: MLflow may be away for a while, and whoever needs the study's
    database says what is wrong with it.

    Args:
        uri: the tracking store, as the study or the environment names it.
        storage_url: the study's database.

    Raises:
        TrackingConfigError: both are one file or schema, or MLflow's holds somebody else's tables.
    """
    uri = checked_tracking_uri(uri)
    if not uri.startswith(("sqlite", "postgresql")):
        return
    try:
        if same_schema(uri, storage_url):
            raise TrackingConfigError(
                f"tracking uri: {mask_secrets(uri)} is the study's own database, nothing was written; "
                "MLflow needs a database (PostgreSQL: or schema) of its own"
            )
        path = _sqlite_file(uri)
        if path is None or path.exists():
            _refuse_foreign_tables(uri)
    except DatabaseError as error:
        logger.debug("the tracking store was not looked at: %s", error)


def is_server(uri: str) -> bool:
    """Whether the store is an MLflow server, which has a UI and decides where artifacts go."""
    return uri.startswith(("http://", "https://"))


def mask_secrets(text: str) -> str:
    """`text` with the passwords of URLs and the secrets of the environment replaced by `***`."""
    for variable in SECRET_VARIABLES:
        if secret := os.environ.get(variable):
            text = text.replace(secret, "***")
    # The space makes it running text: a message that starts with a URL would be parsed, and written back, as one.
    return mask_url(" " + text)[1:]


def experiment_url(base_url: str, experiment_id: str) -> str:
    """Deep link to an experiment's runs under the address of an MLflow UI."""
    return f"{_without_credentials(base_url)}/#/experiments/{experiment_id}/runs"


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """Deep link to one run under the address of an MLflow UI."""
    return f"{_without_credentials(base_url)}/#/experiments/{experiment_id}/runs/{run_id}"


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def prepare_store(uri: str, artifact_root: Path) -> None:
    """Creates the tables of a missing SQLite store. Other stores, and one that exists, are left alone.

    Takes some 5 s (MLflow's import and its migrations), once. May be called by many processes at the same time.

    Raises:
        TrackingError: the file cannot be made.
    """
    uri = checked_tracking_uri(uri)
    path = _sqlite_file(uri)
    if path is not None and not path.exists():
        _load_mlflow()
        with _tracking_errors(uri, "create the tracking store"), named_lock(uri, "init", INIT_LOCK_SECONDS):
            _create_sqlite_store(path, artifact_root)


def probe_store(uri: str) -> str:
    """Asks the store for an experiment, as a worker with the same environment would; creates nothing.

    Returns:
        What it is, with the version of a server.

    Raises:
        TrackingError: it cannot be reached, refuses the login, or is no store of MLflow's.
    """
    uri = checked_tracking_uri(uri)
    path = _sqlite_file(uri)
    if path is not None and not path.exists():
        return f"{path}, made by the first worker"
    if path is not None or uri.startswith("postgresql"):
        with _tracking_errors(uri, "be opened"):
            _refuse_foreign_tables(uri)
            owner = schema_owner(make_engine(uri, create=False, pooled=False))
        return f"{mask_secrets(uri)}, {'empty' if owner == 'empty' else 'with the tables of MLflow'}"
    client = _load_mlflow().tracking.client.MlflowClient(tracking_uri=uri)
    with _tracking_errors(uri, "list experiments"):
        client.search_experiments(max_results=1)
    return f"{mask_secrets(uri)}{_server_version(uri)}"


def _server_version(uri: str) -> str:
    """For example ` (MLflow 3.17.2)`; empty where the server does not tell."""
    if not is_server(uri):
        return ""
    with contextlib.suppress(OSError, ValueError), urlopen(f"{uri.rstrip('/')}/version", timeout=10) as answer:
        return f" (MLflow {answer.read(40).decode()})"
    return ""


class NullTracker:
    """Keeps nothing: for studies with `tracking.enabled: false`. Run ids are names, the same for the same ticket."""

    @property
    def address(self) -> str:
        """Says that there is none."""
        return "none (tracking is off)"

    def ensure_experiment(self, study: str, config_text: str = "") -> str:  # noqa: ARG002
        """The study's name."""
        return study

    def set_table(self, study: str, columns: Sequence[str], left_out: Sequence[str] = ()) -> None:
        """Nothing."""

    def ensure_summary(self, study: str, tags: Mapping[str, str], params: Mapping[str, object]) -> str:  # noqa: ARG002
        """A name made from the study's."""
        return f"{study}/{SUMMARY_TICKET}"

    def ensure_trial_run(
        self,
        study: str,
        ticket_key: str,
        name: str,  # noqa: ARG002
        params: Mapping[str, object],  # noqa: ARG002
        tags: Mapping[str, str],  # noqa: ARG002
        kind: str = "trial",  # noqa: ARG002
    ) -> str:
        """A name made from the study's and the ticket's."""
        return f"{study}/{ticket_key}"

    def log_epochs(self, run_id: str, rows: Sequence[EpochMetrics]) -> None:
        """Nothing."""

    def log_artifacts(self, run_id: str, files: Mapping[str, Path | str]) -> None:
        """Nothing."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def tags(self, run_id: str) -> Mapping[str, str]:  # noqa: ARG002
        """None: nothing is kept."""
        return {}

    def register_weights(self, model: str, run_id: str, artifact: str, alias: str, tags: Mapping[str, str]) -> str:  # noqa: ARG002
        """No version: nothing is kept."""
        return ""

    def withdraw_champion(self, model: str) -> None:
        """Nothing."""

    def set_state(
        self, run_id: str, state: TrackedState, reason: str | None = None, end_time: float | None = None
    ) -> None:
        """Nothing."""

    def experiment_url(self, study: str, base_url: str | None = None) -> str | None:  # noqa: ARG002
        """None: there is nothing to see."""
        return None

    def run_url(self, run_id: str, base_url: str | None = None) -> str | None:  # noqa: ARG002
        """None: there is nothing to see."""
        return None


class MlflowTracker:
    """Records in an MLflow store: a server by HTTP, or a database directly. May be used by several threads.

    An experiment that somebody deleted in the UI is restored; a run that was deleted there is made anew when its ticket
    asks for it. If two processes create the run of one ticket at the same moment, both go on with the older one.
    """

    def __init__(self, uri: str, artifact_root: Path, experiment: str | None = None) -> None:
        """Checks the URI; opens nothing.

        Args:
            uri: of the store.
            artifact_root: folder for artifacts where no server decides; experiments keep its absolute path.
            experiment: name of the experiment; None for the study's name.
        """
        self._uri = checked_tracking_uri(uri)
        self._artifact_root = artifact_root.resolve()
        self._experiment = experiment
        self._lock = threading.RLock()
        self._client: Any = None
        self._experiment_ids: dict[str, str] = {}

    @property
    def address(self) -> str:
        """The store's URI without its password."""
        return mask_secrets(self._uri)

    def ensure_experiment(self, study: str, config_text: str = "") -> str:
        """See `Tracker`. The note is written once and not replaced: people edit it in the UI."""
        name = self._experiment or study
        with self._lock:
            experiment = self._open_experiment(name)
            if config_text and NOTE_TAG not in experiment.tags:
                note = f"Study `{study}`\n\n```yaml\n{mask_secrets(config_text)[: TAG_LENGTH - 200]}\n```"
                self._call("describe the experiment", "set_experiment_tag", experiment.experiment_id, NOTE_TAG, note)
            self._experiment_ids[study] = str(experiment.experiment_id)
            return self._experiment_ids[study]

    def set_table(self, study: str, columns: Sequence[str], left_out: Sequence[str] = ()) -> None:
        """See `Tracker`. MLflow's UI calls this a shared view; it lies in a tag of the experiment."""
        view = json.dumps(_table_view([_column(name) for name in columns], left_out))
        experiment_id = self._experiment_id(study)
        self._call("set the columns of the table", "set_experiment_tag", experiment_id, VIEW_TAG, view)

    def ensure_summary(self, study: str, tags: Mapping[str, str], params: Mapping[str, object]) -> str:
        """See `Tracker`."""
        return self._ensure_run(study, SUMMARY_TICKET, "summary", "summary", params, tags)

    def ensure_trial_run(
        self,
        study: str,
        ticket_key: str,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        kind: str = "trial",
    ) -> str:
        """See `Tracker`."""
        return self._ensure_run(study, ticket_key, kind, name, params, tags)

    def log_epochs(self, run_id: str, rows: Sequence[EpochMetrics]) -> None:
        """See `Tracker`."""
        Metric = _load_mlflow().entities.Metric
        points = [
            Metric(key, float(value), round(stored_at * 1000), epoch)
            for epoch, metrics, stored_at in rows
            for key, value in metrics.items()
            if math.isfinite(value)
        ]
        for batch in _chunks(points, METRICS_PER_BATCH):
            self._call(f"log metrics of run {run_id}", "log_batch", run_id, metrics=batch)

    def log_artifacts(self, run_id: str, files: Mapping[str, Path | str]) -> None:
        """See `Tracker`."""
        with tempfile.TemporaryDirectory(prefix="yolosearch-") as folder:
            for name, content in files.items():
                local = _staged(Path(folder), name, content)
                parent = str(Path(name).parent)
                target = None if parent == "." else parent
                self._call(f"store {name} of run {run_id}", "log_artifact", run_id, str(local), target)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        RunTag = _load_mlflow().entities.RunTag
        items = [RunTag(key, _tag_text(value)) for key, value in tags.items()]
        for batch in _chunks(items, ITEMS_PER_BATCH):
            self._call(f"tag run {run_id}", "log_batch", run_id, tags=batch)

    def tags(self, run_id: str) -> Mapping[str, str]:
        """See `Tracker`."""
        return dict(self._run(run_id).data.tags)

    def register_weights(self, model: str, run_id: str, artifact: str, alias: str, tags: Mapping[str, str]) -> str:
        """See `Tracker`."""
        action = f"register model {model!r}"
        if self._aliases(model) is None:
            with contextlib.suppress(TrackingError):  # another worker may have been faster; names are unique
                self._call(action, "create_registered_model", model)
        version, aliases = self._model_version(model, run_id, artifact), self._aliases(model) or {}
        if alias == CANDIDATE and aliases.get(CHAMPION) == version:
            return version
        for key, value in tags.items():
            self._call(action, "set_model_version_tag", model, version, key, _tag_text(value))
        self._call(action, "set_registered_model_alias", model, alias, version)
        ended = {CHAMPION, CANDIDATE} if alias == CHAMPION else {CANDIDATE}
        for name in ended - {alias} & set(aliases):
            self._call(action, "delete_registered_model_alias", model, name)
        for other in {aliases[name] for name in ended & set(aliases)} - {version}:
            self._call(action, "set_model_version_tag", model, other, STANDING_TAG, SUPERSEDED)
        return version

    def withdraw_champion(self, model: str) -> None:
        """See `Tracker`."""
        action, version = f"withdraw a version of model {model!r}", (self._aliases(model) or {}).get(CHAMPION)
        if version is not None:
            self._call(action, "delete_registered_model_alias", model, CHAMPION)
            self._call(action, "set_model_version_tag", model, version, STANDING_TAG, SUPERSEDED)

    def _model_version(self, model: str, run_id: str, artifact: str) -> str:
        """The version that is an artifact, made where there is none."""
        action, source = f"register model {model!r}", f"runs:/{run_id}/{artifact}"
        versions = self._call(action, "search_model_versions", f"name = {_quoted(model)}")
        known = next((entry for entry in versions if entry.run_id == run_id and entry.source == source), None)
        return str((known or self._call(action, "create_model_version", model, source, run_id)).version)

    def _aliases(self, model: str) -> dict[str, str] | None:
        """The version of each alias of a registered model; None if there is no such model."""
        action = f"read registered model {model!r}"
        if not self._call(action, "search_registered_models", f"name = {_quoted(model)}", max_results=1):
            return None
        found = self._call(action, "get_registered_model", model).aliases
        return {name: str(version) for name, version in dict(found).items()}

    def set_state(
        self, run_id: str, state: TrackedState, reason: str | None = None, end_time: float | None = None
    ) -> None:
        """See `Tracker`."""
        run = self._run(run_id)
        self._set_state_tags(run, state, reason)
        status = _RUN_STATUS[state]
        if state in _UNFINISHED:
            if run.info.status != status:
                self._call(f"set the state of run {run_id}", "update_run", run_id, status=status)
            return
        known = run.info.end_time if run.info.status == status else None
        end = round(end_time * 1000) if end_time is not None else known or round(time.time() * 1000)
        if (run.info.status, run.info.end_time) != (status, end):
            self._call(f"end run {run_id}", "set_terminated", run_id, status, end)

    def experiment_url(self, study: str, base_url: str | None = None) -> str | None:
        """See `Tracker`. An MLflow server is its own UI."""
        base = base_url or self._own_ui()
        if not base:
            return None
        experiment_id = self._experiment_id(study)
        experiment = self._call("read the experiment", "get_experiment", experiment_id)
        view = f"?viewStateShareKey={VIEW_KEY}" if VIEW_TAG in experiment.tags else ""
        return experiment_url(base, experiment_id) + view

    def run_url(self, run_id: str, base_url: str | None = None) -> str | None:
        """See `Tracker`. An MLflow server is its own UI."""
        base = base_url or self._own_ui()
        return run_url(base, self._run(run_id).info.experiment_id, run_id) if base else None

    def _own_ui(self) -> str | None:
        return self._uri if is_server(self._uri) else None

    def _run(self, run_id: str) -> Any:
        return self._call(f"read run {run_id}", "get_run", run_id)

    def _set_state_tags(self, run: Any, state: TrackedState, reason: str | None) -> None:
        wanted = {STATE_TAG: state.value} | ({REASON_TAG: reason} if reason else {})
        stored = run.data.tags
        self.set_tags(
            run.info.run_id, {key: text for key, text in wanted.items() if stored.get(key) != _tag_text(text)}
        )
        if not reason and REASON_TAG in stored and state not in {TrackedState.FAIL, TrackedState.PRUNED}:
            self._call(f"tag run {run.info.run_id}", "delete_tag", run.info.run_id, REASON_TAG)

    def _experiment_id(self, study: str) -> str:
        with self._lock:
            return self._experiment_ids.get(study) or self.ensure_experiment(study)

    def _open_experiment(self, name: str) -> Any:
        action = f"open experiment {name!r}"
        found = self._call(action, "get_experiment_by_name", name) or self._create_experiment(name)
        if found.lifecycle_stage == "deleted":
            self._call(f"restore experiment {name!r}", "restore_experiment", found.experiment_id)
        return found

    def _create_experiment(self, name: str) -> Any:
        location = None if is_server(self._uri) else (self._artifact_root / _folder_name(name)).as_uri()
        # The kind spares the user a question in the UI, which then shows the table of runs and no traces.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        action = f"create experiment {name!r}"
        failure = None
        try:
            self._call(action, "create_experiment", name, location, tags)
        except TrackingError as error:
            # Another worker may have been faster; names are unique.
            failure = error
        found = self._call(action, "get_experiment_by_name", name)
        if found is None:
            raise failure or TrackingError(f"MLflow at {self.address} created experiment {name!r} and does not find it")
        return found

    def _ensure_run(
        self, study: str, ticket: str, kind: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]
    ) -> str:
        experiment_id = self._experiment_id(study)
        own = {STUDY_TAG: study, TICKET_TAG: ticket, KIND_TAG: kind}
        run_id = self._find_run(experiment_id, own)
        if run_id is None:
            run_id = self._create_run(experiment_id, name, own, tags)
        else:
            self.set_tags(run_id, tags)
        self._log_params(run_id, {key: _param_text(value) for key, value in params.items()})
        return run_id

    def _find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        conditions = " and ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items())
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        runs = self._call("look for a run", "search_runs", [experiment_id], conditions, max_results=1, order_by=order)
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self, experiment_id: str, name: str, own: Mapping[str, str], tags: Mapping[str, str]) -> str:
        every = {"mlflow.source.name": "yolosearch", STATE_TAG: TrackedState.RUNNING.value, **tags, **own}
        texts = {key: _tag_text(value) for key, value in every.items()}
        created = self._call(f"create run {name!r}", "create_run", experiment_id, tags=texts, run_name=name)
        run_id = str(created.info.run_id)
        older = self._find_run(experiment_id, own)
        if older is None or older == run_id:
            return run_id
        self._call(f"remove run {run_id}", "delete_run", run_id)
        return older

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        Param = _load_mlflow().entities.Param
        stored = self._run(run_id).data.params
        missing = [Param(key, value) for key, value in params.items() if key not in stored]
        for batch in _chunks(missing, ITEMS_PER_BATCH):
            self._call(f"log params of run {run_id}", "log_batch", run_id, params=batch)
        changed = [
            f"{key}: {stored[key]} -> {value}" for key, value in params.items() if stored.get(key, value) != value
        ]
        if changed:
            self.set_tags(run_id, {CHANGED_PARAMS_TAG: ", ".join(changed)})

    def _call(self, action: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of `MlflowClient`; a busy database is asked again, other failures are one line."""
        with _tracking_errors(self._uri, action):
            bound = getattr(self._opened(), method)
            for attempt in range(BUSY_RETRIES):
                try:
                    return bound(*args, **kwargs)
                except Exception as error:
                    if is_server(self._uri) or not _is_busy(error):
                        raise
                time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**attempt)
            return bound(*args, **kwargs)

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _open_client(self._uri, self._artifact_root)
            return self._client


def _open_client(uri: str, artifact_root: Path) -> Any:
    """A client of the store; a database without tables gets them, by one process at a time."""
    MlflowClient = _load_mlflow().tracking.client.MlflowClient
    if not uri.startswith(("sqlite", "postgresql")):
        return MlflowClient(tracking_uri=uri)
    with named_lock(uri, "init", INIT_LOCK_SECONDS):
        path = _sqlite_file(uri)
        if path is not None and not path.exists():
            _create_sqlite_store(path, artifact_root)
        _refuse_foreign_tables(uri)
        return MlflowClient(tracking_uri=uri)


def _load_mlflow() -> Any:
    """The module `mlflow`, silenced before its first import."""
    os.environ.update(PRIVACY_ENVIRONMENT)
    for key, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow.entities
    import mlflow.tracking.client

    return mlflow


def _sqlite_file(uri: str) -> Path | None:
    return sqlite_path(uri) if uri.startswith("sqlite") else None


def _create_sqlite_store(path: Path, artifact_root: Path) -> None:
    """Makes the store beside its place and links it there when complete: a crash leaves no half-migrated file.

    The caller holds the lock. The file is in WAL mode, so that the UI's reads do not stop the workers' writes.
    """
    from mlflow.store.tracking import sqlalchemy_store

    if path.exists():
        return
    # Any: MLflow's constructor has no annotations.
    Store: Any = sqlalchemy_store.SqlAlchemyStore
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        uri = f"sqlite:///{folder / path.name}"
        Store(uri, artifact_root.resolve().as_uri()).engine.dispose()
        make_engine(uri, pooled=False).connect().close()
        # Not a rename: if another program made the file meanwhile, its content stays.
        with contextlib.suppress(FileExistsError):
            os.link(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign_tables(uri: str) -> None:
    engine = make_engine(uri, create=False, pooled=False)
    owner = schema_owner(engine)
    if owner in {"yolosearch", "other"}:
        holder = "a study" if owner == "yolosearch" else "another application"
        raise TrackingConfigError(
            f"tracking uri: {mask_secrets(uri)} holds the tables of {holder}, nothing was written; "
            "MLflow needs a database (PostgreSQL: or schema) of its own"
        )


@contextlib.contextmanager
def _tracking_errors(uri: str, action: str) -> Iterator[None]:
    """Turns whatever MLflow and the libraries below it raise into one line without passwords."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        reason = mask_secrets(" ".join(str(error).split()))[:400] or type(error).__name__
        if "error code 401" in reason:
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user that it knows"
            raise TrackingLoginError(f"MLflow at {mask_secrets(uri)} refuses the login (401): {remedy}") from None
        if "Max retries exceeded" in reason:
            reason = "no connection"
        kind = TrackingUnavailableError if _is_outage(error) else TrackingError
        if isinstance(error, DatabaseError):
            raise TrackingUnavailableError(f"MLflow could not {action}: {error}") from None
        # `from None`: the original may carry the password in its text.
        raise kind(f"MLflow at {mask_secrets(uri)} could not {action}: {reason}") from None


def _is_busy(error: Exception) -> bool:
    return "database is locked" in str(error) or "database table is locked" in str(error)


def _is_outage(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, a busy or restarting server or database."""
    code = getattr(error, "error_code", None)
    outages = ("Max retries exceeded", "Connection", "connection", "timed out")
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or _is_busy(error)
        or code in {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
        or (code in {None, "INTERNAL_ERROR", "BAD_REQUEST"} and any(word in str(error) for word in outages))
    )


def _column(name: str) -> str:
    kind, dot, rest = name.partition(".")
    return f"{kind}.`{rest}`" if dot and kind in {"params", "tags"} else f"metrics.`{name}`"


def _table_view(columns: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """The state of the UI's table: what is shown, in which order, and that charts show every run."""
    return {
        "searchFilter": " AND ".join(f"tags.`{KIND_TAG}` != '{kind}'" for kind in left_out),
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "runsHiddenMode": "SHOWALL",
    }


def _folder_name(experiment: str) -> str:
    """One folder's name for an experiment, whatever its name holds: its artifacts stay below their root."""
    if _PLAIN_NAME.fullmatch(experiment):
        return experiment
    # The digest keeps apart what is equal once its letters are replaced.
    digest = hashlib.sha256(experiment.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', experiment)[:100]}-{digest}"


def _staged(folder: Path, name: str, content: Path | str) -> Path:
    """A local file with the artifact's own file name."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        raise TrackingError(f"artifact {name!r}: the name must be a relative path without '..'")
    if isinstance(content, Path):
        if not content.is_file():
            raise TrackingError(f"artifact {name}: {content} is no file")
        if content.name == Path(name).name:
            return content
    local = folder / Path(name).name
    local.unlink(missing_ok=True)
    if isinstance(content, Path):
        local.symlink_to(content.resolve())
    else:
        local.write_text(content, encoding="utf-8")
    return local


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _quoted(value: str) -> str:
    quote = '"' if "'" in value else "'"
    if quote in value:
        raise TrackingConfigError(f"study or ticket name {value!r} must not contain both kinds of quotes")
    return f"{quote}{value}{quote}"


def _tag_text(value: str) -> str:
    return mask_secrets(str(value))[:TAG_LENGTH]


def _param_text(value: object) -> str:
    return mask_secrets(str(value))[:PARAM_LENGTH]
