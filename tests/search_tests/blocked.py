"""Real trainers and workers in which one chosen call never returns, as one to a file server that is gone."""

import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from search.checkpoints import CheckpointStore
from search.worker import trainer_process
from search.worker.trainer_process import TrainerSettings


def once(act: Callable[..., Any], marker: Path) -> Callable[..., Any]:
    """As `act`, but the first call of all processes never returns; `marker` tells of it."""

    def call(*arguments: Any, **options: Any) -> Any:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return act(*arguments, **options)
        time.sleep(10_000)
        raise AssertionError

    return call


def main(marker: Path, connection: Connection, settings: TrainerSettings) -> None:
    """Entry point of the trainer process, instead of the product's: the first checkpoint is never written."""
    CheckpointStore.save = once(CheckpointStore.save, marker)  # type: ignore[method-assign]
    trainer_process.main(connection, settings)


def work(marker: Path, storage_url: str, study: str, runs: Path) -> None:
    """A worker whose supervisor never returns from tidying up; it waits for no outage, and its leases are short."""
    from search.worker import worker
    from search.worker.session import WorkerOptions, run_worker

    worker.OUTAGE_SECONDS = 0.0
    CheckpointStore.keep_latest = once(CheckpointStore.keep_latest, marker)  # type: ignore[method-assign]
    run_worker(
        WorkerOptions(
            storage_url=storage_url,
            study=study,
            runs_dir=runs,
            worker_id="blocked",
            lease_seconds=6.0,
            hang_seconds=10.0,
        )
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
