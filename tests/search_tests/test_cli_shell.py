"""What a shell asks of the command: its version, and how words go on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ledger_rows import NAME, make_ledger, study_config


def complete(words: str, folder: Path, shell: str = "bash") -> list[str]:
    """What bash is told on Tab after `words`."""
    environment = {
        **os.environ,
        "_YOLOSEARCH_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    environment.pop("YOLOSEARCH_RUNS_DIR", None)
    script = "import sys; from search.cli import main; sys.argv = ['yolosearch']; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion_of_commands(tmp_path: Path) -> None:
    assert complete("yolosearch wa", tmp_path) == ["watch"]


def test_completion_of_study_names_and_files(tmp_path: Path) -> None:
    make_ledger(tmp_path, study_config(trials=1))
    (tmp_path / "rose.yaml").write_text("")

    assert sorted(complete("yolosearch watch ro", tmp_path)) == ["rose.yaml", NAME]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_script_completes_in_a_real_bash(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("yolosearch")
    if not command.exists():
        pytest.skip("the package is not installed")
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    script = """
        source <(_YOLOSEARCH_COMPLETE=source_bash yolosearch)
        complete -p yolosearch
        COMP_WORDS=(yolosearch wa) COMP_CWORD=1
        _yolosearch_completion yolosearch
        echo "${COMPREPLY[@]}"
    """

    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines() == ["complete -o default -F _yolosearch_completion yolosearch", "watch"], (
        done.stderr
    )


def test_version_is_the_distributions() -> None:
    import importlib.metadata

    done = subprocess.run([sys.executable, "-m", "search", "--version"], capture_output=True, text=True, timeout=60)

    assert done.stdout == f"yolosearch {importlib.metadata.version('yolosearch')}\n"
