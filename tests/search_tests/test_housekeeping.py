"""Studies listed, cloned, deleted, cleaned up after, and their failed trials retried."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
import torch

from search.checkpoints import CheckpointStore
from search.config import StudyConfig, load_study_config, parse_study
from search.database import default_storage_url, make_engine
from search.errors import StudyConflictError, UnknownStudyError, UserInputError
from search.housekeeping import (
    clean,
    clone,
    delete,
    list_databases,
    list_studies,
    remove_temporary_files,
    retry,
    study_databases,
    study_yaml,
)
from search.ledger import Ledger, StudyRecord, Ticket, TicketState
from search.paths import StudyFolder
from search.study import ask, create_study, load_study, open_storage, tell
from search.weights import WeightsStore
from search.worker.host import process_identity

SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}}
HOUR = 3600.0


def study_config(name: str = "s", **changes: Any) -> StudyConfig:
    document = {"name": name, "data": "builtin:digits", "train": {"epochs": 9}, "space": SPACE, "trials": 4}
    return parse_study({**document, **changes}, source="study.yaml")


@dataclass(frozen=True)
class House:
    """A database and a runs folder."""

    storage_url: str
    runs: Path

    @property
    def ledger(self) -> Ledger:
        return Ledger(make_engine(self.storage_url))

    def create(self, name: str = "s", created: float = 1.0, **changes: Any) -> StudyConfig:
        """A study as `run` creates it, with files of every kind in its folder."""
        config = study_config(name, **changes)
        self.ledger.initialise()
        base = create_study(config, open_storage(self.storage_url))
        record = StudyRecord(name=name, config=config.to_json(), fingerprint="f", versions={}, created=created)
        self.ledger.create_study(record, [base.params, None, None, None], base)
        folder = self.folder(name)
        for path in (folder.log("w"), folder.best_hyp):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0123456789")
        for number in range(4):
            self.store(name).save(number, 1, 2, {"epoch": 2})
            self.weights(name).save(number, 1, 2, {"model.0.conv.weight": torch.ones(2)})
        return config

    def folder(self, name: str = "s") -> StudyFolder:
        return StudyFolder(self.runs, name)

    def store(self, name: str = "s") -> CheckpointStore:
        return CheckpointStore(self.runs, name)

    def weights(self, name: str = "s") -> WeightsStore:
        return WeightsStore.open(self.runs, name)

    def has_weights(self, *numbers: int) -> list[bool]:
        return [bool(self.weights().files(number)) for number in numbers]

    def claim(self, name: str = "s", lease: float = 60.0, worker: str = "w") -> Ticket:
        (ticket,) = self.ledger.claim(name, worker, 1, lease)
        return ticket

    def end(self, *values: float | None, name: str = "s") -> None:
        """Ends the next trials: COMPLETE with a value, FAIL with None."""
        for value in values:
            ticket = self.claim(name)
            if ticket.trial_id is None:
                ticket = self.ledger.link_trial(ticket, 100 + ticket.number, ticket.number, {"box": 0.1})
            state = TicketState.FAIL if value is None else TicketState.COMPLETE
            self.ledger.finish(ticket, state, value, "out of memory" if value is None else None)

    def optuna_names(self) -> list[str]:
        return sorted(optuna.get_all_study_names(open_storage(self.storage_url)))


@pytest.fixture
def house(storage_url: str, tmp_path: Path) -> House:
    return House(storage_url, tmp_path / "runs")


@pytest.fixture
def aside(sqlite_url: str, tmp_path: Path) -> House:
    """With a SQLite file outside the runs folder."""
    return House(sqlite_url, tmp_path / "runs")


@pytest.fixture
def local(tmp_path: Path) -> House:
    """With the database in the folder of study `s`, as it is by default."""
    return House(default_storage_url(tmp_path / "runs", "s"), tmp_path / "runs")


# -- list -------------------------------------------------------------------------------------------------------------


def test_list_studies_counts_states_and_names_the_best(house: House) -> None:
    house.create("b", created=2.0)
    house.create("a", created=1.0)
    house.end(0.25, 0.5, None, name="b")
    house.ledger.stop("b", "enough")
    first, second = list_studies(house.ledger)
    assert (first.name, first.best, first.stop_reason) == ("a", None, None)
    assert first.counts == {
        TicketState.WAITING: 4,
        TicketState.RUNNING: 0,
        TicketState.COMPLETE: 0,
        TicketState.PRUNED: 0,
        TicketState.FAIL: 0,
    }
    assert second.to_json() == {
        "study": "b",
        "created": 2.0,
        "counts": {"WAITING": 1, "RUNNING": 0, "COMPLETE": 2, "PRUNED": 0, "FAIL": 1},
        "best": 0.5,
        "stop_reason": "enough",
        "storage": "",
    }


def test_list_databases_reads_every_study_folder_and_names_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)
    runs = tmp_path / "runs"
    for name, created in (("late", 9.0), ("early", 3.0)):
        House(default_storage_url(runs, name), runs).create(name, created=created)
    (runs / "broken").mkdir()
    (runs / "broken" / "study.db").write_text("no database at all, but a text of some length")
    (runs / "data").mkdir()
    rows, problems = list_databases(study_databases(None, runs))
    assert [row.name for row in rows] == ["early", "late"]
    assert rows[0].storage.endswith("runs/early/study.db")
    (problem,) = problems
    assert "broken/study.db" in problem
    assert "\n" not in problem


def test_study_databases_named_one_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)
    assert study_databases("postgresql://me@db/studies", tmp_path) == ("postgresql://me@db/studies",)
    monkeypatch.setenv("YOLOSEARCH_STORAGE_URL", "postgresql://me@other/studies")
    assert study_databases(None, tmp_path) == ("postgresql://me@other/studies",)
    assert study_databases("postgresql://me@db/studies", tmp_path) == ("postgresql://me@db/studies",)


# -- clone ------------------------------------------------------------------------------------------------------------


def test_clone_changes_the_name_only() -> None:
    source = study_config(base_hyp={"box": 0.06}, pruner={"name": "asha", "min_epochs": 2}, timeout=60)
    assert clone(source, "t").differing_keys(source) == ["name"]
    assert clone(source, "t").base_hyperparameters() == source.base_hyperparameters()


@pytest.mark.parametrize("name", ["s", "../t", "", "a b"])
def test_clone_name_that_is_not_allowed_raises(name: str) -> None:
    with pytest.raises(UserInputError, match=r"name.*allowed"):
        clone(study_config(), name)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
@pytest.mark.parametrize("pruner", ["none", "median", {"name": "patient", "patience": 2, "wrapped": "median"}])
def test_study_yaml_reads_back_as_the_same_study(tmp_path: Path, sampler: str, pruner: object) -> None:
    config = clone(study_config(sampler=sampler, pruner=pruner, base_hyp={"box": 0.06}), "t")
    path = tmp_path / "t.yaml"
    path.write_text(study_yaml(config, "clone of s"), encoding="utf-8")
    assert path.read_text().startswith("# clone of s\nname: t\n")
    assert load_study_config(path).to_json() == config.to_json()


# -- delete -----------------------------------------------------------------------------------------------------------


def test_delete_takes_rows_trials_and_folder_of_one_study(house: House) -> None:
    house.create("s")
    house.create("s-2")
    house.end(0.5)
    before = sum(path.stat().st_size for path in house.folder().root.rglob("*") if path.is_file())
    report = delete(house.ledger, house.storage_url, "s", house.runs)
    assert (report.study, report.trials, report.freed) == ("s", 4, before)
    assert report.kept == ("MLflow's runs of experiment 's' (MLflow's own UI deletes them)",)
    assert [record.name for record in house.ledger.studies()] == ["s-2"]
    assert house.optuna_names() == ["s-2"]
    assert not house.folder("s").root.exists()
    assert house.store("s-2").load(3, 2).epochs_done == 2
    with pytest.raises(UnknownStudyError, match=r"no study 's' in this database; it has: s-2"):
        delete(house.ledger, house.storage_url, "s", house.runs)


def test_delete_then_create_again_starts_afresh(aside: House) -> None:
    aside.create()
    aside.end(0.5, 0.25)
    delete(aside.ledger, aside.storage_url, "s", aside.runs)
    aside.create()
    assert {ticket.state for ticket in aside.ledger.tickets("s")} == {TicketState.WAITING}


def test_delete_while_somebody_works_raises_and_touches_nothing(house: House) -> None:
    house.create()
    ticket = house.claim()
    with pytest.raises(StudyConflictError, match=r"1 of its trials are running on w \(leases end in \d+ s\).*--force"):
        delete(house.ledger, house.storage_url, "s", house.runs)
    assert house.ledger.ticket(ticket.id) == ticket
    assert house.ledger.study("s").stop_reason is None
    assert house.optuna_names() == ["s"]
    assert house.store().load(3, 2).epochs_done == 2
    delete(house.ledger, house.storage_url, "s", house.runs, force=True)
    assert house.ledger.studies() == ()
    assert not house.folder().root.exists()


def test_delete_after_the_lease_of_a_lost_worker_needs_no_force(aside: House) -> None:
    aside.create()
    aside.claim(lease=-1.0)
    delete(aside.ledger, aside.storage_url, "s", aside.runs)
    assert aside.ledger.studies() == ()


def test_delete_does_not_wait_for_the_lease_of_a_dead_process_of_this_host(aside: House) -> None:
    aside.create()
    aside.claim(worker="dead")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    aside.ledger.register_worker("dead", "s", process_identity(), dead.pid, "cpu")
    delete(aside.ledger, aside.storage_url, "s", aside.runs)
    assert aside.ledger.studies() == ()


def test_delete_interrupted_before_the_rows_can_be_repeated(aside: House) -> None:
    aside.create()
    aside.folder().best_hyp.unlink()
    aside.folder().best_hyp.symlink_to(aside.runs / "nowhere")
    aside.ledger.stop("s", "`yolosearch delete` was interrupted: run it again")
    optuna.delete_study(study_name="s", storage=open_storage(aside.storage_url))
    shutil.rmtree(aside.folder().root / "trials")
    delete(aside.ledger, aside.storage_url, "s", aside.runs)
    assert aside.ledger.studies() == ()
    assert not aside.folder().root.exists()


def test_delete_removes_the_database_in_the_folder(local: House) -> None:
    local.create()
    delete(local.ledger, local.storage_url, "s", local.runs)
    assert list(local.runs.iterdir()) == []


def test_delete_keeps_the_database_that_holds_other_studies(local: House) -> None:
    local.create("s")
    local.create("t")
    report = delete(local.ledger, local.storage_url, "s", local.runs)
    assert report.kept[1].endswith("study.db holds other studies: t")
    assert {path.name.partition("-wal")[0] for path in local.folder("s").root.glob("study.db")} == {"study.db"}
    assert not (local.folder("s").root / "trials").exists()
    assert [record.name for record in local.ledger.studies()] == ["t"]


def test_delete_follows_no_links(local: House, tmp_path: Path) -> None:
    local.create()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "weights").write_text("mine")
    (local.folder().root / "mine").symlink_to(precious)
    (local.folder().root / "trials" / "more").symlink_to(precious)
    delete(local.ledger, local.storage_url, "s", local.runs)
    assert (precious / "weights").read_text() == "mine"
    assert not local.folder().root.exists()


def test_delete_folder_that_is_a_link_raises_and_touches_nothing(aside: House, tmp_path: Path) -> None:
    aside.create()
    aside.folder().root.rename(tmp_path / "elsewhere")
    aside.folder().root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserInputError, match=r"runs/s: a link to .*elsewhere; allowed: a folder"):
        delete(aside.ledger, aside.storage_url, "s", aside.runs)
    assert aside.optuna_names() == ["s"]
    assert (tmp_path / "elsewhere" / "trials").is_dir()


@pytest.mark.parametrize("name", ["../s", "..", "/etc", "a/b"])
def test_delete_name_that_leads_elsewhere_raises(local: House, name: str) -> None:
    local.create()
    with pytest.raises(UserInputError, match="study name"):
        delete(local.ledger, local.storage_url, name, local.runs)


def test_delete_study_named_like_a_shared_folder_keeps_what_all_studies_share(tmp_path: Path) -> None:
    house = House(default_storage_url(tmp_path / "runs", "data"), tmp_path / "runs")
    house.create("data")
    shared = house.runs / "data" / "digits"
    shared.mkdir()
    delete(house.ledger, house.storage_url, "data", house.runs)
    assert list((house.runs / "data").iterdir()) == [shared]


def test_delete_takes_the_checkpoints_in_another_store(local: House) -> None:
    local.create()
    store = CheckpointStore("memory://deleted", "s")
    store.save(0, 1, 3, {})
    delete(local.ledger, local.storage_url, "s", local.runs, store)
    assert store.checkpoints(0) == ()


# -- clean ------------------------------------------------------------------------------------------------------------


def test_clean_keeps_open_trials_and_the_best(aside: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    aside.create()
    aside.end(0.25, 0.75, None)
    sizes = [aside.store().checkpoints(number)[0].size for number in range(3)]
    weights = aside.weights().files(2)[0].size  # of the failed trial: the first is the base, the second the best
    expected = {"checkpoints": sum(sizes), "weights": weights, "temporary": 0, "total": sum(sizes) + weights}
    assert clean(aside.ledger, aside.folder(), aside.store(), dry_run=True).to_json() == expected
    assert clean(aside.ledger, aside.folder(), aside.store()).to_json() == expected
    assert clean(aside.ledger, aside.folder(), aside.store()).total == 0
    assert [bool(aside.store().checkpoints(number)) for number in range(4)] == [False, False, False, True]
    assert aside.has_weights(0, 1, 2, 3) == [True, True, False, True]
    assert aside.folder().best_hyp.is_file()
    assert aside.folder().log("w").is_file()


def test_clean_without_a_complete_trial_keeps_all_weights(aside: House) -> None:
    aside.create()
    aside.end(None, None)
    assert clean(aside.ledger, aside.folder(), aside.store()).weights == 0
    assert aside.has_weights(0) == [True]


def test_clean_of_equal_values_keeps_the_first(local: House) -> None:
    local.create()
    local.end(0.4, 0.5, 0.5)
    clean(local.ledger, local.folder(), local.store())
    assert local.has_weights(0, 1, 2) == [True, True, False]


@pytest.mark.parametrize(("policy", "left"), [("none", [False] * 3), ("all", [True, True, False])])
def test_clean_keeps_what_the_study_file_says(local: House, policy: str, left: list[bool]) -> None:
    local.create(train={"epochs": 9, "keep_weights": policy})
    local.end(0.5, 0.4, None)
    clean(local.ledger, local.folder(), local.store())
    assert local.has_weights(0, 1, 2) == left


def test_clean_unknown_study_raises(local: House) -> None:
    local.create()
    with pytest.raises(UnknownStudyError, match="no study 't'"):
        clean(local.ledger, local.folder("t"), local.store("t"))


def test_clean_takes_temporary_files_of_killed_writers(
    local: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    local.create()
    torn = local.folder().trial(3) / ".checkpoint-0003-0001.77.tmp"
    torn.write_bytes(b"torn")
    images = tmp_path / "yolosearch-images-abc"
    images.write_bytes(b"pixels")
    age(torn, images)
    assert clean(local.ledger, local.folder(), local.store(), dry_run=True).temporary == 10
    assert clean(local.ledger, local.folder(), local.store()).temporary == 10
    assert not torn.exists()
    assert not images.exists()


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (time.time() - 2 * HOUR,) * 2)


MAP_AND_WAIT = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(pixels[0], flush=True)
sys.stdin.read()
"""


def test_remove_temporary_files_leaves_what_a_process_has_mapped(tmp_path: Path) -> None:
    used, left, young = (tmp_path / f"yolosearch-images-{name}" for name in ("used", "left", "young"))
    for path in (used, left, young):
        path.write_bytes(b"\x05" * 5000)
    age(used, left)
    loader = subprocess.Popen(
        [sys.executable, "-c", MAP_AND_WAIT, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert loader.stdout is not None
    assert loader.stdout.readline() == "5\n"
    assert remove_temporary_files(tmp_path) == 5000
    assert sorted(path.name[18:] for path in tmp_path.iterdir()) == ["used", "young"]
    loader.communicate()
    assert remove_temporary_files(tmp_path) == 5000
    assert sorted(path.name[18:] for path in tmp_path.iterdir()) == ["young"]


def test_remove_temporary_files_takes_old_staging_folders_only(tmp_path: Path) -> None:
    for name, old in (("old", True), ("busy", False)):
        folder = tmp_path / f"yolosearch-checkpoint-{name}"
        folder.mkdir()
        (folder / ".upload.tmp").write_bytes(b"12345")
        age(*([folder / ".upload.tmp"] if old else []), folder)
    (tmp_path / "yolosearch-checkpoint-link").symlink_to(tmp_path)
    (tmp_path / "something-else").mkdir()
    assert remove_temporary_files(tmp_path) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "something-else",
        "yolosearch-checkpoint-busy",
        "yolosearch-checkpoint-link",
    ]


# -- retry ------------------------------------------------------------------------------------------------------------


def retries(tickets: tuple[Ticket, ...]) -> list[tuple[int, int | None]]:
    return [(ticket.number, ticket.retry_of) for ticket in tickets]


def test_retry_adds_tickets_with_the_same_parameters_and_lets_the_study_go_on(house: House) -> None:
    config = house.create()
    house.end(None, 0.5, None)
    house.ledger.stop("s", "2 trials in a row failed")
    added = retry(house.ledger, config)
    assert retries(added) == [(4, 0), (5, 2)]
    base = house.ledger.tickets("s")[0].params
    assert [ticket.fixed_params for ticket in added] == [base, {"box": 0.1}]
    assert house.ledger.study("s").stop_reason is None
    assert [ticket.number for ticket in house.ledger.claim("s", "w", 9, 60.0)] == [3, 4, 5]


def test_retry_all_does_not_repeat_what_was_retried(aside: House) -> None:
    config = aside.create()
    aside.end(None)
    retry(aside.ledger, config)
    assert retry(aside.ledger, config) == ()
    aside.end(0.5, 0.5, 0.5, None)
    assert retries(retry(aside.ledger, config)) == [(5, 4)]


def test_retry_named_trials_only(aside: House) -> None:
    config = aside.create()
    aside.end(None, None, None)
    assert retries(retry(aside.ledger, config, [2, 0, 2])) == [(4, 0), (5, 2)]
    for numbers, problem in (([1, 0], "trial 0 was retried already, as trial 4"), ([17], "trial 17 does not exist")):
        with pytest.raises(UserInputError, match=problem):
            retry(aside.ledger, config, numbers)
    assert len(aside.ledger.tickets("s")) == 6


def test_retry_nothing_failed_adds_nothing(aside: House) -> None:
    config = aside.create()
    aside.end(0.5)
    aside.ledger.stop("s", "by hand")
    assert retry(aside.ledger, config) == ()
    assert aside.ledger.study("s").stop_reason == "by hand"


def before_ask(house: House) -> None:
    """Ticket 1 fails before Optuna was asked."""
    house.end(0.5)
    house.ledger.finish(house.claim(), TicketState.FAIL, None, "killed")


def test_retry_of_a_trial_without_parameters_lets_the_sampler_choose(local: House) -> None:
    config = local.create()
    before_ask(local)
    (added,) = retry(local.ledger, config)
    assert added.fixed_params is None


def test_retry_in_a_grid_takes_the_failed_trials_point(local: House) -> None:
    config = local.create(sampler="grid", space={"box": [0.05, 0.1, 0.2]}, trials=3)
    before_ask(local)
    (added,) = retry(local.ledger, config)
    assert added.fixed_params in ({"box": 0.1}, {"box": 0.2})


def test_retry_is_asked_of_optuna_as_a_trial_of_its_own_with_the_same_parameters(aside: House) -> None:
    config = aside.create()
    aside.end(None)
    (added,) = retry(aside.ledger, config)
    study = load_study(config, open_storage(aside.storage_url))
    tell(study, aside.ledger.tickets("s")[0].trial_id or 0, "FAIL")
    linked = {ticket.trial_id for ticket in aside.ledger.tickets("s") if ticket.trial_id is not None}
    asked = ask(study, config, added.number, linked, added.fixed_params)
    assert asked.params == aside.ledger.tickets("s")[0].params
    assert asked.trial_id not in linked
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]


def test_retry_by_several_at_once_retries_once(house: House) -> None:
    config = house.create()
    house.end(None, None)
    together = Barrier(4)

    def attempt(_: int) -> str:
        ledger = house.ledger
        together.wait()
        try:
            return str(retries(retry(ledger, config, [0, 1])))
        except UserInputError as error:
            return str(error).partition(";")[0]

    with ThreadPoolExecutor(4) as pool:
        answers = sorted(pool.map(attempt, range(4)))
    assert answers == ["[(4, 0), (5, 1)]", *["study s: trial 0 was retried already, as trial 4"] * 3]
    assert retries(house.ledger.tickets("s")) == [(0, None), (1, None), (2, None), (3, None), (4, 0), (5, 1)]
