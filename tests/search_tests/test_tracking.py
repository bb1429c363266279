"""Trackers: one set of promises, kept by every backend, and what only MLflow can show."""

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.launch.mlflow_ui import MlflowUi
from search.tracking import (
    CANDIDATE,
    CHAMPION,
    MlflowTracker,
    NullTracker,
    TrackedState,
    Tracker,
    TrackingConfigError,
    TrackingError,
    TrackingUnavailableError,
    checked_tracking_uri,
    default_tracking_uri,
    experiment_url,
    mask_secrets,
    open_tracker,
    run_url,
)

HYP = {"box": 0.05, "cls": 0.5, "obj": 1.0, "fl_gamma": 0.0}
ROWS = [(epoch, {"metrics/fitness": 0.1 * epoch, "val/box_loss": 0.5}, 1_700_000_000.25 + epoch) for epoch in range(3)]


@pytest.fixture(scope="session")
def file_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store; its tables are made by the first tracker."""
    return f"sqlite:///{tmp_path_factory.mktemp('file-store')}/runs/mlflow.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on a store of its own."""
    runs_dir = tmp_path_factory.mktemp("server") / "runs"
    with MlflowUi.start(f"sqlite:///{runs_dir}/mlflow.db", runs_dir, port=0) as ui:
        ui.wait_until_healthy()
        yield ui.address


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """A study of its own for every test, since creating a store takes seconds."""
    return "study-" + request.node.name.translate(str.maketrans("[]", "--"))


class TrackerConformance:
    """What every tracker promises."""

    def test_ensure_experiment_twice_gives_one_experiment(self, tracker: Tracker, study: str) -> None:
        first = tracker.ensure_experiment(study, "trials: 12")

        assert first
        assert tracker.ensure_experiment(study, "trials: 12") == first

    def test_ensure_trial_run_of_the_same_ticket_gives_the_same_run(self, tracker: Tracker, study: str) -> None:
        first = tracker.ensure_trial_run(study, "7", "trial-00007", HYP, {"yolosearch.host": "a"})

        assert first
        assert tracker.ensure_trial_run(study, "7", "trial-00007", HYP, {"yolosearch.host": "b"}) == first

    def test_ensure_run_of_other_tickets_and_studies_gives_other_runs(self, tracker: Tracker, study: str) -> None:
        runs = {
            tracker.ensure_summary(study, {}, {}),
            tracker.ensure_trial_run(study, "1", "trial", HYP, {}),
            tracker.ensure_trial_run(study, "11", "trial", HYP, {}),
            tracker.ensure_trial_run(study + "-b", "1", "trial", HYP, {}),
        }

        assert len(runs) == 4

    def test_ensure_summary_twice_gives_one_run(self, tracker: Tracker, study: str) -> None:
        first = tracker.ensure_summary(study, {"yolosearch.versions": "1"}, {"trials": 12})

        assert tracker.ensure_summary(study, {"yolosearch.versions": "1"}, {"trials": 12}) == first

    def test_every_write_repeated_raises_nothing(self, tracker: Tracker, study: str) -> None:
        run = tracker.ensure_trial_run(study, "0", "trial-00000", HYP, {})
        for _ in range(2):
            tracker.log_epochs(run, ROWS)
            tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n"})
            tracker.set_tags(run, {"yolosearch.attempts": "1"})
            tracker.set_state(run, TrackedState.FAIL, "out of memory", 1_700_000_100.0)

        assert tracker.ensure_trial_run(study, "0", "trial-00000", HYP, {}) == run


class TestNullTracker(TrackerConformance):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return open_tracker(enabled=False, uri="sqlite:///never-opened.db", runs_dir=Path("never-made"))

    def test_null_tracker_leaves_no_trace(self, tracker: Tracker) -> None:
        assert isinstance(tracker, NullTracker)
        assert not Path("never-made").exists()
        assert tracker.experiment_url("study", "http://127.0.0.1:5000") is None


class RecordingConformance(TrackerConformance):
    """What every tracker that records promises, read back through MLflow's own client."""

    @pytest.fixture
    def uri(self, file_store: str) -> str:
        return file_store

    @pytest.fixture
    def tracker(self, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
        # The same folder for all trackers of a store, as in a runs folder.
        return MlflowTracker(uri, tmp_path_factory.getbasetemp() / "mlartifacts")

    @pytest.fixture
    def reader(self, uri: str, tracker: Tracker) -> Any:
        tracker.ensure_experiment("reader")
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)

    @pytest.fixture
    def run(self, tracker: Tracker, study: str) -> str:
        tags = {"yolosearch.trial_number": "3", "yolosearch.sampler": "tpe"}
        return tracker.ensure_trial_run(study, "3", "trial-00003", HYP, tags)

    def test_register_weights_twice_is_one_version_and_another_artifact_takes_the_alias(
        self, tracker: Tracker, run: str, study: str, reader: Any
    ) -> None:
        file = "weights/best.safetensors"
        tracker.log_artifacts(run, {file: "tensors"})

        first = tracker.register_weights(study, run, file, CHAMPION, {"yolosearch.trial": "3"})
        again = tracker.register_weights(study, run, file, CHAMPION, {"yolosearch.standing": "confirmed"})

        champion = reader.get_model_version_by_alias(study, "champion")
        assert first == again == str(champion.version)
        assert (champion.run_id, champion.source) == (run, f"runs:/{run}/weights/best.safetensors")
        assert champion.tags == {"yolosearch.trial": "3", "yolosearch.standing": "confirmed"}

        other = tracker.ensure_trial_run(study, "4", "trial-00004", HYP, {})
        second = tracker.register_weights(study, other, file, CHAMPION, {})
        assert second != first
        assert reader.get_model_version_by_alias(study, "champion").run_id == other
        assert reader.get_model_version(study, first).tags["yolosearch.standing"] == "superseded"

    def test_register_weights_of_a_champion_ends_the_candidate_and_not_the_other_way_round(
        self, tracker: Tracker, run: str, study: str, reader: Any
    ) -> None:
        def aliases() -> dict[str, str]:
            return {name: str(version) for name, version in reader.get_registered_model(study).aliases.items()}

        file, tag = "weights/best.safetensors", "yolosearch.standing"
        other = tracker.ensure_trial_run(study, "4", "trial-00004", HYP, {})
        first = tracker.register_weights(study, run, file, CANDIDATE, {tag: "unconfirmed"})
        assert aliases() == {"candidate": first}

        second = tracker.register_weights(study, other, file, CHAMPION, {tag: "confirmed"})
        assert aliases() == {"champion": second}
        assert reader.get_model_version(study, first).tags[tag] == "superseded"

        # While another confirmation is under way the best single run is a candidate again, beside the champion.
        assert tracker.register_weights(study, other, file, CANDIDATE, {tag: "unconfirmed"}) == second
        assert aliases() == {"champion": second}
        assert reader.get_model_version(study, second).tags[tag] == "confirmed"
        tracker.register_weights(study, run, file, CANDIDATE, {tag: "unconfirmed"})
        assert aliases() == {"champion": second, "candidate": first}

        tracker.withdraw_champion(study)
        tracker.withdraw_champion(study)
        assert aliases() == {"candidate": first}
        assert reader.get_model_version(study, second).tags[tag] == "superseded"
        tracker.withdraw_champion(f"{study}-without-a-model")

    def test_ensure_trial_run_writes_name_params_and_tags(self, run: str, study: str, reader: Any) -> None:
        stored = reader.get_run(run)

        assert stored.info.run_name == "trial-00003"
        assert stored.info.status == "RUNNING"
        assert stored.data.params == {"box": "0.05", "cls": "0.5", "obj": "1.0", "fl_gamma": "0.0"}
        tags = stored.data.tags
        assert (tags["yolosearch.study"], tags["yolosearch.ticket"], tags["yolosearch.kind"]) == (study, "3", "trial")
        assert (tags["yolosearch.trial_number"], tags["yolosearch.sampler"]) == ("3", "tpe")
        # Flat: nested runs show an empty chart page.
        assert "mlflow.parentRunId" not in tags

    def test_tracker_leaves_no_active_run(self, run: str) -> None:
        import mlflow

        assert mlflow.active_run() is None

    def test_ensure_trial_run_with_changed_param_keeps_the_first_and_says_so(
        self, tracker: Tracker, run: str, study: str, reader: Any
    ) -> None:
        again = tracker.ensure_trial_run(study, "3", "trial-00003", HYP | {"box": 0.07, "lr0": 0.01}, {})

        stored = reader.get_run(again)
        assert again == run
        assert (stored.data.params["box"], stored.data.params["lr0"]) == ("0.05", "0.01")
        assert stored.data.tags["yolosearch.changed_params"] == "box: 0.05 -> 0.07"

    def test_log_epochs_sent_twice_by_two_trackers_gives_one_point_per_epoch(
        self, tracker: Tracker, uri: str, run: str, reader: Any, tmp_path: Path
    ) -> None:
        tracker.log_epochs(run, ROWS[:2])
        MlflowTracker(uri, tmp_path).log_epochs(run, ROWS)
        tracker.log_epochs(run, ROWS)

        history = reader.get_metric_history(run, "metrics/fitness")
        points = sorted((point.step, point.timestamp, round(point.value, 6)) for point in history)
        assert points == [(0, 1_700_000_000_250, 0.0), (1, 1_700_000_001_250, 0.1), (2, 1_700_000_002_250, 0.2)]

    def test_log_epochs_beyond_one_batch_stores_every_point_once(self, tracker: Tracker, run: str, reader: Any) -> None:
        rows = [(epoch, {f"class_ap/{i}": epoch + i / 100 for i in range(20)}, 1000.0 + epoch) for epoch in range(60)]

        tracker.log_epochs(run, rows)
        tracker.log_epochs(run, rows)

        for key in ("class_ap/0", "class_ap/19"):
            assert sorted(point.step for point in reader.get_metric_history(run, key)) == list(range(60))

    def test_log_epochs_leaves_out_what_is_not_finite(self, tracker: Tracker, run: str, reader: Any) -> None:
        tracker.log_epochs(run, [(0, {"a": float("nan"), "b": float("inf"), "c": 0.25}, 1000.0)])

        assert reader.get_run(run).data.metrics == {"c": 0.25}

    @pytest.mark.parametrize(
        ("state", "reason", "status"),
        [
            (TrackedState.COMPLETE, None, "FINISHED"),
            (TrackedState.PRUNED, "pruned at epoch 4", "KILLED"),
            (TrackedState.FAIL, "loss became NaN at epoch 2", "FAILED"),
        ],
    )
    def test_set_state_of_a_finished_trial_ends_the_run(
        self, tracker: Tracker, run: str, reader: Any, state: TrackedState, reason: str | None, status: str
    ) -> None:
        tracker.set_state(run, state, reason, 1_700_000_500.5)

        stored = reader.get_run(run)
        assert (stored.info.status, stored.info.end_time) == (status, 1_700_000_500_500)
        assert stored.data.tags["yolosearch.state"] == state.value
        assert stored.data.tags.get("yolosearch.reason") == reason

    def test_set_state_repeated_without_end_keeps_the_first_end(self, tracker: Tracker, run: str, reader: Any) -> None:
        tracker.set_state(run, TrackedState.COMPLETE, None, 1_700_000_500.5)
        before = reader.get_run(run).to_dictionary()

        tracker.set_state(run, TrackedState.COMPLETE)

        assert reader.get_run(run).to_dictionary() == before

    def test_set_state_of_a_handed_back_trial_is_scheduled_and_may_go_on(
        self, tracker: Tracker, run: str, reader: Any
    ) -> None:
        tracker.set_state(run, TrackedState.SCHEDULED, "worker stopped")
        assert reader.get_run(run).info.status == "SCHEDULED"

        tracker.set_state(run, TrackedState.RUNNING)

        stored = reader.get_run(run)
        assert (stored.info.status, stored.info.end_time) == ("RUNNING", None)
        assert "yolosearch.reason" not in stored.data.tags

    def test_log_artifacts_stores_text_and_files_under_their_names(
        self, tracker: Tracker, run: str, reader: Any, tmp_path: Path
    ) -> None:
        weights = tmp_path / "00003.bin"
        weights.write_bytes(b"\x00\x01weights")

        tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n", "weights/best.safetensors": weights})

        fetched = tmp_path / "fetched"
        fetched.mkdir()
        reader.download_artifacts(run, "hyp.yaml", str(fetched))
        reader.download_artifacts(run, "weights", str(fetched))
        assert (fetched / "hyp.yaml").read_text() == "box: 0.05\n"
        assert (fetched / "weights" / "best.safetensors").read_bytes() == b"\x00\x01weights"

    @pytest.mark.parametrize("name", ["../hyp.yaml", "/tmp/hyp.yaml", ""])
    def test_log_artifacts_with_a_name_outside_the_run_is_refused(self, tracker: Tracker, run: str, name: str) -> None:
        with pytest.raises(TrackingError, match="relative path"):
            tracker.log_artifacts(run, {name: "text"})

    def test_log_artifacts_of_a_missing_file_names_it(self, tracker: Tracker, run: str, tmp_path: Path) -> None:
        with pytest.raises(TrackingError, match=r"hyp\.yaml: .*gone\.yaml is no file"):
            tracker.log_artifacts(run, {"hyp.yaml": tmp_path / "gone.yaml"})

    def test_set_tags_masks_passwords_and_cuts_long_values(self, tracker: Tracker, run: str, reader: Any) -> None:
        many = {f"yolosearch.t{i}": "x" for i in range(120)}
        tracker.set_tags(run, {"storage": "postgresql://ann:s3cret@db/optuna", "long": "x" * 9000, **many})

        tags = reader.get_run(run).data.tags
        assert tags["storage"] == "postgresql://ann:***@db/optuna"
        assert len(tags["long"]) == 5000
        assert tags["yolosearch.t119"] == "x"

    def test_ensure_experiment_writes_the_study_as_its_note(self, tracker: Tracker, study: str, reader: Any) -> None:
        experiment = reader.get_experiment(tracker.ensure_experiment(study, "trials: 12\n"))

        assert experiment.name == study
        assert "trials: 12" in experiment.tags["mlflow.note.content"]
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    def test_ensure_experiment_deleted_in_the_ui_is_restored(self, tracker: Tracker, study: str, reader: Any) -> None:
        experiment = tracker.ensure_experiment(study)
        reader.delete_experiment(experiment)

        assert tracker.ensure_experiment(study) == experiment
        assert reader.get_experiment(experiment).lifecycle_stage == "active"

    def test_ensure_trial_run_deleted_in_the_ui_is_made_anew(
        self, tracker: Tracker, run: str, study: str, reader: Any
    ) -> None:
        reader.delete_run(run)

        assert tracker.ensure_trial_run(study, "3", "trial-00003", HYP, {}) != run

    def test_two_studies_in_one_experiment_keep_their_own_runs(
        self, uri: str, study: str, tmp_path: Path, reader: Any
    ) -> None:
        tracker = MlflowTracker(uri, tmp_path, experiment=f"{study}-shared")
        runs = [tracker.ensure_trial_run(name, "1", "trial", HYP, {}) for name in ("a", "b")]

        assert runs[0] != runs[1]
        assert {reader.get_run(run).info.experiment_id for run in runs} == {tracker.ensure_experiment("a")}

    def test_unknown_run_is_a_tracking_error_in_one_line(self, tracker: Tracker) -> None:
        with pytest.raises(TrackingError, match="could not read run 0123456789abcdef") as caught:
            tracker.set_state("0123456789abcdef0123456789abcdef", TrackedState.COMPLETE)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, TrackingUnavailableError)

    def test_links_lead_below_the_given_address(self, tracker: Tracker, run: str, study: str) -> None:
        experiment = tracker.ensure_experiment(study)
        base = "http://127.0.0.1:5000"

        assert tracker.experiment_url(study, base) == f"{base}/#/experiments/{experiment}/runs"
        assert tracker.run_url(run, base + "/") == f"{base}/#/experiments/{experiment}/runs/{run}"


class TestMlflowTrackerOnFile(RecordingConformance):
    def test_artifacts_lie_below_the_artifact_root(
        self, tracker: Tracker, run: str, study: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n"})

        root = tmp_path_factory.getbasetemp() / "mlartifacts"
        assert (root / study / run / "artifacts" / "hyp.yaml").read_text() == "box: 0.05\n"

    def test_artifacts_of_experiments_of_any_name_lie_in_a_folder_each(
        self, uri: str, study: str, tmp_path: Path
    ) -> None:
        root = tmp_path / "runs" / "mlartifacts"
        names = ["../../evil", f"{tmp_path}/evil", "..", "a/b", "a_b", "a b", "a:b"]
        for name in names:
            tracker = MlflowTracker(uri, root, experiment=name)
            run = tracker.ensure_trial_run(study, "1", "trial", HYP, {})
            tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n"})

        found = [path.relative_to(root).parts for path in tmp_path.rglob("hyp.yaml")]
        assert {parts[2:] for parts in found} == {("artifacts", "hyp.yaml")}
        assert len({parts[0] for parts in found}) == len(found) == len(names)

    def test_a_file_has_no_ui_of_its_own(self, tracker: Tracker, study: str) -> None:
        assert tracker.experiment_url(study) is None


class TestMlflowTrackerOnServer(RecordingConformance):
    @pytest.fixture
    def uri(self, server: str) -> str:
        return server

    def test_the_server_is_its_own_ui(self, tracker: Tracker, uri: str, study: str) -> None:
        experiment = tracker.ensure_experiment(study)

        assert tracker.experiment_url(study) == f"{uri}/#/experiments/{experiment}/runs"


WORKER = """
import sys
from pathlib import Path
contacted = []
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        contacted.append((event, args))
sys.addaudithook(note)
from search.tracking import TrackedState, open_tracker
assert "mlflow" not in sys.modules, "MLflow takes seconds to import and must wait for the first call"
tracker = open_tracker(enabled=True, uri=None, runs_dir=Path(sys.argv[1]))
run = tracker.ensure_trial_run("fresh", sys.argv[2], "trial", {"box": 0.05}, {})
for epoch in range(10):
    tracker.log_epochs(run, [(epoch, {"metrics/fitness": 0.5}, 1000.0 + epoch)])
tracker.set_state(run, TrackedState.COMPLETE, None, 1100.0)
assert not contacted, contacted
"""


def test_three_processes_on_a_fresh_file_all_record_in_silence_and_offline(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    runs_dir = tmp_path / "runs"
    # A bare environment: MLflow's telemetry would stay off by itself where it sees pytest or a CI service.
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(runs_dir), str(ticket)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ticket in range(3)
    ]

    results = [(worker.communicate(timeout=120)[0], worker.returncode) for worker in workers]

    assert results == [("", 0)] * 3
    with sqlite3.connect(runs_dir / "mlflow.db") as database:
        assert database.execute("SELECT name FROM experiments WHERE name != 'Default'").fetchall() == [("fresh",)]
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)] * 3
        assert database.execute("SELECT count(*) FROM metrics").fetchone() == (30,)
    # Nothing else is left: no half-made store, no ./mlruns in the current folder.
    files = {path.name.removesuffix("-wal").removesuffix("-shm") for path in runs_dir.iterdir()}
    assert files == {"mlflow.db", "mlflow.db.init.lock"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "worker.py"]


def test_default_tracking_uri_without_environment_is_a_file_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    assert default_tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_default_tracking_uri_with_environment_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")

    assert default_tracking_uri(Path("runs")) == "http://mlflow.example:5000"
    tracker = open_tracker(enabled=True, uri=None, runs_dir=Path("runs"))
    assert tracker.address == "http://mlflow.example:5000"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{cwd}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("mlruns", "file://{cwd}/mlruns"),
        ("https://mlflow.example", "https://mlflow.example"),
        ("postgresql+psycopg://ann@db/mlflow", "postgresql+psycopg://ann@db/mlflow"),
    ],
)
def test_checked_tracking_uri_makes_paths_absolute(
    uri: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert checked_tracking_uri(uri) == expected.format(cwd=tmp_path)


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("htp://mlflow.example", "'htp://mlflow.example' is no tracking store"),
        ("redis://ann:s3cret@host", r"'redis://ann:\*\*\*@host' is no tracking store"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_open_tracker_with_a_useless_uri_names_it_and_what_is_allowed(uri: str, named: str) -> None:
    with pytest.raises(TrackingConfigError, match=named + ".*allowed: "):
        open_tracker(enabled=True, uri=uri, runs_dir=Path("runs"))


def test_tracker_on_a_studys_database_refuses_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as database:
        for table in ("studies", "trials", "version_info", "alembic_version"):
            database.execute(f"CREATE TABLE {table} (id INTEGER)")

    with pytest.raises(TrackingConfigError, match="holds the tables of a study, nothing was written"):
        MlflowTracker(f"sqlite:///{path}", tmp_path).ensure_experiment("study")

    with sqlite3.connect(path) as database:
        assert len(database.execute("SELECT name FROM sqlite_master").fetchall()) == 4


def test_tracker_on_a_file_that_is_no_database_names_it(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("this is a text file, long enough to be read as a database header " * 20)

    with pytest.raises(TrackingError, match=r"mlflow\.db could not .*not a database"):
        MlflowTracker(f"sqlite:///{path}", tmp_path).ensure_experiment("study")


def test_tracker_without_a_server_is_unavailable_and_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        tracker = MlflowTracker(f"http://ann:s3cret@127.0.0.1:{port}", tmp_path)

        with pytest.raises(TrackingUnavailableError) as caught:
            tracker.ensure_experiment("study")

    expected = f"MLflow at http://ann:***@127.0.0.1:{port} could not open experiment 'study': no connection"
    assert str(caught.value) == expected
    assert caught.value.__cause__ is None
    assert tracker.address == f"http://ann:***@127.0.0.1:{port}"


def test_mask_secrets_hides_urls_and_the_environments_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")

    text = mask_secrets("login hunter2 at https://ann:p%40ss@mlflow.example/x failed")

    assert text == "login *** at https://ann:***@mlflow.example/x failed"


def test_links_carry_no_credentials() -> None:
    base = "https://ann:s3cret@mlflow.example:8443/prefix/"

    assert experiment_url(base, "4") == "https://mlflow.example:8443/prefix/#/experiments/4/runs"
    assert run_url(base, "4", "abc") == "https://mlflow.example:8443/prefix/#/experiments/4/runs/abc"
