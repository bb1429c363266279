"""Whose process is whose where containers share volumes and a database: real PID and host name namespaces."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import NAME, TinyStudy, make_study

from search.worker.host import release_dead_neighbours

ISOLATED = ["unshare", "--pid", "--uts", "--fork", "--mount-proc"]

CLAIM = """
import json, os, sys
from search.database import make_engine
from search.ledger import Ledger
from search.worker.host import process_identity, release_dead_neighbours
ledger = Ledger(make_engine(sys.argv[1]))
freed = release_dead_neighbours(ledger, "tiny")
ledger.register_worker(sys.argv[2], "tiny", process_identity(), os.getpid(), "cpu")
ledger.claim("tiny", sys.argv[2], 1, 600.0)
print(json.dumps({"pid": os.getpid(), "freed": freed}), flush=True)
sys.stdin.read()
os._exit(9)
"""


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    if subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


def start(study: TinyStudy, host: str, worker: str) -> subprocess.Popen[str]:
    """A container that claims one ticket and dies as soon as its standard input ends."""
    words = f"hostname {host}; exec {sys.executable} -c '{CLAIM}' {study.storage_url} {worker}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([*ISOLATED, "sh", "-c", words], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def answer(container: subprocess.Popen[str]) -> dict[str, object]:
    assert container.stdout is not None
    told: dict[str, object] = json.loads(container.stdout.readline())
    return told


@pytest.mark.slow
@pytest.mark.parametrize("host", ["node-a", "node-b"])
def test_release_dead_neighbours_living_container_of_the_same_name_and_process_id_keeps_its_tickets(
    make: Callable[..., TinyStudy], host: str
) -> None:
    study = make(trials=2)
    study.create()

    with start(study, "node-a", "first") as living:
        first = answer(living)
        with start(study, host, "second") as other:
            second = answer(other)
            other.communicate("")
        living.communicate("")

    assert first["pid"] == second["pid"] == 1
    assert (first["freed"], second["freed"]) == (0, 0)
    assert [(ticket.worker, ticket.attempt) for ticket in study.tickets()] == [("first", 1), ("second", 1)]


def test_release_dead_neighbours_container_restarted_under_another_name_waits_for_the_lease(
    make: Callable[..., TinyStudy],
) -> None:
    study = make(trials=2)
    study.create()
    with start(study, "node-a", "first") as dead:
        answer(dead)
        dead.communicate("")

    with start(study, "node-b", "second") as restarted:
        second = answer(restarted)
        restarted.communicate("")

    # It cannot know that the other one is gone: its process id means nothing here.
    assert second["freed"] == 0
    assert release_dead_neighbours(study.ledger, NAME) == 0
    assert [(ticket.worker, ticket.attempt) for ticket in study.tickets()] == [("first", 1), ("second", 1)]
