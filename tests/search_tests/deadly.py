"""A worker's process that claims one trial and then dies (seat 0), or does not end when it is asked to.

Words: its name, its seat, its launcher's process id; the database is in the environment, as a worker's is.
"""

import os
import signal
import sys
import time

from search.database import STORAGE_URL_VARIABLE, make_engine
from search.ledger import Ledger
from search.worker.host import process_identity

NAME = "tiny"


def main(worker_id: str, seat: str, parent: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ledger = Ledger(make_engine(os.environ[STORAGE_URL_VARIABLE]))
    ledger.register_worker(worker_id, NAME, process_identity(), os.getpid(), "cpu fp32")
    assert ledger.claim(NAME, worker_id, 1, 600.0)
    if seat == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    while os.getppid() == int(parent):
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
