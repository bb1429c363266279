"""A PostgreSQL that speaks TLS only, with a certificate made for the occasion, and wants a password."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

PASSWORD = "p4ssw0rd-of-the-database"


@dataclass(frozen=True)
class SecurePostgres:
    """Where it listens and which certificate it shows; its name there is `localhost`."""

    port: int
    certificate: Path
    other: Path
    """A certificate that is not its own."""

    def url(self, host: str = "localhost", **options: object) -> str:
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return f"postgresql://studies@{host}:{self.port}/postgres?{query}"


def programs() -> Path:
    """Folder of a PostgreSQL that was built with TLS; the one in the wheel was not."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").is_file():
            return folder
    found = shutil.which("initdb")
    if found is None or shutil.which("openssl") is None:
        pytest.skip("needs openssl and a PostgreSQL that was built with it, such as Debian's postgresql package")
    return Path(found).resolve().parent


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*words, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return key, certificate


@contextmanager
def secure_postgres() -> Iterator[SecurePostgres]:
    folder, user = Path(tempfile.mkdtemp(prefix="yolosearch-tls-")), "nobody" if os.getuid() == 0 else None
    folder.chmod(0o755)
    data = folder / "data"
    data.mkdir()
    key, certificate = make_certificate(folder, "server")
    _, other = make_certificate(folder, "other")
    (folder / "password").write_text(PASSWORD)
    for path in (data, key, folder / "password"):
        path.chmod(0o700 if path is data else 0o600)
        if user is not None:
            shutil.chown(path, user)
    words = [programs() / "initdb", "--username=studies", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    subprocess.run([*words, "-N", "-D", data], check=True, capture_output=True, user=user, cwd=folder)
    (data / "pg_hba.conf").write_text("hostssl all all all scram-sha-256\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key, "unix_socket_directories": ""}
    settings |= {"listen_addresses": "localhost", "port": port, "fsync": "off"}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    command = [programs() / "postgres", "-D", data, *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, user=user, cwd=folder)
    try:
        server = SecurePostgres(port, certificate, other)
        wait_for_answer(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)  # an immediate shutdown: the data is thrown away
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_answer(server: SecurePostgres, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(server.url(sslmode="require"), password=PASSWORD).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None
            assert time.monotonic() < deadline
        time.sleep(0.1)
