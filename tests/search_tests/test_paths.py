"""File names of a study."""

from pathlib import Path

import pytest

from search.errors import UserInputError
from search.paths import StudyFolder, data_on_this_host, default_runs_dir


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
    assert folder.log("host-1-0.0") == Path("runs/blood/logs/host-1-0.0.log")


@pytest.mark.parametrize("below", ["data/sets/pets/pets.yaml", "sets/pets/pets.yaml", "pets/pets.yaml", "pets.yaml"])
def test_data_on_this_host_longest_end_below_the_root_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    stored, root = Path("/data/sets/pets/pets.yaml"), tmp_path / "root"
    (root / below).parent.mkdir(parents=True)
    (root / below).touch()
    (root / "pets.yaml").touch()
    monkeypatch.setenv("YOLOSEARCH_DATA_ROOT", str(root))

    assert data_on_this_host(stored) == root / below


def test_data_on_this_host_without_the_variable_or_a_file_below_it_is_where_the_study_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "pets.yaml"
    monkeypatch.delenv("YOLOSEARCH_DATA_ROOT", raising=False)
    assert data_on_this_host(stored) == stored  # whether it exists is for its reader to say
    stored.touch()
    monkeypatch.setenv("YOLOSEARCH_DATA_ROOT", str(tmp_path / "other"))
    assert data_on_this_host(stored) == stored


def test_data_on_this_host_nowhere_is_an_error_with_an_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOSEARCH_DATA_ROOT", "/mnt/sets")

    with pytest.raises(UserInputError, match=r"holds nothing of .*pets.yaml; .* for example /mnt/sets/pets/pets.yaml"):
        data_on_this_host(tmp_path / "pets" / "pets.yaml")
