"""Split pools whose engines their connector cannot tell of each other: found when the file is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from relay.config import ConfigError, load

if TYPE_CHECKING:
    from pathlib import Path


def problems(tmp_path: Path, connector: str, prefill: str, decode: str, more: str = "") -> list[str]:
    path = tmp_path / "relay.toml"
    path.write_text(f'[[pool]]\nconnector = "{connector}"\nprefill = [{prefill}]\ndecode = [{decode}]\n{more}\n')
    try:
        load(path)
    except ConfigError as error:
        return [line.removeprefix(f"{path}:") for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("connector", "prefill", "decode", "where", "what"),
    [
        ("sglang", '"unix:/run/p"', '"http://d:1"', "pool[0].prefill[0]", "has no host for decoders to find"),
        ("mooncake", '"http://p:1", "unix:/run/p"', '"http://d:1"', "pool[0].prefill[1]", "has no host to find a boot"),
        ("p2p_nccl", '"http://p:1"', '"unix:/run/d"', "pool[0].decode[0]", "has no host to find its KV sockets on"),
        ("p2p_nccl", '"http://p_1:1"', '"http://d:1"', "pool[0].prefill[0]", "that no request id can carry"),
        (
            *("p2p_nccl", '{ url = "dns+http://p:1", kv_address = "p_1:2" }', '"http://d:1"'),
            *("pool[0].prefill[0]", "that no request id can carry"),
        ),
    ],
)
def test_an_engine_that_cannot_be_told_of(
    connector: str, prefill: str, decode: str, where: str, what: str, tmp_path: Path
) -> None:
    (line,) = problems(tmp_path, connector, prefill, decode)
    assert line.startswith(f"{where}: ")
    assert what in line


@pytest.mark.parametrize(
    ("connector", "prefill", "decode"),
    [
        ("nixl", '"unix:/run/p"', '"unix:/run/d"'),
        ("none", '"unix:/run/p"', '"unix:/run/d"'),
        ("sglang", '"http://p:1"', '"unix:/run/d"'),
        ("mooncake", '{ url = "unix:/run/p", bootstrap = "http://p:8998" }', '"http://d:1"'),
        ("p2p_nccl", '"dns+http://p_1:1"', '{ url = "unix:/run/d", kv_address = "d:2" }'),
    ],
)
def test_engines_that_can(connector: str, prefill: str, decode: str, tmp_path: Path) -> None:
    assert problems(tmp_path, connector, prefill, decode) == []


@pytest.mark.parametrize("address", ["0.0.0.0:9000", "[::]:9000", "a:b:9000", "h:99999"])
def test_an_address_that_decoders_cannot_call(address: str, tmp_path: Path) -> None:
    more = f'callback_address = "{address}"'
    (line,) = problems(tmp_path, "ascend_layerwise", '"http://p:1"', '"http://d:1"', more)
    assert line.startswith(f'pool[0].callback_address: "{address}" ')
