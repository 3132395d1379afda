"""The image, and what is deployed with it: checked as far as that goes without a container runtime and a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from embed_assets_tests.conftest import REPOSITORY, Project, topic
from embed_assets_tests.defs.test_deploy import postgres  # noqa: F401 (a fixture)
from embed_assets_tests.s3 import free_port

BIN = Path(sys.executable).parent

LINES = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.partition(" ")[::2] for line in LINES if line and not line.startswith("#")]
ARGUMENTS = dict(line.partition("=")[::2] for name, line in INSTRUCTIONS if name == "ARG")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_image_is_made_of_what_is_here() -> None:
    extras = set(ARGUMENTS["EXTRAS"].split(","))
    assert extras <= set(PROJECT["optional-dependencies"]), "extras that do not exist"
    assert {"ui", "postgres", "k8s", "plus"} <= extras, "what deploy/ and build.yaml need"
    sent = [line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()]
    for name, line in INSTRUCTIONS:
        if name == "COPY":
            for source in [word for word in line.split()[:-1] if not word.startswith("--")]:
                assert (REPOSITORY / source).exists()
                assert any(fnmatch(source, pattern.removesuffix("/**")) for pattern in sent), f"{source} is not sent"
    assert re.search("^torch==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)


def test_the_image_runs_as_a_user_by_number() -> None:
    users = [line for name, line in INSTRUCTIONS if name == "USER"]
    assert users == ["1000:1000"], "Kubernetes can't tell from a name that it is not root"
    after = [line for name, line in INSTRUCTIONS[INSTRUCTIONS.index(("USER", users[0])) :] if name == "RUN"]
    assert not any("pip install" in line or "useradd" in line for line in after)


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_the_build_argument_chooses_torch(device: str, tmp_path: Path) -> None:
    [command] = [line for name, line in INSTRUCTIONS if name == "RUN" and "$DEVICE" in line]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@" from "$PIP_INDEX_URL"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device, "CPU_INDEX": "the CPUs' own"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    torch = next(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    said = {
        "cpu": (0, f"install {torch} from the CPUs' own\n", ""),
        "cuda": (0, f"install {torch} from \n", ""),
        "tpu": (1, "", "DEVICE must be cpu or cuda, got 'tpu'\n"),
    }
    assert (done.returncode, done.stdout, done.stderr) == said[device]


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / "deploy" / name).read_text()))


def test_with_gpus_every_service_of_ours_uses_the_other_image() -> None:
    services, gpu = load("compose.yaml")["services"], load("compose.gpu.yaml")["services"]
    ours = {name for name, service in services.items() if "build" in service}
    assert gpu.keys() == ours == {"code", "webserver", "daemon"}
    assert {service["image"] for service in gpu.values()} == {"embed-assets:cuda"}
    assert all(service["build"]["args"] == {"DEVICE": "cuda"} for service in gpu.values())
    [device] = gpu["code"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["webserver"]["ports"] == ["127.0.0.1:3000:3000"], "it has no login"


@contextmanager
def running(command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    program, *arguments = shlex.split(command)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(BIN / program), *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(is_done: Callable[[], bool], processes: Mapping[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    until = time.monotonic() + 300
    while not is_done():
        for name, (process, log) in processes.items():
            assert process.poll() is None, f"{name} ended: {log.read_text()[-3000:]}"
        assert time.monotonic() < until, {name: log.read_text()[-2000:] for name, (_, log) in processes.items()}
        time.sleep(0.5)


def is_loaded(port: int) -> bool:
    query = {"query": "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", json.dumps(query).encode(), {"Content-Type": "application/json"}
    )
    try:
        found = json.load(urllib.request.urlopen(request, timeout=10))["data"]["repositoriesOrError"]
    except OSError:
        return False
    return [node["location"]["name"] for node in found.get("nodes", [])] == ["embed_assets"]


@pytest.mark.long
def test_the_services_of_compose_embed_what_arrives(
    project: Project,
    postgres: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Their commands, environment and mounted files, as processes of this machine in place of containers."""
    services, home = load("compose.yaml")["services"], tmp_path / "home"
    home.mkdir()
    for mounted in services["code"]["volumes"][:2]:
        source, target, mode = mounted.split(":")
        assert target.startswith("/opt/dagster/") and mode == "ro"
        shutil.copy(REPOSITORY / "deploy" / source, home / Path(target).name)
    code_port, ui_port = free_port(), free_port()
    workspace = (home / "workspace.yaml").read_text().replace("host: code", "host: 127.0.0.1")
    (home / "workspace.yaml").write_text(workspace.replace("port: 4000", f"port: {code_port}"))
    environment = services["code"]["environment"]
    assert environment == services["daemon"]["environment"] == services["webserver"]["environment"]
    local = {"/data/landing": str(project.landing), "/data/lake": str(project.root / "lake")}
    for name, value in environment.items():
        monkeypatch.setenv(name, postgres if name == "DAGSTER_POSTGRES_URL" else local[value])
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("EMBED_SETTLE_SECONDS", "0")
    monkeypatch.chdir(home)
    for key in "ab":
        project.write(f"{key}/try.rst", topic("try"))
    processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    with ExitStack() as stack:

        def start(name: str, *replaced: tuple[str, str]) -> None:
            command = services[name]["command"].replace("--host 0.0.0.0", "--host 127.0.0.1")
            for old, new in replaced:
                assert old in command
                command = command.replace(old, new)
            log = tmp_path / f"{name}.log"
            processes[name] = stack.enter_context(running(command, log)), log

        start("code", ("--port 4000", f"--port {code_port}"))
        kind, *check = services["code"]["healthcheck"]["test"]
        assert kind == "CMD"
        check = [str(BIN / check[0]), *(str(code_port) if word == "4000" else word for word in check[1:])]
        wait_until(lambda: subprocess.run(check, capture_output=True, check=False).returncode == 0, processes)
        start("webserver", ("--port 3000", f"--port {ui_port}"))
        start("daemon")
        wait_until(lambda: is_loaded(ui_port), processes)
        wait_until(lambda: {row["partition_key"] for row in embedded(project)} == {"a", "b"}, processes)


def embedded(project: Project) -> list[dict[str, Any]]:
    return project.rows("partition_key") if (project.root / "lake/embeddings").exists() else []


def snake(words: str) -> str:
    return re.sub("([A-Z])", lambda found: "_" + found[1].lower(), words)


def test_a_run_on_kubernetes_has_a_gpu_or_what_its_tag_says() -> None:
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import UserDefinedDagsterK8sConfig, get_user_defined_k8s_config

    values = load("helm-values.yaml")
    launcher = values["runLauncher"]
    assert launcher["type"] == "K8sRunLauncher"
    configured = launcher["config"]["k8sRunLauncher"]["runK8sConfig"]
    given = UserDefinedDagsterK8sConfig.from_dict({snake(name): value for name, value in configured.items()})
    [location] = values["dagster-user-deployments"]["deployments"]
    assert location["includeConfigInLaunchedRuns"]["enabled"]
    # As the chart passes a code location's configuration to its runs.
    names = ("resources", "env", "volumes", "volumeMounts", "labels")
    passed: dict[str, Any] = {snake(name): location[name] for name in names if name in location}
    secrets = [secret["name"] for secret in location["envSecrets"]]
    run = K8sContainerContext(run_k8s_config=given).merge(K8sContainerContext(env_secrets=secrets, **passed))
    container = run.run_k8s_config.container_config
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"] == configured["containerConfig"]["resources"]
    assert {variable["name"] for variable in container["env"]} == {"EMBED_SOURCE", "EMBED_LAKE"}
    assert container["env_from"] == [{"secret_ref": {"name": "embeddings"}}]
    text = (REPOSITORY / "deploy/helm-values.yaml").read_text()
    [tag] = re.findall("dagster-k8s/config: (.*)", text)
    own = K8sContainerContext(run_k8s_config=get_user_defined_k8s_config({"dagster-k8s/config": tag}))
    limits = run.merge(own).run_k8s_config.container_config["resources"]["limits"]
    assert limits == container["resources"]["limits"] | {"nvidia.com/gpu": "4"}


def test_versions_that_are_written_elsewhere() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    values = (REPOSITORY / "deploy/helm-values.yaml").read_text()
    [chart] = re.findall(r"--version (\S+)", values)
    assert f"dagster=={chart}" in constraints
    [location] = load("helm-values.yaml")["dagster-user-deployments"]["deployments"]
    assert location["image"]["tag"] == PROJECT["version"]


def test_dagster_plus_builds_the_image_of_this_folder() -> None:
    from dagster_cloud_cli.config.models import Build

    found = yaml.safe_load((REPOSITORY / "build.yaml").read_text())
    build = Build.model_validate(found)
    assert (REPOSITORY / (build.directory or "") / "Dockerfile").exists()
    assert build.registry
