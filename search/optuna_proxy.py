"""Optuna's gRPC proxy: hundreds of workers share a few connections and one cache of the finished trials.

Leases, reports and decisions do not pass through it: every worker still writes those to the database itself.

    YOLOSEARCH_STORAGE_URL=postgresql://... python -m search.optuna_proxy --port 13000
    YOLOSEARCH_OPTUNA_GRPC=host:13000 yolosearch worker my-study
"""

import argparse
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import optuna
from optuna.exceptions import ExperimentalWarning

from search.database import STORAGE_URL_VARIABLE, mask_url
from search.errors import SearchError, UserInputError
from search.study import open_storage


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is ended; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m search.optuna_proxy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", help=f"database URL; by default {STORAGE_URL_VARIABLE}, which hides its password")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; there is no password, so no public place")
    parser.add_argument("--port", type=int, default=13000)
    parser.add_argument("--threads", type=int, default=16, help="requests answered at once, each with a connection")
    options = parser.parse_args(arguments)
    try:
        _serve(options.storage or os.environ.get(STORAGE_URL_VARIABLE), options.host, options.port, options.threads)
    except SearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserInputError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(url: str | None, host: str, port: int, threads: int) -> None:
    if not url:
        raise UserInputError(f"no database: give --storage or set {STORAGE_URL_VARIABLE}")
    cached = optuna.storages.get_storage(open_storage(url, connections=threads))
    print(f"serving Optuna's part of {mask_url(url)} on {host}:{port}", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.run_grpc_proxy_server(
            cached, host=host, port=port, thread_pool=ThreadPoolExecutor(max_workers=threads)
        )


if __name__ == "__main__":
    sys.exit(main())
