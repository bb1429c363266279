"""The commands that work on a study: run, launch, worker."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.api import raise_failures
from search.cli_common import (
    AsJson,
    Checkpoints,
    Data,
    MoreTrials,
    RunsDir,
    Storage,
    StudyFile,
    StudyName,
    err,
    is_study_file,
    more_trials,
    out,
    plan_of,
    print_error,
    print_json,
    print_line,
    print_plan,
    runs_folder,
    study_name,
)
from search.cli_live import Screen, TrialScreen, WorkerScreen, look_after
from search.config import CONFIRM_TOP, RERUN_SEEDS, StudyConfig
from search.database import resolve_storage_url
from search.errors import EXIT_INTERRUPTED, StudyStoppedError, UserInputError
from search.launch.launcher import Launcher
from search.launch.local import LocalLauncher
from search.launch.plan import STOP_SECONDS, LaunchPlan, choose_gpus, choose_workers
from search.ledger import CONFIRM, KINDS, NOISE, SEARCH, Ledger
from search.paths import StudyFolder
from search.ranges import OWN_BASE, POWER_KEY
from search.report import (
    StudyStatus,
    bound_lines,
    comparison_table,
    front_table,
    headline,
    study_status,
    trials_table,
)
from search.worker.existing import HANG_SECONDS, OUTAGE_SECONDS, open_existing
from search.worker.lease import DEFAULT_LEASE_SECONDS
from yolocore.errors import InputError

if TYPE_CHECKING:
    from search.formats import Exported

    pass

Hang = Annotated[
    float,
    typer.Option(
        min=1, help="Seconds after which a silent trainer is killed; reading the data may take four times as long."
    ),
]
Lease = Annotated[float, typer.Option(min=1, help="Seconds after which a silent worker loses its trials.")]
StopSeconds = Annotated[float, typer.Option(min=0, help="Seconds to end in when asked to by a signal.")]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds after which no new trial is claimed; default the study's.")
]

STOPPING = "stopping: running trials are handed back; the same command takes them up again (Ctrl-C ends at once)"

app = typer.Typer()


class Engine(StrEnum):
    """What starts worker processes."""

    LOCAL = "local"
    RAY = "ray"


class Kind(StrEnum):
    """What `--only` takes."""

    NOISE = NOISE
    CONFIRM = CONFIRM
    SEARCH = SEARCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A study that is in its database, ready to be worked on."""

    config: StudyConfig
    storage_url: str
    folder: StudyFolder
    ledger: Ledger
    file: Path | None
    """The study file, if the user gave it."""

    def has_work(self, kinds: tuple[str, ...] = KINDS) -> bool:
        """Whether a worker that takes such tickets would find something to do."""
        is_open = any(self.ledger.open_counts(self.config.name, kinds).values())
        return is_open or bool(self.ledger.unmirrored(self.config.name))


@app.command()
def run(
    study: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    device: Annotated[list[str] | None, typer.Option(help="Devices dealt out to the workers, e.g. cuda:0.")] = None,
    trials: MoreTrials = None,
    lease: Lease = DEFAULT_LEASE_SECONDS,
    hang: Hang = HANG_SECONDS,
    stop_seconds: StopSeconds = STOP_SECONDS,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Create a study, or take it up again, and work on it until its budget is spent.

    Example: yolosearch run studies/quickstart.yaml
    """
    job = create_job(study, trials, storage, runs_folder(runs_dir), quiet=as_json)
    plan = replace(
        launch_plan(job),
        workers=workers,
        devices=tuple(device or ()),
        lease_seconds=lease,
        hang_seconds=hang,
        stop_seconds=stop_seconds,
    )
    if job.has_work():
        work(job, LocalLauncher(plan, job.ledger), TrialScreen(), quiet=as_json)
    _print_outcome(job, as_json, every_trial=True)


@app.command()
def launch(
    study: StudyName,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; default one a share of a GPU.")] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="GPUs as cuda:N counts them, or none; default all.")
    ] = None,
    per_gpu: Annotated[int, typer.Option(min=1, help="Workers that share a GPU.")] = 1,
    on: Annotated[Engine, typer.Option(help="What starts the workers: this command, or a Ray cluster.")] = Engine.LOCAL,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray: auto (default), local, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Ray: GPU of each worker, 0 to 1; default 1 / per-gpu.")
    ] = None,
    cpus_per_worker: Annotated[float | None, typer.Option(help="Ray: cores of each worker; default 1.")] = None,
    placement: Annotated[str | None, typer.Option(metavar="spread|pack", help="Ray: spread (default) or pack.")] = None,
    data: Data = None,
    timeout: Timeout = None,
    lease: Lease = DEFAULT_LEASE_SECONDS,
    checkpoints: Checkpoints = None,
    hang: Hang = HANG_SECONDS,
    stop_seconds: StopSeconds = STOP_SECONDS,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Work on a study with one process per GPU of this host, restart those that die, and show them.

    STUDY is a study that exists, or a file, whose study is created or taken up again. On several hosts, start it on
    each.

    Example: yolosearch launch my-study --gpus 0,1,2,3 --per-gpu 2
    """
    options = {
        "--address": address,
        "--gpus-per-worker": gpus_per_worker,
        "--cpus-per-worker": cpus_per_worker,
        "--placement": placement,
    }
    start = _on_ray(options, workers, gpus) if on is Engine.RAY else _on_this_host(options)
    runs = runs_folder(runs_dir)
    is_file = is_study_file(study)
    job = create_job(Path(study), None, storage, runs, as_json, data) if is_file else existing_job(study, storage, runs)
    chosen = _gpus(gpus, job.config) if on is Engine.LOCAL else ()
    plan = replace(
        launch_plan(job),
        workers=choose_workers(workers, len(chosen), per_gpu),
        gpus=chosen,
        per_gpu=per_gpu,
        data=data,
        timeout=job.config.timeout if timeout is None else timeout,
        lease_seconds=lease,
        checkpoints=checkpoints,
        hang_seconds=hang,
        stop_seconds=stop_seconds,
    )
    if job.has_work():
        work(job, start(plan, job.ledger), WorkerScreen(), quiet=as_json)
    _print_outcome(job, as_json, every_trial=False)


@app.command()
def worker(
    study: StudyName,
    device: Annotated[str | None, typer.Option(help="Overrides the study's device on this host.")] = None,
    data: Data = None,
    timeout: Timeout = None,
    lease: Lease = DEFAULT_LEASE_SECONDS,
    checkpoints: Checkpoints = None,
    hang: Hang = HANG_SECONDS,
    stop_seconds: StopSeconds = STOP_SECONDS,
    stay_down: Annotated[
        bool, typer.Option("--stay-down", help="End with 0, not 2 or 3, where a restart would not help.")
    ] = False,
    only: Annotated[
        Kind | None, typer.Option(help="Take only tickets of this kind; default all, reruns first.")
    ] = None,
    worker_id: Annotated[str | None, typer.Option(help="Unique name; default host, process and a random part.")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Work on a study that exists: needs its name and the database's URL only.

    Example: YOLOSEARCH_STORAGE_URL=postgresql://me@db/studies yolosearch worker my-study
    """
    from search.worker.session import WorkerOptions, run_worker

    try:
        runs, name = runs_folder(runs_dir), study_name(study)
        outcome = run_worker(
            WorkerOptions(
                storage_url=resolve_storage_url(storage, runs, name),
                study=name,
                runs_dir=runs,
                worker_id=worker_id or f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}",
                device=device,
                data=data,
                parent=parent,
                timeout=timeout,
                lease_seconds=lease,
                checkpoints=checkpoints,
                hang_seconds=hang,
                stop_seconds=stop_seconds,
                kinds=KINDS if only is None else (only.value,),
            )
        )
    except (UserInputError, InputError, StudyStoppedError) as error:
        if not stay_down:
            raise
        print_error(error)
        return
    out.print(
        f"{outcome.ended} trials ended here" if only in (None, Kind.SEARCH) else f"{outcome.ended} reruns ended here"
    )
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def create_job(
    study: Path,
    trials: str | None,
    storage: str | None,
    runs: Path,
    quiet: bool,
    data: Path | None = None,
    noise_seeds: int = 0,
) -> Job:
    """The study of a file: created, or taken up again; the caller adds so many reruns of its base."""
    more = more_trials(trials)
    plan = plan_of(study, storage, runs, data, noise_seeds)
    from search.launch.prepare import create_or_resume

    created = create_or_resume(plan, more)
    if not quiet:
        print_plan(plan)
        print_line("study created" if created else "study taken up again", style="dim")
    return _job(plan.config.name, plan.storage_url, runs, study)


def existing_job(study: str, storage: str | None, runs: Path) -> Job:
    """A study that exists."""
    name = study_name(study)
    return _job(name, resolve_storage_url(storage, runs, name), runs, None)


def _job(name: str, storage_url: str, runs: Path, file: Path | None) -> Job:
    ledger = open_existing(storage_url, name, patience=OUTAGE_SECONDS)
    ledger.initialise()  # who trains may upgrade an older study; who only reads may not
    config = StudyConfig.from_json(ledger.study(name).config)
    return Job(config=config, storage_url=storage_url, folder=StudyFolder(runs, name), ledger=ledger, file=file)


def launch_plan(job: Job) -> LaunchPlan:
    """One worker on this host."""
    return LaunchPlan(storage_url=job.storage_url, folder=job.folder, timeout=job.config.timeout)


def _gpus(asked: str | None, config: StudyConfig) -> tuple[str, ...]:
    """The GPUs of this host to launch on; none where the study trains on something else."""
    device = config.train.device
    if asked is None and not (device == "auto" or device.startswith("cuda")):
        return ()
    from search.launch.gpus import visible_gpus

    visible = visible_gpus()
    _, _, number = device.partition(":")
    return choose_gpus(number or None if asked is None else asked, visible)


def _on_this_host(options: Mapping[str, Any]) -> Callable[[LaunchPlan, Ledger], Launcher]:
    for name, value in options.items():
        if value is not None:
            raise UserInputError(f"{name}: got {value!r}; allowed: with --on ray only")
    return LocalLauncher


def _on_ray(
    options: Mapping[str, Any], workers: int | None, gpus: str | None
) -> Callable[[LaunchPlan, Ledger], Launcher]:
    """Refuses what Ray cannot do, before a study is created."""
    from search.launch.ray import RayShare, import_ray, launch_on_ray

    import_ray()
    if workers is None:
        raise UserInputError("--workers: got none; allowed with --on ray: a number of workers, 1 or more")
    if gpus is not None:
        raise UserInputError(f"--gpus: got {gpus!r}; allowed with --on ray: --gpus-per-worker, Ray chooses which")
    names = {"gpus": "--gpus-per-worker", "cpus": "--cpus-per-worker", "placement": "--placement"}
    share = RayShare(**{key: value for key, name in names.items() if (value := options[name]) is not None})
    return partial(launch_on_ray, address=options["--address"], share=share)


def work(job: Job, launcher: Launcher, screen: Screen, *, quiet: bool, kinds: tuple[str, ...] = KINDS) -> None:
    """Has workers work to their end, showing them; Ctrl-C hands the trials back and ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    with launcher:
        try:
            look_after(launcher, job.ledger, job.config, None if quiet else screen)
        except KeyboardInterrupt:
            _ignore_sigterm()
            print_line(STOPPING, to=err)
            raise
    raise_failures(launcher, job.ledger, job.config.name, kinds)


def _interrupt(_number: int, _frame: object) -> None:
    _ignore_sigterm()
    raise KeyboardInterrupt


def _ignore_sigterm() -> None:
    """While trials are handed back only a second Ctrl-C is immediate: service managers repeat themselves."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)


def _print_outcome(job: Job, as_json: bool, *, every_trial: bool) -> None:
    """The end: tables, the exported hyp and what to do next."""
    from search.formats import ALL, ExportRequest, export_trials

    status = study_status(job.ledger, job.config)
    written: tuple[Exported, ...] = ()
    if status.over and (status.best or status.front):
        asked = ExportRequest(pareto=ALL if status.front else None)
        written = export_trials(job.ledger, job.config, job.folder, asked, job.folder.runs_dir)
    if as_json:
        print_json(status.to_json())
        return
    if every_trial:
        out.print(trials_table(status))
    if status.stop_kind is not None:
        print_line(f"stopped: {status.stop_reason}; `{_command()} run {job.file or 'STUDY.yaml'}` takes it up again")
    if status.front and written:
        out.print(front_table(status))
        for one in written:
            print_line(f"hyp of trial {one.best.trial_number}: {one.path}")
        return
    if not written:
        why = "no trial is complete" if status.over else "the same command goes on with the trials that wait"
        print_line(f"{headline(status)} | nothing exported: {why}")
        return
    _print_comparison(job.config, status)
    if written[0].best.verdict is not None:
        print_line(written[0].best.verdict)
    best = written[0].best
    _print_next_steps(job, written[0].path, is_settled=best.verdict is not None or best.is_base)


def _print_comparison(config: StudyConfig, status: StudyStatus) -> None:
    own = {key: OWN_BASE[key] for key in config.space if key == POWER_KEY}
    base = {**config.base_hyperparameters().to_mapping(), **own}
    out.print(comparison_table(status, base, {**base, **({} if status.best is None else status.best.params)}))
    for line in bound_lines(status):
        out.print(line)


def _command() -> str:
    """How the user called us, to be typed again."""
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m search"
    return "yolosearch" if shutil.which("yolosearch") else sys.argv[0]


def _print_next_steps(job: Job, path: Path, *, is_settled: bool) -> None:
    really = f"really better?   {_command()} confirm {job.config.name} --top {CONFIRM_TOP} --seeds {RERUN_SEEDS}"
    lines = [
        f"best hyp:        {path}",
        *([] if is_settled else [really]),
        f"train with it:   python train.py --hyp {path} ...   (in your YOLOv5 checkout)",
        f"look at it:      {_command()} ui {job.config.name}",
        f"go on searching: {_command()} run {job.file or 'STUDY.yaml'} --trials +20",
    ]
    if job.config.builtin_data is not None:
        lines.append(f"your own data:   {_command()} init DATA.yaml -o my-study.yaml")
    for line in lines:
        print_line(line)
