"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Two test processes share the cores, and tiny tensors gain nothing from threads. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The folder with golden/, data/ and weights/; a test that needs it skips only where none is named."""
    folder = os.environ.get("YOLOSEARCH_FIXTURES")
    if not folder:
        pytest.skip("YOLOSEARCH_FIXTURES is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def golden_dir(fixtures_dir: Path) -> Path:
    """The reference's outputs on fixed inputs."""
    return fixtures_dir / "golden"


@pytest.fixture(scope="session")
def small_golden_dir() -> Path:
    """Small golden figures that live in the repository."""
    return Path(__file__).parent / "golden"
