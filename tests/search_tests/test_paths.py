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
    assert folder.weights(7) == Path("runs/blood/trials/00007/best.safetensors")
    assert folder.log("host-1-0.0") == Path("runs/blood/logs/host-1-0.0.log")
