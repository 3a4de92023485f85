"""Listening sockets: what is opened, kept and closed, and whose a unix socket's file is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.address import Address, parse_address
from relay.daemon.listeners import Listeners, StartError


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    found = Listeners()
    yield found
    found.close()


def unix(path: Path) -> Address:
    return parse_address(f"unix:{path}")


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_what_stays_is_kept_and_what_goes_is_handed_out(listeners: Listeners) -> None:
    a, b = parse_address("127.0.0.1:0"), parse_address("127.0.0.2:0")
    assert listeners.change([a, a]) == []
    first, second = listeners.numbered.items()
    (gone,) = listeners.change([b, a])
    assert gone is second[1]
    gone.close()
    assert listeners.numbered[first[0]] is first[1]
    assert max(listeners.numbered) > second[0]  # no number comes twice
    assert [url.rpartition(":")[0] for url in listeners.urls] == ["http://127.0.0.1", "http://127.0.0.2"]


def test_one_that_cannot_be_opened_changes_nothing(listeners: Listeners, tmp_path: Path) -> None:
    listeners.change([parse_address("127.0.0.1:0")])
    before = listeners.numbered
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            StartError, match=f"^cannot listen on {address}: Address already in use .listen.addresses, "
        ):
            listeners.change([unix(tmp_path / "new"), parse_address(address)])
    assert listeners.numbered == before
    assert not (tmp_path / "new").exists()


def test_a_unix_sockets_file_goes_with_it(listeners: Listeners, tmp_path: Path) -> None:
    listeners.change([unix(tmp_path / "a"), unix(tmp_path / "b")])
    for gone in listeners.change([unix(tmp_path / "b")]):
        gone.close()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    listeners.close()
    listeners.close()
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_another_processes_by_now_stays(listeners: Listeners, tmp_path: Path) -> None:
    path = tmp_path / "a"
    listeners.change([unix(path)])
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        listeners.close()
        assert connects(path)


def test_what_was_passed_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(path))
    listeners = Listeners([passed])
    assert listeners.change([parse_address("127.0.0.1:0")]) == []
    assert listeners.sockets == [passed]
    listeners.close()
    assert path.exists()


def test_an_abandoned_file_is_replaced(listeners: Listeners, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listeners.change([unix(path)])
    assert connects(path)


def test_a_file_that_is_in_use_or_no_socket_is_not(listeners: Listeners, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(StartError, match=f"^cannot listen on unix:{path}: Address already in use "):
            listeners.change([unix(path)])
        assert connects(path)
    text = tmp_path / "text"
    text.write_text("mine")
    with pytest.raises(StartError, match=f"^cannot listen on unix:{text}: Address already in use "):
        listeners.change([unix(text)])
    assert text.read_text() == "mine"


def test_where_no_file_can_be_made_it_says_why(listeners: Listeners) -> None:
    with pytest.raises(StartError, match=r"/sys/relay: (Operation not permitted|Permission denied|Read-only file sys)"):
        listeners.change([unix(Path("/sys/relay"))])
