"""The command `dashboard`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from search.api import Study
from search.cli_common import RunsDir, Storage, StudyName, print_line, study_name
from search.launch.mlflow_ui import DEFAULT_HOST

app = typer.Typer()


@app.command()
def dashboard(
    study: StudyName,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = DEFAULT_HOST,
    port: Annotated[int | None, typer.Option(help="Default 8080, or a free one where that is taken.")] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Show a study in optuna-dashboard (the extra `dashboard`), read-only, on 127.0.0.1; Ctrl-C ends it.

    Example: yolosearch dashboard quickstart
    """
    from search.dashboard import Dashboard

    signal.signal(signal.SIGTERM, _interrupt)  # first: who reads the address may end us at once
    opened = Study.open(study_name(study), storage=storage, runs_dir=runs_dir)
    server = Dashboard.bind(opened.storage_url, opened.name, host, port)
    print_line(f"optuna-dashboard: {server.address}  (Ctrl-C ends it)")
    server.serve()


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
