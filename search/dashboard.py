"""Optuna's own dashboard on a study, to be looked at only: requests that would change the study are refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from search.errors import UserInputError, install_extra
from search.launch.mlflow_ui import choose_port
from search.study import open_storage

DEFAULT_PORT = 8080
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Dashboard:
    """A server that is bound to its port; `address` is the study's page."""

    def __init__(self, server: WSGIServer, address: str) -> None:
        self._server = server
        self.address = address

    @classmethod
    def bind(cls, storage_url: str, study: str, host: str, port: int | None = None) -> Dashboard:
        """Opens the study's database and a port.

        Args:
            storage_url: Of the database.
            study: Whose page `address` is.
            host: Interface to listen on; whoever reaches it can read the study.
            port: None for 8080 or, where that is taken, any free port.

        Raises:
            UserInputError: optuna-dashboard is not installed, or the port cannot be had.
        """
        package = _import()
        chosen = choose_port(host, port, DEFAULT_PORT)
        storage = open_storage(storage_url)
        number = storage.get_study_id_from_name(study)
        app = read_only(package.wsgi(storage), allowed_hosts=(host, *LOCAL_HOSTS) if host in LOCAL_HOSTS else None)
        server = make_server(host, chosen, app, server_class=_Server, handler_class=_QuietHandler)
        name = f"[{host}]" if ":" in host else host
        return cls(server, f"http://{name}:{chosen}/dashboard/studies/{number}")

    def serve(self) -> None:
        """Answers until it is interrupted or `close` is called."""
        with self._server:
            self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Ends `serve`."""
        self._server.shutdown()


def read_only(app: WsgiApp, allowed_hosts: tuple[str, ...] | None = None) -> WsgiApp:
    """The application without what changes anything.

    Args:
        app: The dashboard.
        allowed_hosts: Names under which it may be asked, so that no foreign page in the same browser reads it by a
            name of its own that leads here; None for any.
    """

    def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        name = str(environ.get("HTTP_HOST", "")).rpartition(":")[0].strip("[]") or environ.get("HTTP_HOST", "")
        if allowed_hosts is not None and name not in allowed_hosts:
            return _refuse(start, "403 Forbidden", "this name is not allowed here")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD", "OPTIONS"):
            return _refuse(start, "405 Method Not Allowed", "yolosearch shows this study read-only")
        return app(environ, start)

    return answer


def _refuse(start: StartResponse, status: str, reason: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "application/json")])
    return [f'{{"reason": "{reason}"}}'.encode()]


def _import() -> Any:
    try:
        return importlib.import_module("optuna_dashboard")
    except ImportError:
        raise UserInputError(f"optuna-dashboard is not installed; allowed: {install_extra('dashboard')}") from None


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request."""
