"""`yolosearch import`: what is known already becomes trials, or knowledge, of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli_common import (
    AsJson,
    MoreTrials,
    RunsDir,
    Storage,
    StudyName,
    more_trials,
    open_study,
    print_json,
    print_line,
    runs_folder,
)
from search.config import StudyConfig
from search.database import check_study_name, resolve_storage_url
from search.errors import UserInputError
from search.ledger import Ledger

if TYPE_CHECKING:
    from search.importers import Imported

app = typer.Typer()


@app.command("import")
def import_(
    study: StudyName,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|STUDY...",
            show_default=False,
            help="hyp YAML, evolve.csv, tune_results.csv, or a study's name.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Of each table or study, try so many of the best.")] = 5,
    trials: MoreTrials = None,
    from_storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database of the studies to import; default as for --storage.")
    ] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Bring what is known already into a study: as trials to be tried here, or as finished ones for its sampler.

    The format is told by the content. Trials of another study of yolosearch with the same data, training and objective
    are told to the sampler (tpe, gp) as finished; everything else is tried again: it takes trials of the budget that
    nobody has begun.

    Example: yolosearch import my-study runs/evolve/exp/evolve.csv hyp.mine.yaml old-study
    """
    ledger, config = open_study(study, storage, runs_dir)
    if count := more_trials(trials):
        ledger.add_tickets(config.name, count)
    done = [_import(ledger, config, source, top, from_storage or storage, storage, runs_dir) for source in sources]
    if as_json:
        print_json([one.to_json() for one in done])
        return
    for one in done:
        _print(one)


def _import(
    ledger: Ledger,
    config: StudyConfig,
    source: str,
    top: int,
    from_storage: str | None,
    storage: str | None,
    runs_dir: Path | None,
) -> Imported:
    from search.importers import OtherStudy, import_candidates, import_study, read_candidates
    from search.study import add_prior, load_study, open_storage

    if Path(source).exists() or Path(source).suffix in (".csv", ".yaml", ".yml"):
        return import_candidates(ledger, config, source, read_candidates(Path(source)), top)
    if check_study_name(source) == config.name and from_storage == storage:
        raise UserInputError(f"{source}: is the study itself; allowed: a file, or the name of another study")
    theirs, other = open_study(source, from_storage, runs_dir)
    found = OtherStudy(record=theirs.study(source), config=other, tickets=theirs.tickets(source))
    url = resolve_storage_url(storage, runs_folder(runs_dir), config.name)

    def tell(trials: Sequence[tuple[Mapping[str, float], float]]) -> int:
        return add_prior(load_study(config, open_storage(url)), config, trials)

    return import_study(ledger, config, found, top, tell)


def _print(done: Imported) -> None:
    what = []
    if done.known or not done.queued:
        what.append(f"{done.known} finished trials told to the sampler" if done.format == "study" else "nothing new")
    if done.queued:
        what.append(f"to be tried as trial {', '.join(map(str, done.queued))}")
    print_line(f"{done.source}: {done.format}, {'; '.join(what)}")
    for note in done.notes:
        print_line(f"note: {note}", style="yellow")
