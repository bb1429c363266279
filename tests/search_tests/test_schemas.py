"""Databases that were mixed up: the study's is MLflow's, or the other way round. One line, and nothing is written."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from tiny import NAME, TinyStudy, make_study

from search.database import make_engine, same_schema
from search.launch.prepare import plan_study
from search.tracking import MlflowTracker, TrackingConfigError
from search.worker.session import WorkerOptions, run_worker

Make = Callable[..., TinyStudy]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


def content(url: str) -> dict[str, int]:
    """Rows of every table, whatever application's it is."""
    engine = sa.create_engine(make_url(url))
    with engine.connect() as connection:
        tables = sorted(sa.inspect(connection).get_table_names())
        rows = {name: connection.execute(sa.text(f'SELECT count(*) FROM "{name}"')).scalar_one() for name in tables}
    engine.dispose()
    return rows


def tracked(study: TinyStudy) -> TinyStudy:
    """The study with MLflow's records where the environment says."""
    study.write(tracking={"enabled": True})
    return study


def test_same_schema_two_names_of_one_place_are_seen_through(storage_url: str, tmp_path: Path) -> None:
    url = make_url(storage_url)
    if url.get_backend_name() == "sqlite":
        link = tmp_path / "link.db"
        link.symlink_to(url.database or "")
        alias, other = f"sqlite:///{link}", f"sqlite:///{tmp_path}/other.db"
    else:
        engine = make_engine(storage_url)
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE SCHEMA mlflow"))
        engine.dispose()
        named = url.set(drivername="postgresql+psycopg").update_query_dict({"application_name": "alias"})
        alias = named.render_as_string(hide_password=False)
        other = url.update_query_dict({"options": "-csearch_path=mlflow"}).render_as_string(hide_password=False)
    assert same_schema(storage_url, alias)
    assert not same_schema(storage_url, other)
    assert not same_schema("sqlite:////a.db", "postgresql://u@127.0.0.1:9/d")


def test_plan_study_both_tools_on_one_schema_is_refused_and_nothing_is_written(
    make: Make, storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tracked(make(storage_url=storage_url))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", storage_url)

    with pytest.raises(TrackingConfigError, match="is the study's own database, nothing was written; MLflow needs"):
        study.create()

    assert storage_url.startswith("postgresql") or not Path(make_url(storage_url).database or "").exists()
    assert storage_url.startswith("sqlite") or content(storage_url) == {}


def test_run_worker_told_to_track_into_the_studys_database_is_refused(
    make: Make, storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tracked(make(storage_url=storage_url))
    study.create()
    before = content(storage_url)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", storage_url)
    with pytest.raises(TrackingConfigError, match="is the study's own database"):
        run_worker(WorkerOptions(storage_url=storage_url, study=NAME, runs_dir=study.runs, worker_id="w"))

    assert content(storage_url) == before


def test_plan_study_tracking_store_that_is_away_is_no_mistake(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 (discard) refuses connections.
    study = tracked(make(storage_url="postgresql://u@127.0.0.1:9/d"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u@127.0.0.1:9/mlflow")

    assert plan_study(study.config, study.storage_url, study.runs).storage_url == study.storage_url


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_schemas_of_real_tools_mixed_up_are_refused_and_untouched(
    make: Make, request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    mlflow_url = f"sqlite:///{tmp_path / 'mlflow.db'}"
    studies_url = f"sqlite:///{tmp_path / 'studies.db'}"
    if backend == "postgresql":
        mlflow_url = request.getfixturevalue("postgres_url")
        studies_url = (
            make_url(mlflow_url)
            .update_query_dict({"options": "-csearch_path=studies"})
            .render_as_string(hide_password=False)
        )
        with make_engine(mlflow_url).begin() as connection:
            connection.execute(sa.text("CREATE SCHEMA studies"))
    MlflowTracker(mlflow_url, tmp_path / "artifacts").ensure_experiment("other")
    study = make(storage_url=studies_url)
    study.create()
    before = content(mlflow_url), content(studies_url)
    assert len(before[0]) > 20
    assert before[1]["yolosearch_ticket"] == 3

    in_mlflow = make("first", storage_url=mlflow_url)
    swapped = tracked(make("second", storage_url=mlflow_url))
    into_the_study = tracked(make("third", storage_url=f"sqlite:///{tmp_path / 'new.db'}"))
    took = [
        refused(in_mlflow, None, "belongs to MLflow, nothing was written"),
        refused(swapped, studies_url, "holds the tables of a study, nothing was written"),
        refused(into_the_study, studies_url, "holds the tables of a study, nothing was written"),
    ]

    print(f"{backend}: refused after {took} s, the start of the program included")
    assert (content(mlflow_url), content(studies_url)) == before
    assert not (tmp_path / "new.db").exists()


def refused(study: TinyStudy, tracking: str | None, line: str) -> float:
    """The whole program on a study's file ends with 2 and one line; seconds that it took."""
    began = time.monotonic()
    process = study.start("run", env={} if tracking is None else {"MLFLOW_TRACKING_URI": tracking})
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert line in output
    assert "Traceback" not in output
    return round(time.monotonic() - began, 1)
