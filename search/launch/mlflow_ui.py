"""The process behind `yolosearch ui`: MLflow's own server on the store of the studies.

It listens on 127.0.0.1 unless told otherwise, serves the artifacts, keeps one web worker and no job runner (together
some 230 MB less), and is ended with its whole process group. The store's URI goes by the environment, since everybody
on the machine can read a command line.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from search.errors import UserInputError
from search.tracking import (
    PRIVACY_ENVIRONMENT,
    TrackingError,
    TrackingUnavailableError,
    checked_tracking_uri,
    is_server,
    mask_secrets,
    prepare_store,
)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 5000
START_SECONDS = 90.0
STOP_SECONDS = 10.0
LOG_NAME = "mlflow-ui.log"


def server_command(host: str, port: int, artifact_root: Path, allowed_hosts: str | None = None) -> list[str]:
    """The command line of the server; `server_environment` belongs to it.

    Args:
        host: interface to listen on.
        port: to listen on.
        artifact_root: where artifacts go that clients send to this server.
        allowed_hosts: names by which browsers may call it, for `--host 0.0.0.0`; None for MLflow's default, which is
            localhost and private addresses.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifact_root.resolve().as_uri()]
    return command + (["--allowed-hosts", allowed_hosts] if allowed_hosts else [])


def server_environment(uri: str, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` plus the store, and without what would make the server slow, noisy or talkative."""
    own = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        **PRIVACY_ENVIRONMENT,
    }
    # Meant for clients; the server would take them for its own logging and store.
    client_only = {"MLFLOW_TRACKING_URI", "MLFLOW_LOGGING_LEVEL", "MLFLOW_REGISTRY_URI"}
    return {key: value for key, value in environment.items() if key not in client_only} | own


def choose_port(host: str, port: int | None, usual: int = DEFAULT_PORT) -> int:
    """The port to listen on: the asked one, or the usual one, or any free one if that is taken and none was asked for.

    Raises:
        UserInputError: the asked port is taken or not allowed, or the host is none of this machine's.
    """
    try:
        return _bound_port(host, usual if port is None else port)
    except (OSError, OverflowError) as error:
        if port is not None:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserInputError(
                f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
            ) from None
    try:
        return _bound_port(host, 0)
    except OSError as error:
        raise UserInputError(f"cannot listen on {host}: {error.strerror}; choose another --host") from None


def _bound_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


class MlflowUi:
    """A running server: `start` it, `wait` for its end or for Ctrl-C, `stop` it or use it in a `with` statement."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, log_path: Path) -> None:
        """Takes over a process that leads its own process group."""
        self._process = process
        self._host = host
        self._port = port
        self._stopped = False
        self.log_path = log_path

    @classmethod
    def start(
        cls,
        uri: str,
        runs_dir: Path,
        *,
        host: str = DEFAULT_HOST,
        port: int | None = None,
        allowed_hosts: str | None = None,
    ) -> MlflowUi:
        """Starts the server and returns at once; `wait_until_healthy` says when it answers.

        Args:
            uri: the studies' tracking store; a missing SQLite file is created.
            runs_dir: holds the artifacts (`mlartifacts`) and the server's log.
            host: interface to listen on.
            port: None for 5000 or, where that is taken, any free port.
            allowed_hosts: see `server_command`.

        Raises:
            UserInputError: the store is a server already, or the port cannot be had.
            TrackingError: the store cannot be made.
        """
        uri = checked_tracking_uri(uri)
        if is_server(uri):
            raise UserInputError(f"the records are on an MLflow server already: open {mask_secrets(uri)} in a browser")
        artifact_root = runs_dir / "mlartifacts"
        chosen = choose_port(host, port)
        prepare_store(uri, artifact_root)
        log_path = runs_dir / LOG_NAME
        runs_dir.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                server_command(host, chosen, artifact_root, allowed_hosts),
                env=server_environment(uri, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C reaches us alone, and the server is ended with all of its children.
                start_new_session=True,
            )
        return cls(process, host, chosen, log_path)

    @property
    def address(self) -> str:
        """What to open in a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    @property
    def pid(self) -> int:
        """The server's process, which leads the group of all that it started."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._process.poll() is None

    def wait_until_healthy(self, timeout: float = START_SECONDS) -> None:
        """Returns as soon as the server answers on /health.

        Raises:
            TrackingError: it ended, with its last words.
            TrackingUnavailableError: it did not answer within `timeout` seconds; it is left running.
        """
        # No proxy from the environment: the address is this machine's.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.running:
                raise TrackingError(f"MLflow's server ended with code {self._process.returncode}: {self._last_words()}")
            try:
                with opener.open(f"{self.address}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TrackingUnavailableError(f"MLflow's server did not answer within {timeout:g} s, see {self.log_path}")

    def wait(self) -> int:
        """Blocks until the server ends or a Ctrl-C or SIGTERM reaches us, and stops it. Returns its exit code."""
        with suppress(KeyboardInterrupt), _sigterm_as_interrupt():
            self._process.wait()
        return self.stop()

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """Ends the server and what it started, after `timeout` seconds by force. May be repeated. Returns its code."""
        if self._stopped:
            return self._process.wait()
        self._stopped = True
        self._signal_group(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        # Whatever of the group outlived its leader.
        self._signal_group(signal.SIGKILL)
        return self._process.wait()

    def __enter__(self) -> MlflowUi:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return mask_secrets(words[-1])[:400] if words else f"it said nothing, see {self.log_path}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that a service manager's stop does not leave the server behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Not the main thread, which alone may set handlers.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
