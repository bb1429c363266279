"""Looks at everything that a study needs of this host, and says what to do about what is missing."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from search.checkpoints import CheckpointStore
from search.config import StudyConfig
from search.database import mask_url, sqlite_path
from search.errors import DatabaseError, OlderSchemaError, SearchError, UnknownStudyError
from search.ledger import Ledger
from search.ledger.facts import DatabaseFacts, database_facts
from search.settings import TrainSettings
from search.tracking import default_tracking_uri, is_server, mask_secrets, probe_store
from search.worker.existing import open_existing
from yolocore.errors import YolocoreError

FULL_DISK_BYTES = 200e6
LOW_DISK_BYTES = 5e9
LOW_MEMORY_BYTES = 2e9
LOW_SHM_BYTES = 500e6
CLOCK_SECONDS = 2.0

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    name: str
    detail: str
    remedy: str = ""
    """What to do, unless all is well."""

    def to_json(self) -> dict[str, str]:
        """Plain data for `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What to look at.

    Attributes:
        runs_dir: Folder of all studies.
        storage_url: The database; None if none is named and no study either: each study then has a file of its own.
        study: Name of a study in it.
        planned: What the study's file says, where that was given; the study need not exist then.
        checkpoints: Folder or URL for checkpoints; None for the runs folder.
        data: The data set's YAML, where it lies elsewhere on this host.
    """

    runs_dir: Path
    storage_url: str | None
    study: str | None
    planned: StudyConfig | None = None
    checkpoints: str | None = None
    data: Path | None = None


def examine(around: Surroundings) -> Iterator[Finding]:
    """Looks at one thing after the other; no password is in what it finds. Never raises for what it finds."""
    config = around.planned
    yield _guarded("python", _python)
    yield from _several("torch", _torch)
    yield _guarded("memory", _memory)
    yield _guarded("shared memory", _shared_memory)
    yield _guarded("runs folder", lambda: _folder("runs folder", around.runs_dir))
    yield _guarded("temporary files", lambda: _folder("temporary files", Path(tempfile.gettempdir())))
    yield from _several("database", lambda: _database(around.storage_url, is_planned=around.planned is not None))
    if around.study is not None and around.storage_url is not None:
        try:
            ledger = open_existing(around.storage_url, around.study, patience=10.0)
            ledger.check_schema()
            config = StudyConfig.from_json(ledger.study(around.study).config)
        except OlderSchemaError:
            yield Finding(level="warn", name="study", detail="not looked at until the schema is this version's")
        except UnknownStudyError as error:
            if config is None:
                yield _failure("study", error)
            else:
                remedy = "yolosearch create, or run, with its file creates it"
                yield Finding(level="ok", name="study", detail=f"{config.name}: not created yet", remedy=remedy)
                if config.builtin_data is None:  # else it is written when the study is created
                    yield _guarded("data", lambda: _data(None, config, around))
        except SearchError as error:
            yield _failure("study", error)
        else:
            yield _guarded("study", lambda: _study(ledger, config))
            yield _guarded("data", lambda: _data(ledger.study(config.name).fingerprint, config, around))
    if config is not None and config.train.compile != "none":
        yield _guarded("compile", lambda: _compiler(config.train))
    yield _guarded("checkpoints", lambda: _checkpoints(around.checkpoints or str(around.runs_dir)))
    yield _guarded("MLflow", lambda: _tracking(config, around.runs_dir))


def _several(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        for finding in look():
            yield _masked(finding)
    except (SearchError, YolocoreError, OSError) as error:
        yield _failure(name, error)


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return _masked(look())
    except (SearchError, YolocoreError, OSError) as error:
        return _failure(name, error)


def _failure(name: str, error: Exception) -> Finding:
    return _masked(Finding(level="fail", name=name, detail=" ".join(str(error).split()), remedy=_remedy(name, error)))


def _remedy(name: str, error: Exception) -> str:
    text = str(error).lower()
    if "authentic" in text or "401" in text or "403" in text:
        where = (
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if name == "MLflow" else "PGPASSWORD or ~/.pgpass"
        )
        return f"check {where}"
    if "certificate" in text or "ssl" in text:
        return "check sslmode and sslrootcert in the URL, or PGSSLMODE and PGSSLROOTCERT"
    if isinstance(error, DatabaseError):
        return "start the database, or correct the URL (--storage, YOLOSEARCH_STORAGE_URL)"
    return ""


def _masked(finding: Finding) -> Finding:
    return Finding(
        level=finding.level, name=finding.name, detail=mask_secrets(finding.detail), remedy=mask_secrets(finding.remedy)
    )


def _python() -> Finding:
    return Finding(level="ok", name="python", detail=f"{platform.python_version()}, yolosearch {version('yolosearch')}")


def _torch() -> Iterator[Finding]:
    import torch

    from yolocore.device import resolve_device, supported_precisions

    cpu = "/".join(supported_precisions(torch.device("cpu")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(level="ok", name="torch", detail=f"{torch.__version__}, {cores} cores, on the CPU {cpu}")
    for index in range(torch.cuda.device_count()):
        device = resolve_device(f"cuda:{index}")
        free, total = torch.cuda.mem_get_info(device)
        level: Level = "ok" if free > 0.5 * total else "warn"
        yield Finding(
            level=level,
            name=str(device),
            detail=f"{torch.cuda.get_device_name(device)}, {_size(free)} of {_size(total)} free, "
            f"{'/'.join(supported_precisions(device))}, CUDA {torch.version.cuda}",
            remedy=""
            if level == "ok"
            else "another process uses this GPU (nvidia-smi): end it, or expect smaller packs",
        )
    if not torch.cuda.is_available():
        yield _without_gpu()


def _without_gpu() -> Finding:
    if Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        remedy = "update the driver (nvidia-smi names its version), or install a torch that was built for it"
        return Finding(level="warn", name="cuda", detail="the host has a GPU that torch cannot use", remedy=remedy)
    return Finding(level="ok", name="cuda", detail="no GPU here; trials train on the CPU")


def _memory() -> Finding:
    available = _available_memory()
    if available is None:
        return Finding(level="ok", name="memory", detail="unknown: no /proc/meminfo")
    if available < LOW_MEMORY_BYTES:
        remedy = "end other programs, or set train.cache: disk and a smaller train.pack"
        return Finding(level="warn", name="memory", detail=f"{_size(available)} free", remedy=remedy)
    return Finding(level="ok", name="memory", detail=f"{_size(available)} free")


def _available_memory() -> float | None:
    """Of the host, or what the container's limit leaves of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = (_cgroup_number(name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _cgroup_number(name: str) -> float | None:
    try:
        return float((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(level="ok", name="shared memory", detail="none on this system")
    free = shutil.disk_usage(folder).free
    if free < LOW_SHM_BYTES:
        remedy = "with train.workers above 0 batches go through it: docker --shm-size=1g, or WORKER_SHM_SIZE in .env"
        return Finding(level="warn", name="shared memory", detail=f"{_size(free)} free", remedy=remedy)
    return Finding(level="ok", name="shared memory", detail=f"{_size(free)} free")


def _folder(name: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {_size(free)} free" + ("" if existing == folder else ", will be made")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            level="fail", name=name, detail=f"{existing} cannot be written to", remedy="choose another folder"
        )
    if free < LOW_DISK_BYTES:
        level: Level = "fail" if free < FULL_DISK_BYTES else "warn"
        return Finding(level=level, name=name, detail=detail, remedy="make room: yolosearch clean, or another disk")
    return Finding(level="ok", name=name, detail=detail)


def _database(url: str | None, *, is_planned: bool) -> Iterator[Finding]:
    if url is None:
        yield Finding(level="ok", name="database", detail="none named; a study without one has runs/STUDY/study.db")
        return
    file = sqlite_path(url)
    if is_planned and file is not None and not file.exists():
        yield Finding(level="ok", name="database", detail=f"SQLite at {file}, which the study will make")
        return
    facts = database_facts(url)
    yield Finding(level="ok", name="database", detail=f"{facts.product} at {mask_url(url)}")
    yield _schema(facts)
    yield _encryption(facts)
    if abs(facts.clock_offset) > CLOCK_SECONDS:
        detail = f"the database's is {facts.clock_offset:+.1f} s from this host's"
        remedy = "nothing is lost by it (leases run on the database's clock); set up NTP so that times in logs agree"
        yield Finding(level="warn", name="clock", detail=detail, remedy=remedy)
    else:
        yield Finding(level="ok", name="clock", detail=f"{facts.clock_offset:+.2f} s from this host's")


def _schema(facts: DatabaseFacts) -> Finding:
    if facts.owner in {"mlflow", "other"}:
        holder = "MLflow's" if facts.owner == "mlflow" else "another application's"
        remedy = "give studies a database, or a schema (?options=-csearch_path%3DNAME), of their own"
        return Finding(level="fail", name="schema", detail=f"the tables are {holder}", remedy=remedy)
    if facts.revision is None:
        return Finding(
            level="ok", name="schema", detail=f"no tables yet; the first study makes {facts.newest_revision}"
        )
    if facts.revision != facts.newest_revision:
        detail = f"{facts.revision}, of an older yolosearch; this one has {facts.newest_revision}"
        remedy = "stop the old workers; the next create, run or worker of this version upgrades it"
        return Finding(level="warn", name="schema", detail=detail, remedy=remedy)
    return Finding(level="ok", name="schema", detail=f"{facts.revision}, this version's")


def _encryption(facts: DatabaseFacts) -> Finding:
    if facts.encryption is not None or facts.is_local:
        return Finding(level="ok", name="encryption", detail=facts.encryption or "not needed on one host")
    remedy = "outside a private network add ?sslmode=verify-full&sslrootcert=FILE to the URL"
    return Finding(level="warn", name="encryption", detail="the connection is not encrypted", remedy=remedy)


def _study(ledger: Ledger, config: StudyConfig) -> Finding:
    counts = ", ".join(f"{count} {state.lower()}" for state, count in ledger.counts(config.name).items() if count)
    record = ledger.study(config.name)
    reason = record.stop_reason
    if reason is not None and record.stop_kind is not None and record.stop_kind.is_planned:
        remedy = "yolosearch resume, or run with its file, takes it up again"
        return Finding(level="ok", name="study", detail=f"{config.name} stopped: {reason}", remedy=remedy)
    if reason is not None:
        remedy = "mend the cause, then yolosearch retry, or run with its file"
        return Finding(level="warn", name="study", detail=f"{config.name} stopped: {reason}", remedy=remedy)
    return Finding(level="ok", name="study", detail=f"{config.name}: {counts}")


def _data(wanted: str | None, config: StudyConfig, around: Surroundings) -> Finding:
    """The data on this host, against the fingerprint of the study's where it exists."""
    from search.worker.session import data_yaml
    from yolocore.data.dataset import fingerprint, load_dataset_config

    path = around.data or data_yaml(config, around.runs_dir)
    found = fingerprint(load_dataset_config(path, single_class=config.train.single_cls))
    if wanted is None:
        return Finding(level="ok", name="data", detail=f"{path}, fingerprint {found}")
    if found != wanted:
        detail = f"{path} has the fingerprint {found}, the study {wanted}"
        remedy = "bring the same images, labels and names here, or name them: --data, YOLOSEARCH_DATA_ROOT"
        return Finding(level="fail", name="data", detail=detail, remedy=remedy)
    return Finding(level="ok", name="data", detail=f"{path}, fingerprint {found}, the study's")


def _compiler(train: TrainSettings) -> Finding:
    from yolocore.device import resolve_device
    from yolocore.training.compiled import require_compiler

    require_compiler(train.compile, resolve_device(train.device).type)
    return Finding(level="ok", name="compile", detail=f"{train.compile}, what it needs is here")


def _checkpoints(root: str) -> Finding:
    """Writes, reads and deletes one where workers would."""
    store = CheckpointStore(root, f"doctor-{secrets.token_hex(4)}")
    made = [] if not store.is_local else [path for path in Path(str(store)).parents if not path.exists()]
    try:
        reference = store.save(0, 1, 1, {"probe": 1})
        store.load(0, 1, reference)
    finally:
        store.clear()
        for folder in made:  # the root itself, which the first study makes
            with suppress(OSError):  # somebody else writes to it by now
                folder.rmdir()
    return Finding(level="ok", name="checkpoints", detail=f"{mask_url(root)} can be written, read and deleted from")


def _tracking(config: StudyConfig | None, runs_dir: Path) -> Finding:
    if config is not None and not config.tracking.enabled:
        return Finding(level="ok", name="MLflow", detail="off in this study")
    uri = (None if config is None else config.tracking.uri) or default_tracking_uri(runs_dir)
    detail = probe_store(uri)
    if uri.startswith("http://") and (os.environ.get("MLFLOW_TRACKING_PASSWORD") or "@" in uri) and not _is_here(uri):
        remedy = "outside a private network use https://"
        return Finding(level="warn", name="MLflow", detail=f"{detail}, its password goes unencrypted", remedy=remedy)
    return Finding(level="ok", name="MLflow", detail=f"{detail}{', reachable' if is_server(uri) else ''}")


def _is_here(uri: str) -> bool:
    return uri.partition("://")[2].rpartition("@")[2].startswith(("127.", "localhost", "[::1]"))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
