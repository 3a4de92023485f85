"""The manifest for Kubernetes: what it says of ports, paths, flags and times is what the relay does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from relay import cli, config
from relay.config import Config
from relay.daemon.process import CUT_S, GRACE_S
from relay.net.pump import Pump
from relay.net.service import Service, local_answer

DIRECTORY = Path(__file__).parents[2] / "systemd"


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], Any]:
    documents = yaml.safe_load_all((DIRECTORY / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


@pytest.fixture
def file(objects: dict[tuple[str, str], Any], tmp_path: Path) -> Path:
    """The configuration, as it is mounted."""
    path = tmp_path / "relay.toml"
    path.write_text(objects["ConfigMap", "relay"]["data"]["relay.toml"])
    return path


@pytest.fixture
def loaded(file: Path) -> Config:
    return config.load(file)


@pytest.fixture
def pod(objects: dict[tuple[str, str], Any]) -> Any:
    return objects["Deployment", "relay"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    (found,) = pod["containers"]
    return found


def test_the_configuration_is_right(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", str(file)]) == 0
    assert "dns+http://vllm:8000" in capsys.readouterr().out


def test_the_command_line_is_one(container: Any) -> None:
    arguments = cli._parser().parse_args(container["args"])
    (mount,) = container["volumeMounts"]
    assert arguments.config == f"{mount['mountPath']}/relay.toml"


def test_ports_are_the_listeners(objects: dict[tuple[str, str], Any], container: Any, loaded: Config) -> None:
    (address,) = loaded.listen.addresses
    assert address.is_wildcard  # whoever asks is not in the pod
    assert container["ports"] == [{"name": "http", "containerPort": address.port}]
    (port,) = objects["Service", "relay"]["spec"]["ports"]
    assert port["targetPort"] == "http"


def test_probes_ask_what_the_relay_answers(container: Any, loaded: Config) -> None:
    service = Service(loaded, Pump(), None)
    service.is_ready = False
    for name, status in (("readinessProbe", 503), ("livenessProbe", 200)):
        asked = container[name]["httpGet"]
        assert asked["port"] == "http"
        answer = local_answer(service, b"GET", asked["path"].encode())
        assert answer is not None
        assert answer[0] == status  # while it drains


def test_there_is_time_to_drain(pod: Any, container: Any, loaded: Config) -> None:
    tool, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert tool == "sleep"
    daemon = loaded.daemon
    needed = int(seconds) + daemon.ready_delay_s + daemon.drain_s + CUT_S + GRACE_S
    assert pod["terminationGracePeriodSeconds"] > needed


def test_engines_are_found_by_a_headless_service(objects: dict[tuple[str, str], Any], loaded: Config) -> None:
    (engine,) = loaded.pools[0].upstreams
    assert engine.is_dns
    service = objects["Service", engine.host]["spec"]
    assert service["clusterIP"] == "None"
    assert [port["port"] for port in service["ports"]] == [engine.port]


def test_selectors_find_the_pods(objects: dict[tuple[str, str], Any]) -> None:
    spec = objects["Deployment", "relay"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == objects["Service", "relay"]["spec"]["selector"]
    assert objects["PodDisruptionBudget", "relay"]["spec"]["selector"]["matchLabels"] == labels


def test_the_image_runs_what_the_manifest_says(container: Any, loaded: Config) -> None:
    said = dict(line.split(" ", 1) for line in (DIRECTORY / "Containerfile").read_text().splitlines() if " " in line)
    assert said["ENTRYPOINT"] == '["/opt/relay/bin/relay"]'
    assert said["CMD"] == str(container["args"]).replace("'", '"')
    assert said["EXPOSE"] == str(loaded.listen.addresses[0].port)
