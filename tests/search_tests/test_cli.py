"""The command line: exit codes, one-line errors, JSON, and `run` from its start to its end, whatever dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from optuna.trial import TrialState
from test_config import BROKEN as BROKEN_STUDIES
from test_config import GOOD
from tiny import NAME, TinyStudy, make_study, wait_for
from typer.main import get_command

from search import cli_confirm, cli_dashboard, cli_doctor, cli_import, cli_init, cli_launch, cli_studies, cli_watch
from search.cli import PANELS, app, main
from search.ledger import TicketState, WorkerState
from yolocore.hyperparameters import Hyperparameters

COMMANDS = [
    "init",
    "schema",
    "dashboard",
    "check",
    "create",
    "run",
    "launch",
    "worker",
    "watch",
    "status",
    "trials",
    "export",
    "ui",
]
COMMANDS += ["import", "noise", "confirm", "doctor", "list", "clone", "retry", "clean", "delete"]


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL", "YOLOSEARCH_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def yolosearch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["yolosearch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_command(yolosearch: Command) -> None:
    result = yolosearch("--help")

    assert result.code == 0
    apps = (
        app,
        cli_confirm.app,
        cli_dashboard.app,
        cli_doctor.app,
        cli_import.app,
        cli_init.app,
        cli_launch.app,
        cli_studies.app,
        cli_watch.app,
    )
    registered = [command for part in apps for command in part.registered_commands]
    names = sorted(info.name or info.callback.__name__ for info in registered if info.callback)
    assert names == sorted(COMMANDS)
    assert all(re.search(rf"^\s+{command}\s", result.out, re.MULTILINE) for command in COMMANDS)


def test_help_shows_every_command_once_under_a_heading(yolosearch: Command) -> None:
    listed = [name for names in PANELS.values() for name in names]
    result = yolosearch("--help")

    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]
    assert re.findall(r"^(\w[\w ]*):$", result.out, re.MULTILINE) == ["Options", *PANELS]
    assert re.findall(r"^  ([a-z]+) ", result.out.partition("Begin:")[2], re.MULTILINE) == listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(yolosearch: Command, command: str) -> None:
    result = yolosearch(command, "--help")

    assert result.code == 0
    assert re.search(rf"Example: .*yolosearch {command}\b", result.out)


@pytest.mark.parametrize(
    "command", sorted({*COMMANDS} - {"init", "schema", "dashboard", "create", "worker", "ui", "clone", "retry"})
)
def test_help_json_is_offered(yolosearch: Command, command: str) -> None:
    assert "--json" in yolosearch(command, "--help").out


# ---- what a user gives and is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", BROKEN_STUDIES, ids=[row[1] for row in BROKEN_STUDIES])
def test_check_broken_study_one_line_with_file_key_value_and_allowed(
    yolosearch: Command, tmp_path: Path, row: tuple[str, str, int, str, str, str]
) -> None:
    old, new, line, key, found, allowed = row
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    (tmp_path / "hyp.yaml").write_text("box: 0.1\n")
    (tmp_path / "bad.yaml").write_text("box: much\n")
    file = tmp_path / "study.yaml"
    file.write_text(GOOD.replace(old, new))

    result = yolosearch("check", file, "--runs-dir", tmp_path / "runs")

    assert (result.code, result.out) == (2, "")
    message = result.err.removesuffix("\n")
    assert "\n" not in message
    assert message.startswith(f"{file}:{line}: {key}: ")
    assert found in message.partition("; allowed: ")[0]
    assert allowed in message.partition("; allowed: ")[2]
    assert not (tmp_path / "runs").exists()


def data_yaml(folder: Path, **changes: Any) -> None:
    document = {**yaml.safe_load((folder / "digits.yaml").read_text()), **changes}
    kept = {key: value for key, value in document.items() if value is not None}
    (folder / "digits.yaml").write_text(yaml.safe_dump(kept))


def label(folder: Path, text: str) -> None:
    (folder / "labels" / "train" / "00002.txt").write_text(text)


BROKEN_DATA: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no YAML": (lambda f: (f / "digits.yaml").write_text("train: [a\nval: b\n"), ("digits.yaml:2", "not valid YAML")),
    "no val": (lambda f: data_yaml(f, val=None), ("digits.yaml: val", "train, val and names")),
    "train is a number": (lambda f: data_yaml(f, train=3), ("digits.yaml: train", "found 3", "a list file")),
    "no root": (lambda f: data_yaml(f, path="nowhere"), ("digits.yaml: path", "'nowhere'", "folder")),
    "no split folder": (lambda f: data_yaml(f, val="images/vla"), ("digits.yaml: val", "'images/vla'", "not exist")),
    "names with a gap": (lambda f: data_yaml(f, names={0: "a", 2: "b"}), ("digits.yaml: names", "[0, 2]", "0 to 1")),
    "name twice": (lambda f: data_yaml(f, names=["a", "a"]), ("digits.yaml: names", "'a'", "more than once")),
    "nc differs": (lambda f: data_yaml(f, nc=3), ("digits.yaml: nc", "3", "2 entries")),
    "class too high": (lambda f: label(f, "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n"), ("00002.txt:2", "class 7", "0 to 1")),
    "pixels": (lambda f: label(f, "0 15 10 4 4\n"), ("labels/train/00002.txt:1", "x is 15", "0 to 1")),
    "four columns": (lambda f: label(f, "0 .5 .5 .2\n"), ("00002.txt:1", "4 values", "class x y w h")),
    "words": (lambda f: label(f, "cat .5 .5 .2 .2\n"), ("00002.txt:1", "'cat'", "class x y w h")),
    "image is cut off": (
        lambda f: (f / "images" / "val" / "00001.png").write_bytes(b"\x89PNG"),
        ("images/val/00001.png", "cannot decode", "png"),
    ),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
@pytest.mark.parametrize("command", ["check", "run"])
def test_broken_data_one_line_with_place_value_and_allowed(
    yolosearch: Command, make: Callable[..., TinyStudy], case: str, command: str
) -> None:
    study = make()
    spoil, expected = BROKEN_DATA[case]
    spoil(study.data.parent)

    result = yolosearch(command, study.file, "--runs-dir", study.runs)

    assert (result.code, result.out) == (2, "")
    message = result.err.removesuffix("\n")
    assert "\n" not in message
    assert message.startswith(str(study.data.parent))
    for part in expected:
        assert part in message
    assert not study.runs.exists()


def test_check_objective_of_a_class_that_the_data_has_not(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make(objective="class_ap:digit 00")

    result = yolosearch("check", study.file, "--runs-dir", study.runs)

    assert result.code == 2
    assert "digit 00: no class of the data set, did you mean digit 0?" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "{file}", "--trials", "20"], "--trials: got '20'; allowed: +N, for example +20"),
        (["run", "{file}", "--trials", "+0"], "--trials: got '+0'; allowed: +N"),
        (["run", "{file}", "--workers", "0"], "--workers"),
        (["run", "{file}", "--storage", "mysql://host/db"], "'mysql' in 'mysql://host/db'; allowed: sqlite:///PATH"),
        (["check", "{folder}/none.yaml"], "none.yaml: no such study file; allowed: "),
        (["status", "../up"], "study name '../up' is not allowed: 1 to 128 of"),
        (["statsu", "tiny"], "statsu"),
    ],
)
def test_wrong_words_exit_2_and_say_what_is_allowed(
    yolosearch: Command, make: Callable[..., TinyStudy], words: list[str], message: str
) -> None:
    study = make()

    result = yolosearch(*(word.format(file=study.file, folder=study.folder) for word in words))

    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["status", "trials", "export", "worker", "ui"])
def test_unknown_study_exit_2_and_nothing_is_created(yolosearch: Command, tmp_path: Path, command: str) -> None:
    result = yolosearch(command, "nosuch", "--runs-dir", tmp_path / "runs")

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"study nosuch: no database {tmp_path}/runs/nosuch/study.db; allowed: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["status", "worker"])
def test_unknown_study_in_a_database_names_those_that_exist(
    yolosearch: Command, make: Callable[..., TinyStudy], command: str
) -> None:
    study = make()
    study.create()

    result = yolosearch(command, "tinny", "--storage", study.storage_url, "--runs-dir", study.runs)

    assert result.code == 2
    assert "tinny" in result.err
    assert "tiny" in result.err.replace("tinny", "")


@pytest.mark.parametrize("command", ["status", "export", "worker"])
def test_empty_postgresql_database_exit_2(
    yolosearch: Command, monkeypatch: pytest.MonkeyPatch, postgres_url: str, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("YOLOSEARCH_STORAGE_URL", postgres_url)

    result = yolosearch(command, "nosuch", "--runs-dir", tmp_path)

    assert result.code == 2
    assert "holds no studies; allowed: " in result.err


@pytest.mark.parametrize("words", [["status", "tiny"], ["worker", "tiny"], ["check", "{file}"], ["run", "{file}"]])
def test_password_of_the_database_is_never_shown(
    yolosearch: Command, make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    study = make()
    monkeypatch.setattr("search.database.wait_until_ready.__defaults__", (0.5,))
    monkeypatch.setenv("YOLOSEARCH_STORAGE_URL", "postgresql://me:p4ssw0rd@127.0.0.1:9/db?connect_timeout=1")

    result = yolosearch(*(word.format(file=study.file) for word in words), "--runs-dir", study.runs)

    assert "p4ssw0rd" not in result.out + result.err
    assert "me:***@127.0.0.1:9" in result.out + result.err
    assert "Traceback" not in result.err


def test_runs_folder_that_cannot_be_made_exit_2(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make()
    (study.folder / "file").write_text("")

    result = yolosearch("run", study.file, "--runs-dir", study.folder / "file" / "runs")

    assert result.code == 2
    assert result.err == (
        f"{study.folder}/file/runs/tiny: the folder cannot be created: Not a directory; "
        "allowed: a path in a writable folder\n"
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_check_prints_the_plan_and_starts_nothing(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make()

    text = yolosearch("check", study.file, "--runs-dir", study.runs)
    plan = json.loads(yolosearch("check", study.file, "--runs-dir", study.runs, "--json").out)

    assert text.code == 0
    assert "yolov5n, 64 px, batch 8, 2 epochs" in text.out
    assert (plan["study"], plan["images"], plan["base"]) == (NAME, {"train": 16, "val": 8}, {"box": 0.05, "cls": 0.5})
    assert plan["storage"] == study.storage_url
    assert "cost             3 trainings (6 slot-epochs)" in text.out
    assert (plan["forecast"]["slot_epochs"], plan["forecast"]["speed"]) == (6, None)
    assert not study.runs.exists()


def test_check_says_that_sqlite_is_for_the_workers_of_one_host(
    yolosearch: Command, make: Callable[..., TinyStudy], storage_url: str
) -> None:
    study = make()

    result = yolosearch("check", study.file, "--runs-dir", study.runs, "--storage", storage_url)

    (line,) = [line for line in result.out.splitlines() if line.split()[:1] == ["database"]]
    assert result.code == 0
    assert line.endswith(" (for workers of this host only)") is storage_url.startswith("sqlite:")


def test_status_and_trials_json_parse_and_agree(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    where = ("--runs-dir", study.runs, "--json")

    status = json.loads(yolosearch("status", NAME, *where).out)
    trials = json.loads(yolosearch("trials", study.file, *where).out)

    assert status["counts"]["WAITING"] == 3
    assert status["trials"] == trials
    assert status["short_against_full"] == {"trials": 0, "epochs": 2, "enough_epochs": None, "by_epoch": []}
    assert status["confirmation"] is None
    assert trials[0]["params"] == {"box": 0.05, "cls": 0.5}
    assert "3 waiting" in yolosearch("status", NAME, "--runs-dir", study.runs).out
    assert "base 0" in yolosearch("trials", NAME, "--runs-dir", study.runs).out


def test_status_does_not_import_torch_or_optuna(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    script = (
        "import sys; from search.cli import app; "
        f"app(['status', '{NAME}', '--runs-dir', '{study.runs}', '--json'], standalone_mode=False); "
        "print(sorted({'torch', 'optuna', 'mlflow', 'sklearn'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["counts"]["WAITING"] == 3
    assert done.stderr.strip() == "[]"


def test_export_writes_the_best_trial(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1)
    study.create()
    where = ("--runs-dir", study.runs)
    early = yolosearch("export", NAME, *where)
    ticket = study.ledger.claim(NAME, "here", 1, 60.0)[0]
    study.ledger.finish(ticket, TicketState.COMPLETE, 0.5, None, 1)

    told = json.loads(yolosearch("export", NAME, *where, "--json").out)
    named = yolosearch("export", NAME, *where, "-o", study.folder / "mine.yaml")

    assert early.code == 2
    without = yolosearch("export", NAME, *where, "--weights", study.folder / "best.pt")

    assert "none of 1 trials is complete" in early.err
    assert (without.code, "no weights of trial 0 are in" in without.err) == (2, True)
    assert told == {"study": NAME, "path": str(study.runs / NAME / "hyp.best.yaml"), "trial": 0, "verdict": None}
    assert Hyperparameters.from_yaml(Path(told["path"])).box == 0.05
    assert named.out == f"best hyp: {study.folder}/mine.yaml\n"
    assert Hyperparameters.from_yaml(study.folder / "mine.yaml").mosaic == 0
    document = json.loads(yolosearch("export", NAME, *where, "--format", "json", "--json").out)
    assert json.loads(Path(document["path"]).read_text())["hyp"]["mosaic"] == 0
    refused = yolosearch("export", NAME, *where, "--format", "ultralytics")
    assert (refused.code, "nothing that it searched carries over (box: " in refused.err) == (2, True)
    assert sorted(path.name for path in (study.runs / NAME).glob("hyp.*")) == ["hyp.best.json", "hyp.best.yaml"]


def test_doctor_prints_lines_or_json_and_exit_1_if_anything_fails(
    yolosearch: Command, make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make()
    study.create()
    where = ("--runs-dir", study.runs)

    text, told = yolosearch("doctor", NAME, *where), yolosearch("doctor", NAME, *where, "--json")
    monkeypatch.setenv("YOLOSEARCH_DATA_ROOT", str(study.folder / "nowhere"))
    study.data.unlink()
    failed = yolosearch("doctor", NAME, *where)

    assert (text.code, told.code, failed.code) == (0, 0, 1)
    assert re.search(r"^ok   study            tiny: 3 waiting$", text.out, re.MULTILINE)
    assert {"level", "name", "detail", "remedy"} == set(json.loads(told.out)[0])
    assert re.search(r"^fail data +YOLOSEARCH_DATA_ROOT: .*/nowhere holds nothing of ", failed.out, re.MULTILINE)


# ---- run -------------------------------------------------------------------------------------------------------------


def test_run_changed_settings_exit_2_naming_the_keys(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    study.write(train={"epochs": 3})

    result = yolosearch("run", study.file, "--runs-dir", study.runs)

    assert result.code == 2
    assert result.err.startswith("study tiny: train.epochs: got 3, the database has 2; allowed: ")


@pytest.mark.slow
def test_run_failures_in_a_row_exit_3_with_the_reason_and_the_way_on(
    yolosearch: Command, make: Callable[..., TinyStudy]
) -> None:
    study = make(trials=1, max_failures_in_a_row=1)
    study.create()
    ticket = study.ledger.claim(NAME, "here", 1, 600.0)[0]
    # `run` lets a stopped study go on, so the failure has to come after its start: its worker waits for the ticket.
    first = study.start("run")
    wait_for(lambda: len(study.ledger.workers(NAME)) == 1, first)
    study.ledger.finish(ticket, TicketState.FAIL, None, "out of memory")
    output, _ = first.communicate(timeout=120)

    assert first.returncode == 3
    assert output.splitlines()[-1] == (
        "study tiny stopped: 1 trials in a row failed: out of memory; `run` takes it up again once that is mended"
    )
    assert yolosearch("worker", NAME, "--runs-dir", study.runs).code == 3


@pytest.mark.slow
def test_worker_study_that_stopped_itself_exit_3_and_0_where_it_is_to_stay_down(
    yolosearch: Command, make: Callable[..., TinyStudy]
) -> None:
    study = make()
    study.create()
    study.ledger.stop(NAME, "enough")
    where = ("--runs-dir", study.runs)

    told = yolosearch("worker", NAME, *where)
    quiet = yolosearch("worker", NAME, "--stay-down", *where)
    unknown = yolosearch("worker", "nosuch", "--stay-down", *where)

    assert (told.code, quiet.code, unknown.code) == (3, 0, 0)
    assert "study 'tiny' was stopped: enough" in told.err
    assert quiet.err == told.err
    assert unknown.err.startswith("study nosuch: no database ")


def assert_whole(study: TinyStudy, count: int) -> None:
    """Exactly `count` finished trials in the ledger, Optuna and MLflow, equal to each other."""
    tickets = study.tickets()
    assert [ticket.number for ticket in tickets] == list(range(count))
    assert {ticket.state for ticket in tickets} == {TicketState.COMPLETE}
    assert sorted(ticket.trial_number or 0 for ticket in tickets) == list(range(count))
    trials = study.optuna_trials()
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(count)]
    runs = study.mlflow_runs()
    assert sorted(runs) == ["summary", *(f"trial-{number:05d}" for number in range(count))]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    reports = study.ledger.all_reports(NAME)
    for ticket in tickets:
        trial = trials[ticket.trial_number or 0]
        curve = [(row.epoch, row.value) for row in reports[ticket.id]]
        assert (trial.value, trial.params) == (ticket.value, ticket.params)
        assert [(step - 1, value) for step, value in sorted(trial.intermediate_values.items())] == curve
        run = runs[f"trial-{ticket.trial_number:05d}"]
        assert study.metric_history(run, "metrics/fitness") == curve


def test_run_killed_midway_and_started_again_ends_with_exactly_its_trials(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=4, train={"epochs": 6})
    first = study.start("run")
    wait_for(lambda: [t.epochs_done >= 2 for t in study.tickets()[:2]] == [True, True], first)
    workers = [worker.pid for worker in study.ledger.workers(NAME)]
    for pid in [first.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    first.communicate()
    assert study.states()[:2] == [TicketState.RUNNING] * 2

    second = study.start("run", "--workers", "2")
    output, _ = second.communicate(timeout=300)

    assert second.returncode == 0, output + study.logs()
    assert_whole(study, 4)
    assert [ticket.attempt for ticket in study.tickets()[:2]] == [2, 2]
    assert len({ticket.worker for ticket in study.tickets()}) == 2
    best = study.runs / NAME / "hyp.best.yaml"
    assert f"best hyp:        {best}" in output
    assert f" run {study.file} --trials +20" in output
    Hyperparameters.from_yaml(best)


@pytest.mark.slow
def test_run_ctrl_c_hands_back_then_a_killed_launcher_does_too(
    make: Callable[..., TinyStudy],
) -> None:
    study = make(tracked=True, trials=2, train={"epochs": 60})
    first = study.start("run")
    wait_for(lambda: [t.epochs_done >= 1 for t in study.tickets()] == [True, True], first)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=60)

    assert first.returncode == 130, output
    assert "stopping: running trials are handed back; the same command takes them up again" in output
    assert study.states() == [TicketState.WAITING] * 2
    runs = study.mlflow_runs()
    assert {runs[name].info.status for name in ("trial-00000", "trial-00001")} == {"SCHEDULED"}

    second = study.start("run")
    wait_for(lambda: [t.attempt for t in study.tickets()] == [2, 2], second)
    second.kill()  # the launcher alone; its worker has a session of its own
    second.communicate()
    for _ in range(600):
        if [worker.state for worker in study.ledger.workers(NAME)] == [WorkerState.EXITED] * 2:
            break
        time.sleep(0.1)
    assert [worker.state for worker in study.ledger.workers(NAME)] == [WorkerState.EXITED] * 2
    assert [(ticket.state, ticket.history) for ticket in study.tickets()] == [(TicketState.WAITING, ())] * 2


def test_run_sigterm_exit_130_and_finished_study_is_only_shown(
    make: Callable[..., TinyStudy], yolosearch: Command
) -> None:
    study = make(trials=1, train={"epochs": 200})
    process = study.start("run")
    wait_for(lambda: study.tickets()[0].epochs_done >= 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    ticket = study.ledger.claim(NAME, "here", 1, 60.0)[0]
    study.ledger.finish(ticket, TicketState.COMPLETE, 0.5, None, 1)
    study.ledger.mark_mirrored(ticket.id)

    result = yolosearch("run", study.file, "--runs-dir", study.runs, "--json")

    assert result.code == 0
    assert json.loads(result.out)["finished"] is True
    assert (study.runs / NAME / "hyp.best.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_worker_two_by_hand_share_a_study(
    make: Callable[..., TinyStudy], request: pytest.FixtureRequest, backend: str
) -> None:
    url = request.getfixturevalue("postgres_url") if backend == "postgresql" else None
    study = make(tracked=True, storage_url=url, trials=8, train={"epochs": 4})
    study.create()

    processes = [study.start("worker") for _ in range(2)]
    outputs = [process.communicate(timeout=500)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_whole(study, 8)
    # Neither took the other, whose name is not on its command line, for dead.
    assert [ticket.attempt for ticket in study.tickets()] == [1] * 8
    assert len({ticket.worker for ticket in study.tickets()}) == 2


# ---- known results ---------------------------------------------------------------------------------------------------


def test_import_takes_files_and_studies_and_says_what_became_of_them(
    yolosearch: Command, make: Callable[..., TinyStudy]
) -> None:
    study, other = make(), make("other", trials=1, train={"epochs": 7})
    study.create()
    other.create()
    ticket = other.ledger.claim(NAME, "here", 1, 60.0)[0]
    other.ledger.finish(ticket, TicketState.COMPLETE, 0.5, None, 1)
    hyp = study.folder / "mine.yaml"
    hyp.write_text("box: 0.5\nlr0: 0.02\nanchors: 3\n")
    where = ("--runs-dir", study.runs)

    text = yolosearch("import", NAME, hyp, *where)
    told = json.loads(yolosearch("import", NAME, hyp, "--trials", "+2", "--json", *where).out)
    theirs = yolosearch("import", NAME, NAME, "--from-storage", other.storage_url, *where)
    itself = yolosearch("import", NAME, NAME, *where)
    missing = yolosearch("import", NAME, study.folder / "none.csv", *where)

    assert text.code == 0
    assert f"{hyp}: hyp YAML, to be tried as trial 1\n" in text.out
    assert "note: anchors left out" in text.out
    assert "box 0.5 is outside the study's range (0.02 to 0.2, logarithmic): 0.2" in text.out
    assert "left as in the base: lr0 0.02 (here 0.01)" in text.out
    assert study.tickets()[1].fixed_params == {"box": 0.2, "cls": 0.5}
    assert (told[0]["queued"], len(study.tickets())) == ({}, 5)
    assert "the study has this trial already" in " ".join(told[0]["notes"])
    assert "its values do not count here, where train.epochs differ" in theirs.out
    assert (itself.code, "is the study itself" in itself.err) == (2, True)
    assert (missing.code, "none.csv: cannot be read: No such file" in missing.err) == (2, True)


# ---- looking after studies -------------------------------------------------------------------------------------------


def test_clone_written_file_is_a_study_that_check_accepts(
    yolosearch: Command, make: Callable[..., TinyStudy], tmp_path: Path
) -> None:
    study, target = make(), tmp_path / "copy.yaml"
    study.create()
    words = ["clone", NAME, "copy", "-o", target, "--runs-dir", study.runs]

    assert yolosearch(*words).code == 0
    assert yolosearch("check", target, "--runs-dir", study.runs).code == 0
    again = yolosearch(*words)
    assert (again.code, again.err.strip()) == (2, f"{target}: File exists")


def test_list_clean_retry_and_delete_tell_what_they_did(yolosearch: Command, make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    where = ("--runs-dir", study.runs)

    assert json.loads(yolosearch("list", "--json", *where).out)[0]["counts"]["WAITING"] == 3
    assert json.loads(yolosearch("clean", NAME, "--json", *where).out)["checkpoints"] == 0
    assert "no failed trial to retry" in yolosearch("retry", NAME, *where).out
    assert json.loads(yolosearch("delete", NAME, "--json", *where).out)["trials"] == 3
    assert yolosearch("status", NAME, *where).code == 2
