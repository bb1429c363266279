"""Starts workers as actors of a Ray cluster and looks after them; the only module that knows Ray.

Ray finds each worker a node with the share of a GPU that it asks for, makes the cluster larger where it can, and
notices when an actor or a node dies. It decides nothing about trials: an actor only holds an ordinary worker process,
and what Ray loses the ledger gives back.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from search.config import StudyConfig
from search.database import STORAGE_URL_VARIABLE, mask_url, sqlite_path
from search.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    DatabaseError,
    SearchError,
    UserInputError,
    install_extra,
)
from search.launch.launcher import RestartPolicy, WorkerPhase, WorkerView, study_progress
from search.launch.plan import GPU_VARIABLE, LaunchPlan, Seat
from search.ledger import SEARCH, Ledger
from search.paths import RUNS_DIR_VARIABLE, StudyFolder
from yolocore.host import WORKERS_VARIABLE

logger = logging.getLogger(__name__)

Placement = Literal["spread", "pack"]

FORWARDED_VARIABLES = (
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "PGAPPNAME",
    "PGCHANNELBINDING",
    "PGCLIENTENCODING",
    "PGCONNECT_TIMEOUT",
    "PGDATABASE",
    "PGGSSDELEGATION",
    "PGGSSENCMODE",
    "PGGSSLIB",
    "PGHOST",
    "PGHOSTADDR",
    "PGKRBSRVNAME",
    "PGLOADBALANCEHOSTS",
    "PGMAXPROTOCOLVERSION",
    "PGMINPROTOCOLVERSION",
    "PGOPTIONS",
    "PGPASSWORD",
    "PGPORT",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGSERVICE",
    "PGSSLCERTMODE",
    "PGSSLCOMPRESSION",
    "PGSSLMAXPROTOCOLVERSION",
    "PGSSLMINPROTOCOLVERSION",
    "PGSSLMODE",
    "PGSSLNEGOTIATION",
    "PGSSLSNI",
    "PGTARGETSESSIONATTRS",
    "PGUSER",
    "YOLOSEARCH_CHECKPOINTS",
    "YOLOSEARCH_OPTUNA_GRPC",
)
"""What a worker needs of the launcher's environment: all that a database's URL may leave to libpq's variables, and
MLflow's of the connection. All else, such as keys of an object store, is the node's own."""
FORWARDED_FILES = (
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "PGPASSFILE",
    "PGSERVICEFILE",
    "PGSSLCERT",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGSSLKEY",
    "PGSSLROOTCERT",
    "PGSYSCONFDIR",
)
"""Files of it, for a node that does not say in its own environment where they lie there."""

CONNECT_SECONDS = 10.0
KILL_GRACE_SECONDS = 2.0
"""A worker ends by itself within the plan's `stop_seconds`; its actor kills it so much later, and the launcher kills
the actor so much after that."""
WAIT_NOTICE_SECONDS = 30.0
"""After so long without room in the cluster the launcher says what a worker waits for; then ten times as rarely."""
LOOK_SECONDS = 2.0
"""Between two looks at the study on behalf of workers that wait for room."""
OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Of a cluster made for the occasion: nothing but a few words goes through Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayShare:
    """What every worker asks of the cluster, and where Ray puts them.

    Attributes:
        gpus: 0, or a GPU or a part of one; None means `1 / per_gpu` where the cluster has GPUs and the study wants one.
        cpus: Cores that Ray sets aside; also the number of threads of a trainer.
        placement: `spread` over as many nodes as there are; `pack` onto as few, all of them at once or none.
    """

    gpus: float | None = None
    cpus: float = 1.0
    placement: Placement = "spread"

    def __post_init__(self) -> None:
        if self.gpus is not None and not 0 <= self.gpus <= 1:
            raise UserInputError(f"--gpus-per-worker: got {self.gpus:g}; allowed: 0 to 1, for example 0.5")
        if self.cpus < 0:
            raise UserInputError(f"--cpus-per-worker: got {self.cpus:g}; allowed: 0 or more")
        if self.placement not in get_args(Placement):
            raise UserInputError(f"--placement: got {self.placement!r}; allowed: {', '.join(get_args(Placement))}")


def launch_on_ray(
    plan: LaunchPlan, ledger: Ledger, address: str | None = None, share: RayShare | None = None
) -> RayLauncher:
    """Workers on a Ray cluster; they start when the launcher is entered.

    Args:
        plan: What to start. Its devices and GPUs are left to Ray.
        ledger: Of the study.
        address: `local` for a cluster of this process alone, `auto` (the default) for the one of this host or of
            `RAY_ADDRESS`, `HOST:PORT`, or `ray://HOST:PORT` from outside of the cluster.
        share: What every worker asks for.

    Raises:
        UserInputError: Ray is not installed.
    """
    import_ray()
    return RayLauncher(plan, ledger, address or "auto", share or RayShare())


# ---------------------------------------------------------------------------------------------------------------------
# On the nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What an actor is told. It travels as an argument, which Ray shows nowhere; `repr` holds no secret either."""

    plan: LaunchPlan = field(repr=False)
    worker_id: str
    seat: Seat
    environment: Mapping[str, str] = field(repr=False)
    seconds_left: float | None
    only_host: str | None
    """The one host that sees the database, if it is a file."""


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker ended."""

    code: int | None
    """Of its process; None where nobody lived to see it."""
    words: str

    @property
    def killed(self) -> bool:
        """Whether it had no chance to hand its tickets back."""
        return self.code is None or self.code < 0


@dataclass(frozen=True, slots=True)
class Spot:
    """Where Ray put an actor."""

    host: str
    gpus: tuple[str, ...]
    log: str

    @property
    def label(self) -> str:
        """In a few letters, for people."""
        return f"{self.host} gpu {','.join(self.gpus)}" if self.gpus else self.host


class WorkerActor:
    """One worker's place on a node: starts its process, waits for its end, and ends it when asked to.

    The worker is the same process as everywhere else, with signals, trainer and log of its own. It ends by itself when
    this actor's process is gone.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def spot(self, folder: StudyFolder, seat_name: str, gpus: float) -> Spot:
        """Where this is; answers as soon as Ray has found room."""
        visible = os.environ.get(GPU_VARIABLE, "") if gpus else ""
        numbers = tuple(word for word in visible.split(",") if word)
        return Spot(platform.node(), numbers, str(_node_folder(folder).log(seat_name)))

    def run(self, task: WorkerTask, log: str) -> WorkerEnd:
        """A worker from its start to its end."""
        if task.only_host not in {None, platform.node()}:
            return WorkerEnd(
                EXIT_BAD_INPUT,
                f"SQLite is for one host: {task.only_host} has the file, the worker was put on {platform.node()}; "
                "allowed: PostgreSQL, or a cluster of that host alone",
            )
        path = Path(log)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as output:
                process = self._start(task, output.fileno())
        except OSError as error:
            return WorkerEnd(None, f"{error.filename}: {error.strerror} on {platform.node()}")
        if process is None:
            return WorkerEnd(EXIT_INTERRUPTED, "stopped before it started")
        code = process.wait()
        words = _last_line(path) if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return WorkerEnd(code, f"{words} (log: {path} on {platform.node()})")

    def stop(self, seconds: float) -> None:
        """Asks the worker to hand its tickets back; kills it, with its trainer, if it takes longer."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self, task: WorkerTask, output: int) -> subprocess.Popen[bytes] | None:
        plan = replace(task.plan, folder=_node_folder(task.plan.folder))
        words = plan.worker_command(task.worker_id, task.seat, parent=os.getpid(), seconds_left=task.seconds_left)
        with self._lock:
            if self._stopped:
                return None
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_on_node(task.environment, os.environ),
                # Its own session: what Ray does to the actor's process group is not the worker's end.
                start_new_session=True,
            )
            return self._process


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the launcher's environment goes to the nodes."""
    names = (*FORWARDED_VARIABLES, *FORWARDED_FILES)
    return {name: value for name in names if (value := environment.get(name))}


def environment_on_node(sent: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment: the node's own, and over it what the launcher sent, but for places of files."""
    return {**own, **{name: value for name, value in sent.items() if not (name in FORWARDED_FILES and own.get(name))}}


def _node_folder(folder: StudyFolder) -> StudyFolder:
    """The study's files on this node: where its environment says, otherwise at the launcher's path."""
    own = os.environ.get(RUNS_DIR_VARIABLE)
    return replace(folder, runs_dir=Path(own).resolve()) if own else folder


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


# ---------------------------------------------------------------------------------------------------------------------
# The launcher


@dataclass(slots=True)
class _Place:
    """One worker's place in the cluster, whichever actor is in it."""

    index: int
    name: str
    worker_id: str = ""
    starts: int = 0
    actor: Any = None
    asked_at: float = 0.0
    awaited: Any = None
    """The call whose answer comes next: where the actor is, then how its worker ended."""
    runs: bool = False
    spot: Spot | None = None
    end: WorkerEnd | None = None
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    done: bool = False
    given_up: bool = False


class RayLauncher:
    """Workers in actors of a Ray cluster; see `search.launch.launcher.Launcher` for the contract.

    Every start is a new actor under a new worker's name, made here and not by Ray's own `max_restarts`: so it is known
    whose tickets to release, and an actor that was taken for dead and is not cannot be mistaken for its successor.
    """

    def __init__(self, plan: LaunchPlan, ledger: Ledger, address: str, share: RayShare) -> None:
        self.failures: list[str] = []
        self.bad_input = False
        self._plan = plan
        self._ledger = ledger
        self._address = address
        self._share = share
        self._places: list[_Place] = []
        self._started = time.monotonic()
        self._stopping = False
        self._notice_at = WAIT_NOTICE_SECONDS
        self._look_at = 0.0

    def __enter__(self) -> Self:
        self._cluster = _Cluster(self._address)
        try:
            self._gpus = self._gpus_per_worker()
            self._cluster.reserve(self._share, self._gpus, self._plan.workers)
            for index in range(self._plan.workers):
                place = _Place(index, f"{platform.node()}-{os.getpid()}-{index}")
                self._places.append(place)
                self._ask(place)
        except BaseException:
            self._cluster.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def poll(self) -> bool:
        """Looks after the workers once; True while one runs, or waits for room or for its restart."""
        awaited = [ref for place in self._places if (ref := place.awaited) is not None]
        answered = set(self._cluster.wait(awaited, 0))
        try:
            for place in self._places:
                if not place.done:
                    self._look_after(place, answered)
            self._spare_those_without_room()
        except DatabaseError as error:
            logger.warning("the database is away, and the workers are looked after later: %s", error)
        return not all(place.done for place in self._places)

    def views(self) -> tuple[WorkerView, ...]:
        """All workers, by number."""
        return tuple(self._view(place) for place in self._places)

    def stop(self) -> None:
        """Asks all workers to hand their tickets back, and ends those that do not in time."""
        self._stopping = True
        held = [place for place in self._places if place.actor is not None]
        try:
            killed = self._stop_actors(held)
        finally:
            for place in held:
                self._drop(place)
            self._cluster.close()
        try:
            self._hand_back(killed)
        except DatabaseError as error:
            logger.warning("what killed workers held is free when its lease ends, the database is away: %s", error)

    # -- one place ----------------------------------------------------------------------------------------------------

    def _look_after(self, place: _Place, answered: set[Any]) -> None:
        if place.end is not None:
            self._conclude(place, place.end)
        elif place.actor is None:
            if place.restart.is_due:
                self._ask(place)
        elif place.awaited in answered:
            answer = self._cluster.result(place.awaited)
            if isinstance(answer, Spot):
                self._start(place, answer)
            else:
                place.end = answer
                self._conclude(place, answer)

    def _ask(self, place: _Place) -> None:
        """Asks Ray for a new actor; it comes when there is room."""
        # A new name for every start: what the dead one still held is told apart from what the new one claims.
        place.worker_id = f"{place.name}.{place.starts}"
        place.starts += 1
        place.asked_at = time.monotonic()
        place.spot = None
        place.actor = self._cluster.new_actor(place.worker_id, place.index)
        place.awaited = place.actor.spot.remote(self._plan.folder, place.name, self._gpus)

    def _start(self, place: _Place, spot: Spot) -> None:
        """Starts the worker: its actor is there."""
        place.spot = spot
        place.awaited = place.actor.run.remote(self._task(place), spot.log)
        place.runs = True

    def _conclude(self, place: _Place, end: WorkerEnd) -> None:
        # First all that needs the database: while that is away the place stays as it is, and is looked at again.
        if end.code != 0:
            self._ledger.release_worker(place.worker_id)
        is_over = end.code in {0, EXIT_STOPPED} or self._is_stopped()
        given_up = not is_over and (end.code == EXIT_BAD_INPUT or place.restart.gives_up(self._progress()))
        self._drop(place)
        place.done = is_over or given_up
        if given_up:
            place.given_up = True
            self.bad_input |= end.code == EXIT_BAD_INPUT
            how = "died with its actor" if end.code is None else f"ended with exit code {end.code}"
            self.failures.append(f"worker {place.worker_id} {how}: {end.words}")
        elif not place.done:
            logger.warning("worker %s is started again: %s", place.worker_id, end.words)
            place.restart.postpone()

    def _drop(self, place: _Place) -> None:
        """Gives an actor's room back; whatever still runs there ends."""
        if place.actor is not None:
            self._cluster.kill(place.actor)
        place.actor = place.awaited = place.end = None
        place.runs = False

    def _task(self, place: _Place) -> WorkerTask:
        plan, timeout = self._plan, self._plan.timeout
        environment = forwarded(os.environ)
        environment[STORAGE_URL_VARIABLE] = plan.storage_url
        if place.spot is not None:
            # At most: a trainer takes no more than its part of the host's memory and cores.
            room = self._cluster.room_on(place.spot.host, self._share.cpus, self._gpus)
            environment[WORKERS_VARIABLE] = str(max(1, min(plan.workers, room)))
        # Ray shows an actor its GPUs only, which are its first ones; without any it may show all.
        seat = Seat(index=place.index, device="cuda" if self._gpus else "cpu")
        if not self._gpus:
            environment[GPU_VARIABLE] = ""
        return WorkerTask(
            plan=replace(plan, storage_url=""),
            worker_id=place.worker_id,
            seat=seat,
            environment=environment,
            seconds_left=None if timeout is None else timeout - (time.monotonic() - self._started),
            only_host=platform.node() if sqlite_path(plan.storage_url) is not None else None,
        )

    def _view(self, place: _Place) -> WorkerView:
        return WorkerView(
            index=place.index,
            worker_id=place.worker_id,
            phase=self._phase(place),
            pid=None,
            place=place.spot.label if place.spot is not None else "",
            restarts=max(0, place.starts - 1),
            log=place.spot.log if place.spot is not None else "",
        )

    def _phase(self, place: _Place) -> WorkerPhase:
        if place.runs:
            return "stops" if self._stopping else "runs"
        if place.given_up:
            return "given up"
        return "done" if place.done else "waits"

    # -- the study and the cluster ------------------------------------------------------------------------------------

    def _gpus_per_worker(self) -> float:
        """The share of a GPU that each worker asks for."""
        if self._share.gpus is not None:
            return self._share.gpus
        device = StudyConfig.from_json(self._ledger.study(self._plan.folder.study).config).train.device
        wants_gpu = device == "auto" or device.startswith("cuda")
        # Ray counts in ten-thousandths, and rounds up: the last of seven sevenths would find no room.
        share = math.floor(10_000 / self._plan.per_gpu) / 10_000
        return share if wants_gpu and self._cluster.total("GPU") else 0.0

    def _is_stopped(self) -> bool:
        """Whether the search gives out no more tickets: a new worker would end like the last one."""
        return SEARCH in self._plan.kinds and self._ledger.study(self._plan.folder.study).stop_reason is not None

    def _progress(self) -> int:
        return study_progress(self._ledger, self._plan.folder.study)

    def _nothing_left(self) -> bool:
        """Whether a worker that waits for room would find nothing to do."""
        timeout = self._plan.timeout
        if timeout is not None and time.monotonic() - self._started > timeout:
            return True
        kinds = self._plan.kinds
        return self._is_stopped() or not any(self._ledger.open_counts(self._plan.folder.study, kinds).values())

    def _spare_those_without_room(self) -> None:
        """Workers that wait for room need not come where nothing is left to do; otherwise says what they wait for."""
        now = time.monotonic()
        waiting = [place for place in self._places if place.actor is not None and not place.runs]
        if not waiting or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if self._nothing_left():
            for place in waiting:
                self._drop(place)
                place.done = True
            return
        longest = max(now - place.asked_at for place in waiting)
        if longest > self._notice_at:
            self._notice_at = 10 * longest
            logger.warning(
                "%d of %d workers wait for room in the cluster: each asks for %g CPU and %g GPU; free now: %s",
                len(waiting),
                len(self._places),
                self._share.cpus,
                self._gpus,
                self._cluster.free(),
            )

    def _stop_actors(self, places: list[_Place]) -> set[str]:
        """Asks them all at once; names of the workers that did not answer in time."""
        running = {place.worker_id: place.awaited for place in places if place.runs}
        seconds = self._plan.stop_seconds + KILL_GRACE_SECONDS
        for place in places:
            if place.runs:
                place.actor.stop.remote(seconds)
        ended = self._cluster.wait(list(running.values()), seconds + KILL_GRACE_SECONDS)
        return {name for name, ref in running.items() if ref not in ended or self._cluster.result(ref).killed}

    def _hand_back(self, names: set[str]) -> None:
        """Frees what workers held that had to be killed; they were asked to end, so no trial is charged."""
        self._ledger.hand_back(self._ledger.held_by(names))


# ---------------------------------------------------------------------------------------------------------------------
# Ray itself


class _Cluster:
    """A connection to a Ray cluster, in this project's words."""

    def __init__(self, address: str) -> None:
        self._ray = import_ray()
        # A program that has Ray at hand already, such as a notebook, keeps its connection.
        self._owns = not self._ray.is_initialized()
        self._grows = address != "local"
        self._group: Any = None
        self._options: dict[str, Any] = {}
        if self._owns:
            _connect(self._ray, address)

    def close(self) -> None:
        """Gives back what was reserved; a local cluster ends."""
        with suppress(self._ray.exceptions.RayError, ConnectionError):
            if self._group is not None:
                self._ray.util.remove_placement_group(self._group)
                self._group = None
        if self._owns:
            self._ray.shutdown()

    def reserve(self, share: RayShare, gpus: float, workers: int) -> None:
        """Sets what every actor asks for.

        Raises:
            UserInputError: More than a cluster that cannot grow will ever have.
        """
        needed = workers if share.placement == "pack" else 1
        for name, each, option in (("CPU", share.cpus, "cpus"), ("GPU", gpus, "gpus")):
            if not self._grows and needed * each > self.total(name):
                raise UserInputError(
                    f"--{option}-per-worker: {needed} x {each:g}, and this host has {self.total(name):g} {name}; "
                    "allowed: less, or the --address of a larger cluster"
                )
        # No restarts by Ray: see RayLauncher. Two calls at a time: `run` lasts, and `stop` comes in between.
        self._options = {"num_cpus": share.cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 2}
        if share.placement == "spread":
            self._options["scheduling_strategy"] = "SPREAD"
        else:
            # A bundle has to ask for something; an empty one is a hundredth of a core.
            bundle = {"CPU": share.cpus or 0.01, **({"GPU": gpus} if gpus else {})}
            self._group = self._ray.util.placement_group([bundle] * workers, strategy="PACK")

    def new_actor(self, name: str, index: int) -> Any:
        """An actor that waits for its room; nothing about a study is in what Ray shows of it but its name."""
        options = {**self._options, "name": name}
        if self._group is not None:
            strategies = self._ray.util.scheduling_strategies
            options["scheduling_strategy"] = strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=index
            )
        return self._ray.remote(WorkerActor).options(**options).remote()

    def kill(self, actor: Any) -> None:
        """Ends an actor's process at once, if it can be reached."""
        with suppress(self._ray.exceptions.RayError, ConnectionError):
            self._ray.kill(actor, no_restart=True)

    def wait(self, refs: list[Any], seconds: float) -> list[Any]:
        """Those of `refs` that have an answer within `seconds`, or will never have one.

        Raises:
            SearchError: The cluster is gone.
        """
        try:
            return self._ray.wait(refs, num_returns=len(refs), timeout=seconds)[0] if refs else []
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise SearchError(
                f"the Ray cluster is gone ({_words(error)}): its workers end with it; the same command goes on with "
                "their trials, at the latest when their leases end"
            ) from None

    def result(self, ref: Any) -> Any:
        """A call's answer; a `WorkerEnd` where the actor did not live to give it."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return WorkerEnd(None, _words(error))

    def total(self, resource: str) -> float:
        """What all nodes have together."""
        return float(self._ray.cluster_resources().get(resource, 0.0))

    def room_on(self, host: str, cpus: float, gpus: float) -> int:
        """How many workers fit on one host at once."""
        asked = {name: each for name, each in (("CPU", cpus), ("GPU", gpus)) if each}
        here = [node for node in self._ray.nodes() if node["Alive"] and node["NodeManagerHostname"] == host]
        fits = [min(node["Resources"].get(name, 0.0) / each for name, each in asked.items()) for node in here if asked]
        return sum(map(int, fits)) or 1

    def free(self) -> str:
        """What nobody uses now."""
        now = self._ray.available_resources()
        return ", ".join(f"{now.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def import_ray() -> Any:
    """Ray, told to report nothing to anybody.

    Raises:
        UserInputError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UserInputError(f"--on ray: ray is not installed ({error}): {install_extra('ray')}") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Joins a cluster, or makes one of this host for `local`.

    Raises:
        UserInputError: None is there, or it does not want us; naming the address.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # Ray listens on all interfaces, and by default asks for a token. One that only this process and its children
        # know keeps others out, and spares the user's home a file.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _forget_token(ray)
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        _knock(address)
    try:
        with _signals_kept():
            ray.init(address=address, **options)
    except (ray.exceptions.RayError, ImportError, ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, _words(error)) from None


def _forget_token(ray: Any) -> None:
    """Lets Ray read its token anew: it keeps the first one of a process, and a notebook may have used Ray before."""
    with suppress(AttributeError):  # not in versions before tokens
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _knock(address: str) -> None:
    """Ray itself tries for minutes, and then ends the whole process."""
    where = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if where == "auto" or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(where, str(error)) from None


def _no_cluster(address: str, why: str) -> UserInputError:
    return UserInputError(
        f"--address: got {address!r}: {mask_url(why)}; "
        "allowed: local, auto (a cluster on this host, or RAY_ADDRESS), HOST:PORT, ray://HOST:PORT"
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray installs a handler of SIGTERM that ends the process at once; workers would not be asked to hand back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _words(error: Exception) -> str:
    """What happened, of the many lines that Ray has for it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    deaths = [line.partition(". ")[0] for line in lines if line.startswith("The actor is dead because")]
    deaths += [line.partition(". ")[0] for line in lines if line.startswith("The actor died because its")]
    raised = [line for line in lines if "Error:" in line.partition(" ")[0]]
    return next(iter([*raised[-1:], *deaths, *lines]), type(error).__name__)
