"""`dashboard`: optuna-dashboard on a real study, and what it refuses."""

import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from tiny import NAME, TinyStudy, make_study

from search.cli import main
from search.dashboard import Dashboard


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """A study that nobody has begun."""
    made = make_study(tmp_path_factory.mktemp("dashboard") / "study", tmp_path_factory.getbasetemp())
    made.create()
    return made


@pytest.fixture(scope="module")
def address(study: TinyStudy) -> Iterator[str]:
    pytest.importorskip("optuna_dashboard", reason="needs the extra dashboard")
    server = Dashboard.bind(study.storage_url, NAME, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server.address
    server.close()
    thread.join()


def ask(address: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    headers = {} if host is None else {"Host": host}
    request = urllib.request.Request(address, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_dashboard_shows_the_study(address: str) -> None:
    page, api = ask(address), ask(address.replace("/dashboard/", "/api/"))

    assert (page[0], api[0]) == (200, 200)
    assert "<html" in page[1].lower()
    assert f'"name": "{NAME}"' in api[1]


def test_dashboard_refuses_whatever_would_change_the_study(address: str, study: TinyStudy) -> None:
    code, reason = ask(address.replace("/dashboard/", "/api/"), "DELETE")

    assert (code, reason) == (405, '{"reason": "yolosearch shows this study read-only"}')
    assert len(study.optuna_trials()) == 1


def test_dashboard_refuses_a_foreign_name_that_leads_here(address: str) -> None:
    assert ask(address, host="evil.example:8080")[0] == 403
    assert ask(address, host="localhost:8080")[0] == 200


def test_dashboard_command_prints_where_it_is_and_a_signal_ends_it(study: TinyStudy) -> None:
    pytest.importorskip("optuna_dashboard", reason="needs the extra dashboard")
    process = study.start("dashboard", env={"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()

    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=60) == 130
    assert line.startswith("optuna-dashboard: http://127.0.0.1:")
    assert "Traceback" not in process.stdout.read()


def test_dashboard_not_installed_says_how_to(
    study: TinyStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    monkeypatch.setattr(sys, "argv", ["yolosearch", "dashboard", NAME, "--storage", study.storage_url])

    with pytest.raises(SystemExit) as caught:
        main()

    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("optuna-dashboard is not installed; allowed: pip install")
    assert error.count("\n") == 1
