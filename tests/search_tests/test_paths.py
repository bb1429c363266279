"""File names of a study."""

from pathlib import Path

import pytest

from search.paths import StudyFolder, default_runs_dir


def test_default_runs_dir_environment_wins_unless_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOSEARCH_RUNS_DIR", "/data/runs")
    assert default_runs_dir() == Path("/data/runs")
    monkeypatch.setenv("YOLOSEARCH_RUNS_DIR", "")
    assert default_runs_dir() == Path("runs")
    monkeypatch.delenv("YOLOSEARCH_RUNS_DIR")
    assert default_runs_dir() == Path("runs")


def test_study_folder_names_of_every_file() -> None:
    folder = StudyFolder(Path("runs"), "blood")

    assert folder.root == Path("runs/blood")
    assert folder.best_hyp == Path("runs/blood/hyp.best.yaml")
    assert folder.checkpoint(7, 12) == Path("runs/blood/trials/00007/checkpoint-0012.pt")
    assert folder.weights(7) == Path("runs/blood/trials/00007/best.safetensors")
    assert folder.log("host-1-0.0") == Path("runs/blood/logs/host-1-0.0.log")


def test_checkpoints_only_those_of_the_trial_in_order(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "blood")
    assert folder.checkpoints(1) == ()
    kept = [folder.checkpoint(1, 2), folder.checkpoint(1, 10)]
    for path in [*reversed(kept), folder.weights(1), folder.checkpoint(2, 3)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    assert folder.checkpoints(1) == tuple(kept)
