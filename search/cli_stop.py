"""The commands that end a study before its budget is spent, and take it up again: stop, resume."""

from __future__ import annotations

from typing import Annotated

import typer

from search.cli_common import AsJson, RunsDir, Storage, StudyName, open_study, print_json, print_line
from search.ledger import StopKind, TicketState

app = typer.Typer()


@app.command()
def stop(
    study: StudyName,
    now: Annotated[bool, typer.Option("--now", help="Hand running trials back at their last epoch, too.")] = False,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Let no new trial start; running ones go to their ends. Its workers end with exit code 0.

    Example: yolosearch stop my-study --now
    """
    ledger, config = open_study(study, storage, runs_dir)
    kind = StopKind.NOW if now else StopKind.ASKED
    reason = f"by `yolosearch stop{' --now' if now else ''}`"
    ledger.stop(config.name, reason, kind)
    running = ledger.open_counts(config.name)[TicketState.RUNNING]
    if as_json:
        print_json({"study": config.name, "stopped": reason, "running": running})
        return
    what = "are handed back" if now else "go to their ends"
    print_line(f"study {config.name} stopped: {running} running trials {what}")


@app.command()
def resume(study: StudyName, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """Take a stopped study up again; start workers with run, launch or worker.

    Example: yolosearch resume my-study && yolosearch launch my-study
    """
    ledger, config = open_study(study, storage, runs_dir)
    reason = ledger.study(config.name).stop_reason
    ledger.stop(config.name, None)
    if as_json:
        print_json({"study": config.name, "was_stopped": reason})
        return
    print_line(f"study {config.name} goes on" if reason else f"study {config.name} was not stopped")
