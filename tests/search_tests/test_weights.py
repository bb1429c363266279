"""Trained weights: stored whole, found by the ledger's rows, deleted once beaten."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors import safe_open
from tiny import NAME, SignalWhen, TinyStudy, make_study

from search.errors import UserInputError
from search.export import export_weights
from search.ledger import CONFIRM, EpochRow, Rerun, Ticket, TicketState
from search.weights import WeightsStore, kept_numbers
from yolocore.checkpoint import load_weights
from yolocore.errors import CheckpointError
from yolocore.model import initial_state

COMPLETE = TicketState.COMPLETE


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.0.conv.weight": torch.full((4,), value), "model.0.bn.num_batches_tracked": torch.tensor(3)}


def row(epoch: int, attempt: int = 1) -> EpochRow:
    return EpochRow(ticket_id=1, epoch=epoch, attempt=attempt, value=0.5, metrics={}, stored_at=0.0, prune=None)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WeightsStore:
    root = str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}"
    return WeightsStore.open(root, "s")


def value_of(store: WeightsStore, number: int, found: EpochRow) -> float:
    file = store.find(number, found)
    assert file is not None
    with store.fetched(number, file) as local:
        return float(load_weights(local)["model.0.conv.weight"][0])


def test_find_takes_the_epoch_and_the_attempt_of_the_row(store: WeightsStore) -> None:
    store.save(3, 1, 5, state(1.0))
    store.save(3, 2, 5, state(2.0))  # of a successor that trained the epoch again
    store.save(3, 2, 6, state(3.0))

    assert value_of(store, 3, row(4, attempt=1)) == 1.0
    assert value_of(store, 3, row(4, attempt=2)) == 2.0
    assert value_of(store, 3, row(5, attempt=1)) == 3.0
    assert store.find(3, row(6)) is None
    assert store.find(3, None) is None
    assert store.find(4, row(4)) is None


def test_drop_before_and_keep_delete_what_was_beaten(store: WeightsStore) -> None:
    for epochs in (2, 4, 7):
        store.save(0, 1, epochs, state(epochs))
    store.save(1, 1, 2, state(9.0))
    best = store.find(0, row(3))
    assert best is not None

    assert store.drop_before(0, best) > 0
    assert [file.epochs_done for file in store.files(0)] == [7, 4]
    assert store.keep(0, best, dry_run=True) == store.files(0)[0].size
    store.keep(0, best)
    assert [file.epochs_done for file in store.files(0)] == [4]
    store.keep(0, None)
    assert store.files(0) == ()
    assert len(store.files(1)) == 1


def test_fetched_damaged_file_raises(tmp_path: Path) -> None:
    store = WeightsStore.open(tmp_path, "s")
    store.save(0, 1, 2, state(1.0))
    (file,) = store.files(0)
    path = tmp_path / "s" / "trials" / "00000" / file.name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"damaged: its SHA-256"), store.fetched(0, file):
        pass


def test_save_leaves_one_file_with_its_metadata(tmp_path: Path) -> None:
    WeightsStore.open(tmp_path, "s").save(0, 1, 2, state(1.0), {"names": '["a"]'})
    (path,) = (tmp_path / "s" / "trials" / "00000").iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "names": '["a"]'}
    WeightsStore.open("memory://clean", "s").save(0, 1, 2, state(1.0))
    assert [name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls("/clean/s/trials/00000", detail=False)]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_copy_gives_the_same_tensors(store: WeightsStore, tmp_path: Path, suffix: str) -> None:
    store.save(0, 1, 2, state(0.25))
    output = store.copy(0, store.files(0)[0], tmp_path / "deep" / f"best{suffix}")
    weights = load_weights(output)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state(0.25).items())
    assert list(output.parent.iterdir()) == [output]


def test_copy_of_another_suffix_raises(store: WeightsStore, tmp_path: Path) -> None:
    store.save(0, 1, 2, state(1.0))
    with pytest.raises(UserInputError, match=r"suffix '.onnx'; allowed: .safetensors, .pt"):
        store.copy(0, store.files(0)[0], tmp_path / "best.onnx")


# ---- what stays ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    """Makes tiny studies, each in a folder of its own."""
    torch.set_num_threads(1)
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


def kept(study: TinyStudy) -> set[int]:
    return {ticket.number for ticket in study.tickets() if study.weights(ticket.number)}


@pytest.mark.parametrize("policy", ["none", "best", "all"])
def test_run_worker_keeps_the_weights_that_the_study_file_says(make: Callable[..., TinyStudy], policy: str) -> None:
    study = make(trials=6, train={"epochs": 2, "keep_weights": policy}, objective="precision")
    study.create()
    study.work()

    ranked = sorted(study.tickets(), key=lambda ticket: (-(ticket.value or 0.0), ticket.number))
    three = [ticket.number for ticket in ranked if ticket.number != 0][:3]
    expected = {"none": set(), "best": {0, *three}, "all": set(range(6))}[policy]
    assert kept(study) == expected
    assert kept_numbers(study.tickets(), policy) == expected
    assert all(len(study.weights(number)) == 1 for number in expected)


def test_run_worker_best_epoch_keeps_its_weights_also_after_an_interruption(
    make: Callable[..., TinyStudy], tmp_path: Path
) -> None:
    # A rate that lets the metrics jump, so that the best epoch is seldom the last.
    study = make(
        trials=1,
        tracked=True,
        train={"epochs": 8},
        objective={"metric": "recall", "at": "best"},
        base_hyp={"mosaic": 0, "lr0": 0.05, "warmup_bias_lr": 0.2},
    )
    study.create()
    with SignalWhen(lambda: study.tickets()[0].epochs_done >= 3) as sender:
        study.work("first")
    assert sender.sent
    study.work("second")

    (ticket,) = study.tickets()
    (file,) = study.weights(0)
    rows = {found.epoch: found for found in study.ledger.reports(ticket.id)}
    found = rows[ticket.best_epoch]
    assert found.value == max(other.value for other in rows.values())
    assert file.name.startswith(f"weights-{found.epoch + 1:04d}-{found.attempt:04d}-")
    output = export_weights(study.ledger, study.config, WeightsStore.open(study.runs, NAME), tmp_path / "best.pt")
    fresh = initial_state("n", 2, 0)
    assert list(load_weights(output)) == list(load_weights(file))
    assert set(load_weights(output)) == set(fresh)
    artifact = study.runs.rglob("weights/best.safetensors")
    assert [path.read_bytes() for path in artifact] == [file.read_bytes()]


def test_export_weights_that_were_not_kept_raises(make: Callable[..., TinyStudy], tmp_path: Path) -> None:
    study = make(trials=1)
    study.create()
    with pytest.raises(UserInputError, match=r"no weights of a complete trial are in .*keep_weights best or all"):
        export_weights(study.ledger, study.config, WeightsStore.open(study.runs, NAME), tmp_path / "best.pt")


def ended(study: TinyStudy, *values: float | None) -> list[Ticket]:
    """The study's tickets as if they were complete, each with parameters of its own."""
    return [
        dataclasses.replace(ticket, state=COMPLETE, value=value, params={"box": 0.05 + ticket.number / 100})
        for ticket, value in zip(study.tickets(), values, strict=True)
    ]


def test_kept_numbers_are_the_base_its_retry_and_the_best_three(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=6)
    study.create()
    tickets = ended(study, 0.5, 0.5, 0.7, 0.6, 0.5, 0.4)
    assert kept_numbers(tickets[:1], "best") == {0}
    assert kept_numbers(tickets, "best") == {0, 1, 2, 3}  # of equals the first
    same = [*tickets[:3], dataclasses.replace(tickets[3], params=tickets[2].params), *tickets[4:]]
    assert kept_numbers(same, "best") == {0, 1, 2, 4}  # nobody confirms the same parameters twice
    retried = [
        dataclasses.replace(tickets[0], state=TicketState.FAIL, value=None),
        *tickets[1:5],
        dataclasses.replace(tickets[5], retry_of=0, value=0.1),
    ]
    assert kept_numbers(retried, "best") == {1, 2, 3, 5}
    assert kept_numbers(retried, "all") == {1, 2, 3, 4, 5}


def test_kept_numbers_have_what_a_confirmation_reruns(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=6)
    study.create()
    tickets = ended(study, 0.5, 0.1, 0.7, 0.6, 0.8, 0.9)
    rerun = Rerun(candidate=1, seed=1, epochs=2, params=tickets[1].params or {})
    reruns = study.ledger.add_reruns(NAME, CONFIRM, [rerun])
    assert kept_numbers([*tickets, *reruns], "best") == {0, 1, 2, 4, 5}
    assert kept_numbers([*tickets, *reruns], "none") == frozenset()
