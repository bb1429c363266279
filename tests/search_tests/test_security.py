"""TLS to the database, a login to MLflow, and passwords that nobody sees."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from secure import PASSWORD, SecurePostgres, secure_postgres
from tiny import NAME, TinyStudy, make_study

from search.cli import _MaskingHandler
from search.database import mask_url, wait_until_ready
from search.doctor import Surroundings, examine
from search.errors import DatabaseError
from search.launch.mlflow_ui import DEFAULT_HOST, MlflowUi, choose_port, server_command, server_environment
from search.ledger.facts import database_facts
from search.tracking import TrackingLoginError, mask_secrets, open_tracker, probe_store

LOGIN = "right-horse-battery"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PG", "MLFLOW_", "YOLOSEARCH_")) and name != "YOLOSEARCH_FIXTURES":
            monkeypatch.delenv(name)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


# ---- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[SecurePostgres]:
    with secure_postgres() as running:
        yield running


def test_tls_parameters_in_the_url_reach_every_connection_of_a_study(
    server: SecurePostgres, make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    study = make(storage_url=server.url(sslmode="verify-full", sslrootcert=server.certificate))

    assert study.create()  # the ledger's engine, the locks' and Optuna's: the server takes no other than TLS
    facts = database_facts(study.storage_url)

    assert (facts.encryption or "").startswith("TLSv1.")
    assert not facts.is_local


def test_tls_parameters_in_the_environment_do_too(server: SecurePostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(server.certificate))

    wait_until_ready(server.url(), timeout=0.0)


@pytest.mark.parametrize(
    ("host", "options", "password", "reason"),
    [
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "{other}"}, PASSWORD, "certificate verify failed"),
        ("127.0.0.1", {"sslmode": "verify-full", "sslrootcert": "{own}"}, PASSWORD, "does not match host name"),
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "/nowhere.crt"}, PASSWORD, "/nowhere.crt"),
        ("localhost", {"sslmode": "disable"}, PASSWORD, "no encryption"),
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "{own}"}, "wr0ng-0ne", "authentication failed"),
    ],
)
def test_tls_refused_in_one_line_at_once_without_the_password(
    server: SecurePostgres,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    options: dict[str, str],
    password: str,
    reason: str,
) -> None:
    monkeypatch.setenv("PGPASSWORD", password)
    named = {key: value.format(own=server.certificate, other=server.other) for key, value in options.items()}

    with pytest.raises(DatabaseError) as caught:
        wait_until_ready(server.url(host, **named), timeout=3600.0)

    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert password not in message


def test_doctor_tells_of_tls_and_of_a_wrong_root(
    server: SecurePostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    right = server.url(sslmode="verify-full", sslrootcert=server.certificate)
    wrong = server.url(sslmode="verify-full", sslrootcert=server.other)

    fine = {item.name: item for item in examine(Surroundings(runs_dir=tmp_path, storage_url=right, study=None))}
    bad = {item.name: item for item in examine(Surroundings(runs_dir=tmp_path, storage_url=wrong, study=None))}

    assert (fine["database"].level, fine["encryption"].level) == ("ok", "ok")
    assert "TLSv1." in fine["encryption"].detail
    assert abs(float(fine["clock"].detail.split()[0])) < 2
    assert bad["database"].level == "fail"
    assert "sslrootcert" in bad["database"].remedy
    assert PASSWORD not in repr(fine) + repr(bad)


# ---- MLflow's login --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that wants a login."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    folder = tmp_path_factory.mktemp("login")
    settings = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{folder / 'auth.db'}",
        "admin_username": "keeper",
        "admin_password": LOGIN,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    (folder / "auth.ini").write_text("[mlflow]\n" + "".join(f"{key} = {text}\n" for key, text in settings.items()))
    port = choose_port(DEFAULT_HOST, 0)
    command = [*server_command(DEFAULT_HOST, port, folder / "artifacts"), "--app-name", "basic-auth"]
    environment = server_environment(f"sqlite:///{folder / 'mlflow.db'}", os.environ)
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
    environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "only-for-this-test"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    with MlflowUi(process, DEFAULT_HOST, port, folder / "log") as server:
        server.wait_until_healthy()
        yield server.address


@pytest.mark.slow
def test_mlflow_login_right_one_records_and_wrong_one_is_told_in_one_line(
    guarded_mlflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "keeper")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", LOGIN)
    tracker = open_tracker(enabled=True, uri=guarded_mlflow, runs_dir=tmp_path)

    run = tracker.ensure_trial_run("guarded", "0", "trial-00000", {"box": 0.05}, {"password": f"is {LOGIN}"})
    tracker.log_epochs(run, [(0, {"fitness": 0.5}, 1_700_000_000.0)])
    tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n"})
    assert probe_store(guarded_mlflow).startswith(guarded_mlflow)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wr0ng-0ne")

    with pytest.raises(TrackingLoginError) as caught:
        tracker.log_epochs(run, [(1, {"fitness": 0.6}, 1_700_000_001.0)])
    with pytest.raises(TrackingLoginError):
        probe_store(guarded_mlflow)

    assert str(caught.value) == (
        f"MLflow at {guarded_mlflow} refuses the login (401): set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD to a user that it knows"
    )
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", LOGIN)
    data = MlflowClient(guarded_mlflow).get_run(run).data
    assert (data.metrics["fitness"], data.tags["password"]) == (0.5, "is ***")


@pytest.mark.slow
def test_mlflow_wrong_login_training_goes_on_and_the_next_worker_completes_the_records(
    guarded_mlflow: str,
    make: Callable[..., TinyStudy],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = make(trials=1, train={"epochs": 1}, tracking={"enabled": True, "uri": guarded_mlflow})
    study.create()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "keeper")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wr0ng-0ne")

    assert study.work() == 1
    assert "refuses the login (401)" in caplog.text
    assert "wr0ng-0ne" not in caplog.text
    assert study.ledger.unmirrored(NAME)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", LOGIN)
    study.work("later")

    assert not study.ledger.unmirrored(NAME)


# ---- masking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://store.example/x?token=abc123&v=1", "https://store.example/x?token=***&v=1"),
        ("s3 says api_key=abc123 is bad", "s3 says api_key=*** is bad"),
        (
            "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=aBc+/123==",
            "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=***",
        ),
        ("a connection of AccountKey=aBc+/12==;EndpointSuffix=x failed", "a connection of AccountKey=*** failed"),
        ("SharedAccessSignature=sv=2024&sig=aBc%2F failed", "SharedAccessSignature=***&sig=*** failed"),
        ("https://me.blob.example/c/f?sv=2024&sig=aBc%2F&se=5", "https://me.blob.example/c/f?sv=2024&sig=***&se=5"),
        ("abfs says account_key=abc123 is bad", "abfs says account_key=*** is bad"),
        ("a token is a word, and so is password", "a token is a word, and so is password"),
    ],
)
def test_mask_url_tokens_are_hidden_and_words_are_not(text: str, shown: str) -> None:
    assert mask_url(text) == shown


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS_TOKEN",
        "MLFLOW_TRACKING_TOKEN",
        "PGPASSWORD",
        "POSTGRES_PASSWORD",
        "RAY_AUTH_TOKEN",
    ],
)
def test_mask_secrets_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "s3cr3t-value")

    assert mask_secrets("it said s3cr3t-value twice: s3cr3t-value") == "it said *** twice: ***"


def test_log_records_and_their_tracebacks_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "s3cr3t-value")
    handler = _MaskingHandler()
    try:
        raise ValueError("postgresql://me:p4ssw0rd@db/studies")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "with %s", ("s3cr3t-value",), sys.exc_info())

    text = handler.format(record)

    assert "with ***" in text
    assert "postgresql://me:***@db/studies" in text
    assert "s3cr3t" not in text + repr(handler)
    assert "p4ssw0rd" not in text


def test_uncaught_error_of_a_command_is_masked(tmp_path: Path) -> None:
    script = (
        "import search.cli, sys; sys.argv = ['yolosearch', 'list']\n"
        "def fail(): raise RuntimeError('postgresql://me:p4ssw0rd@db/studies')\n"
        "search.cli.app = fail; search.cli.main()"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 1
    assert "RuntimeError: postgresql://me:***@db/studies" in done.stderr
    # The line of source that a traceback quotes is the program's own, not what it was given.
    assert "p4ssw0rd" not in done.stderr


def test_stored_study_has_no_password_of_the_environment(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p4ssw0rd@127.0.0.1:9")
    monkeypatch.setenv("PGPASSWORD", "s3cr3t-value")
    study = make(tracking={"enabled": True})
    study.create()

    stored = b"".join(path.read_bytes() for path in study.runs.rglob("study.db*"))

    assert b"fingerprint" in stored
    assert b"p4ssw0rd" not in stored
    assert b"s3cr3t-value" not in stored
