"""How many workers, on which GPUs, started by which words."""

from dataclasses import replace
from pathlib import Path

import pytest

from search.errors import UserInputError
from search.launch.gpus import visible_gpus
from search.launch.plan import LaunchPlan, choose_gpus, choose_workers
from search.paths import StudyFolder
from yolocore.host import available_cores

PLAN = LaunchPlan(storage_url="postgresql://me:s3cret@db/studies", folder=StudyFolder(Path("/runs"), "tiny"))


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        (None, ("0", "1"), ("0", "1")),
        (None, (), ()),
        ("none", ("0",), ()),
        ("1", ("0", "1"), ("1",)),
        ("1,0", ("0", "1"), ("1", "0")),
        # Under a scheduler numbers count what it left visible, as `cuda:N` does.
        ("0, 1", ("4", "GPU-aa"), ("4", "GPU-aa")),
        ("MIG-bb", ("0",), ("MIG-bb",)),
    ],
)
def test_choose_gpus_gives_values_of_the_variable(
    asked: str | None, visible: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert choose_gpus(asked, visible) == expected


@pytest.mark.parametrize(
    ("asked", "visible", "message"),
    [
        ("2", ("0", "1"), "got '2', which is not there; allowed: none, or some of 0,1"),
        ("0", (), "got '0', which is not there; allowed: none: this host has no GPU"),
        ("0,0", ("0",), "got '0', twice"),
        ("0,", ("0",), "got '', which is not there"),
        ("-1", ("0",), "got '-1'"),
        ("cuda:0", ("0",), "got 'cuda:0'"),
    ],
)
def test_choose_gpus_wrong_word_is_named_with_what_is_allowed(
    asked: str, visible: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserInputError) as caught:
        choose_gpus(asked, visible)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "gpus", "per_gpu", "expected"), [(None, 0, 1, 1), (None, 4, 2, 8), (3, 4, 1, 3), (5, 0, 1, 5)]
)
def test_choose_workers_one_for_each_share(asked: int | None, gpus: int, per_gpu: int, expected: int) -> None:
    assert choose_workers(asked, gpus, per_gpu) == expected


def test_choose_workers_more_than_shares_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"--workers: got 5; allowed: 1 to 4, for 2 GPUs with --per-gpu 2"):
        choose_workers(5, 2, 2)


def test_seats_fill_all_gpus_before_they_share_one() -> None:
    seats = replace(PLAN, workers=4, gpus=("2", "5"), per_gpu=2).seats()

    assert [(seat.index, seat.gpu, seat.device) for seat in seats] == [
        (0, "2", "cuda"),
        (1, "5", "cuda"),
        (2, "2", "cuda"),
        (3, "5", "cuda"),
    ]


def test_worker_command_has_every_setting_and_no_secret() -> None:
    plan = replace(PLAN, data=Path("/mnt/d.yaml"), checkpoints="s3://bucket/x", lease_seconds=60.0, stop_seconds=5.0)

    words = plan.worker_command("host-1-0.0", plan.seats()[0], parent=7, seconds_left=-3.0)

    options = dict(zip(words[5::2], words[6::2], strict=True))
    assert words[1:5] == ["-m", "search", "worker", "tiny"]
    assert options == {
        "--runs-dir": "/runs",
        "--worker-id": "host-1-0.0",
        "--stop-seconds": "5.0",
        "--hang": "900.0",
        "--lease": "60.0",
        "--parent": "7",
        "--timeout": "0.0",
        "--data": "/mnt/d.yaml",
        "--checkpoints": "s3://bucket/x",
    }
    assert not any("s3cret" in word for word in words)


def test_worker_environment_shows_one_gpu_and_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    plan = replace(PLAN, workers=2 * available_cores(), gpus=("3",), per_gpu=2 * available_cores())

    environment = plan.worker_environment(plan.seats()[0])

    assert environment == {
        "YOLOSEARCH_STORAGE_URL": PLAN.storage_url,
        "CUDA_VISIBLE_DEVICES": "3",
        "OMP_NUM_THREADS": "1",
        "YOLOSEARCH_WORKERS_ON_HOST": str(2 * available_cores()),
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert "OMP_NUM_THREADS" not in plan.worker_environment(plan.seats()[0])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert PLAN.worker_environment(PLAN.seats()[0]) == {"YOLOSEARCH_STORAGE_URL": PLAN.storage_url}


def test_visible_gpus_on_a_host_without_any_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus() == ()
