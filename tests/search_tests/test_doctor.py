"""`doctor` on real hosts, files and databases: what is well, and what it says to do where it is not."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from tiny import NAME, TinyStudy, make_study

from search import doctor
from search.doctor import Finding, Surroundings, examine


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL", "YOLOSEARCH_RUNS_DIR", "YOLOSEARCH_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


def findings(tiny: TinyStudy, **changes: object) -> dict[str, Finding]:
    around = {"runs_dir": tiny.runs, "storage_url": tiny.storage_url, "study": NAME, **changes}
    return {finding.name: finding for finding in examine(Surroundings(**around))}  # type: ignore[arg-type]


def test_examine_sound_study_on_each_backend_all_is_well(make: Callable[..., TinyStudy], storage_url: str) -> None:
    study = make(storage_url=storage_url)
    study.create()

    found = findings(study)

    assert {name for name, finding in found.items() if finding.level == "fail"} == set()
    names = ["python", "torch", "memory", "shared memory", "runs folder", "temporary files", "database", "schema"]
    assert [*found][:8] == [*names[:2], *([] if "cuda" not in found else ["cuda"]), *names[2:]][:8]
    product = "PostgreSQL" if storage_url.startswith("postgresql") else "SQLite"
    assert found["database"].detail.startswith(f"{product} ")
    assert found["schema"].detail.endswith(", this version's")
    assert found["study"].detail == "tiny: 3 waiting"
    assert "fingerprint" in found["data"].detail
    assert found["MLflow"].detail == "off in this study"
    assert not any(study.runs.glob("doctor-*"))


def test_examine_one_class_for_all_has_the_studys_fingerprint(make: Callable[..., TinyStudy]) -> None:
    study = make(space={"box": {"low": 0.02, "high": 0.2}}, train={"single_cls": True})
    study.create()

    assert findings(study)["data"].level == "ok"


def test_examine_study_file_before_it_is_created_says_how(make: Callable[..., TinyStudy], storage_url: str) -> None:
    study = make(storage_url=storage_url)

    found = findings(study, planned=study.config)

    assert (found["study"].level, found["study"].detail) == ("ok", "tiny: not created yet")
    assert "yolosearch create" in found["study"].remedy
    assert found["data"].detail.startswith(f"{study.data}, fingerprint ")
    assert {name for name, finding in found.items() if finding.level == "fail"} == set()


def test_examine_study_that_cannot_be_compiled_here_fails(make: Callable[..., TinyStudy]) -> None:
    study = make(train={"compile": "cudagraphs", "device": "auto"})
    study.create()

    compiler = findings(study)["compile"]

    assert (compiler.level, compiler.detail.split(": ")[0]) == ("fail", "compile 'cudagraphs' on cpu")


def test_examine_study_file_with_the_database_away_still_looks_where_it_records(
    make: Callable[..., TinyStudy],
) -> None:
    study = make()

    found = findings(study, planned=study.config, storage_url="postgresql://127.0.0.1:9/studies")

    assert found["database"].level == "fail"
    assert found["MLflow"].detail == "off in this study"


def test_examine_changed_data_fails_with_both_fingerprints(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    (study.data.parent / "labels" / "train" / "00000.txt").write_text("0 0.5 0.5 0.3 0.3\n")

    data = findings(study)["data"]

    assert data.level == "fail"
    assert study.ledger.study(NAME).fingerprint in data.detail
    assert "YOLOSEARCH_DATA_ROOT" in data.remedy


def test_examine_stopped_study_warns_with_the_reason(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    study.ledger.stop(NAME, "5 trials in a row failed: out of memory")

    found = findings(study)["study"]

    assert (found.level, found.detail) == ("warn", "tiny stopped: 5 trials in a row failed: out of memory")


def test_examine_unknown_study_fails_and_the_rest_is_looked_at(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()

    found = findings(study, study="tinny")

    assert found["study"].level == "fail"
    assert "tiny" in found["study"].detail
    assert found["checkpoints"].level == "ok"


def test_examine_database_of_mlflow_fails(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with sa.create_engine(uri).begin() as connection:  # by these two tables it is known
        for table in ("experiments", "runs"):
            connection.execute(sa.text(f"CREATE TABLE {table} (name TEXT)"))

    found = {item.name: item for item in examine(Surroundings(runs_dir=tmp_path, storage_url=uri, study=None))}

    assert (found["schema"].level, found["schema"].detail) == ("fail", "the tables are MLflow's")
    assert "search_path" in found["schema"].remedy


def test_examine_mlflow_on_the_studies_database_fails(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(tracking={"enabled": True})
    study.create()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.storage_url)

    found = findings(study)["MLflow"]

    assert found.level == "fail"
    assert "MLflow needs a database (PostgreSQL: or schema) of its own" in found.detail


def test_examine_servers_that_are_away_fail_without_their_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p4ssw0rd@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    url = "postgresql://me:p4ssw0rd@127.0.0.1:9/db?connect_timeout=1"

    found = {item.name: item for item in examine(Surroundings(runs_dir=tmp_path, storage_url=url, study=None))}

    assert (found["database"].level, found["MLflow"].level) == ("fail", "fail")
    assert "--storage" in found["database"].remedy
    assert "p4ssw0rd" not in repr(found)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_examine_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    found = {item.name: item for item in examine(Surroundings(runs_dir=tmp_path / "r", storage_url=None, study=None))}

    assert found["runs folder"].level == found["checkpoints"].level == "fail"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_examine_folders_that_do_not_exist_are_not_left_behind(tmp_path: Path, scheme: str) -> None:
    around = Surroundings(
        runs_dir=tmp_path / "runs", storage_url=None, study=None, checkpoints=f"{scheme}{tmp_path / 'a' / 'b'}"
    )

    found = {item.name: item for item in examine(around)}

    assert found["checkpoints"].level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_examine_limits_decide_between_ok_warn_and_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    around = Surroundings(runs_dir=tmp_path, storage_url=None, study=None)
    # No disk is that large: the same free space is too little then.
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1e24)
    monkeypatch.setattr(doctor, "LOW_MEMORY_BYTES", 1e24)
    low = {item.name: item for item in examine(around)}
    monkeypatch.setattr(doctor, "FULL_DISK_BYTES", 1e24)
    full = {item.name: item for item in examine(around)}

    assert (low["runs folder"].level, low["memory"].level) == ("warn", "warn")
    assert "yolosearch clean" in low["runs folder"].remedy
    assert full["runs folder"].level == "fail"


def test_examine_database_clock_that_differs_warns(
    make: Callable[..., TinyStudy], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(storage_url=postgres_url)
    study.create()
    monkeypatch.setattr("search.ledger.facts.time", SimpleNamespace(time=lambda: time.time() - 3600.0))

    found = findings(study)["clock"]

    assert (found.level, found.detail) == ("warn", "the database's is +3600.0 s from this host's")
    assert "NTP" in found.remedy


def test_examine_old_schema_warns(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    with sa.create_engine(study.storage_url).begin() as connection:
        connection.execute(sa.text("UPDATE yolosearch_alembic_version SET version_num = '0001'"))

    found = findings(study)

    assert found["schema"].level == found["study"].level == "warn"
    assert "0001, of an older yolosearch" in found["schema"].detail
    assert "data" not in found


def test_finding_json_has_every_field() -> None:
    finding = Finding(level="warn", name="memory", detail="1.0 GB free", remedy="end other programs")

    assert json.loads(json.dumps(finding.to_json())) == {
        "level": "warn",
        "name": "memory",
        "detail": "1.0 GB free",
        "remedy": "end other programs",
    }
