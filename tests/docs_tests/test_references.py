"""What is generated below docs/ is what `make docs` would write now."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """docs/make.py."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_not_stale(make: ModuleType) -> None:
    assert make.stale() == [], "run `make docs`"


def test_stale_names_a_file_that_was_changed_by_hand_and_one_that_is_missing(make: ModuleType, tmp_path: Path) -> None:
    texts = make.references()
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    changed, missing, *_ = texts
    (tmp_path / changed).write_text("mine")
    (tmp_path / missing).unlink()

    assert make.stale(tmp_path) == [changed, missing]


def test_study_reference_has_a_row_for_every_key(make: ModuleType) -> None:
    text = make.references()["reference/study.md"]
    schema = make.study_schema()
    keys = {key for part in (schema, *schema["$defs"].values()) for key in part.get("properties", {})}

    assert keys - set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set()
    assert "| anything |" not in text.replace("| `anchors` | anything |", "")
