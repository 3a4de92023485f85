"""TLS towards clients, towards engines, and both: the same streams as without, and the same ends."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest
import trio
import trio.testing
import trustme

from relay import cli
from relay.address import parse_upstream
from relay.config import HealthConfig, LimitsConfig, ListenConfig, PoolConfig, StreamConfig, TimeoutsConfig, TlsConfig
from relay.net.tls import TlsError, server_context, wrap
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.conftest import RunningRelay, running_relay
from tests.core.captured import CAPTURES, Captured, streams
from tests.e2e.fleet import ConfigFile, fakes, pool_of, running_fleet
from tests.e2e.harness import (
    STREAM,
    Answer,
    Client,
    error_frames,
    nothing_unreachable,
    request,
    states,
    until,
)
from tests.e2e.secure import Authority, Edge, behind_tls
from tests.e2e.test_process import relay_serve

SIDES: Final = ("client", "engine", "both")
LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Secured:
    """A relay with TLS on some of its sides."""

    def __init__(self, relay: RunningRelay, edge: Edge | None, tls: ssl.SSLContext | None) -> None:
        self.relay = relay
        self.edge = edge
        self._tls = tls

    async def connect(self, *, receive_buffer: int = 0) -> Client:
        return await Client.connect(self.relay.port, receive_buffer=receive_buffer, tls=self._tls)

    async def ask(self, data: bytes) -> Answer:
        async with await self.connect() as client:
            return await client.ask(data)


@asynccontextmanager
async def secured(side: str, engine: str, authority: Authority, **tables: Any) -> AsyncIterator[Secured]:
    """A relay before `engine`, with TLS on `side`."""
    async with AsyncExitStack() as stack:
        edge = None
        upstream: Any = engine
        if side != "client":
            edge = await stack.enter_async_context(behind_tls(engine, authority.server()))
            upstream = edge.as_upstream(authority.path)
        if side != "engine":
            tables["listen"] = ListenConfig(tls=authority.issue())
        relay = await stack.enter_async_context(running_relay(upstream, **tables))
        yield Secured(relay, edge, None if side == "engine" else authority.client())


# -- the socket


def test_reads_and_looks(authority: Authority) -> None:
    left, right = socket.socketpair()
    plain = authority.client()
    plain.check_hostname = False
    with (
        wrap(server_context(authority.issue()), left) as near,
        plain.wrap_socket(right, do_handshake_on_connect=False) as far,
    ):
        near.setblocking(False)
        far.setblocking(False)
        for _ in range(8):
            for end in (far, near):
                with suppress(BlockingIOError, ssl.SSLWantReadError):
                    end.do_handshake()
        with pytest.raises(BlockingIOError):
            near.recv(1, socket.MSG_PEEK)
        data = bytes(range(256)) * 130  # more than two records
        far.sendall(data)
        assert near.recv(3, socket.MSG_PEEK) == data[:3]
        assert near.has_more
        room = bytearray(65_536)
        for _ in range(2):
            assert room[: near.recv_into(room)] == data  # also what was looked at, and what is behind it
            assert not near.has_more
            with pytest.raises(BlockingIOError):
                near.recv_into(room)
            far.sendall(data)


# -- streams


@pytest.fixture
async def player(nursery: trio.Nursery, tmp_path: Path) -> Engine:
    """An engine that plays recordings, by their names with a dot for the slash."""
    for answer in streams():
        target = tmp_path / f"{answer.name.replace('/', '.')}.response.raw"
        target.symlink_to(CAPTURES / f"{answer.name}.response.raw")
    engine: Engine = await nursery.start(serve_engine, EngineConfig(captures=str(tmp_path)))
    return engine


def shortest() -> list[Captured]:
    """The shortest recording of each dialect."""
    return [*{answer.route: answer for answer in sorted(streams(), key=lambda one: -len(one.body))}.values()]


@pytest.mark.parametrize("side", SIDES)
async def test_recorded_streams_to_the_byte(side: str, player: Engine, authority: Authority) -> None:
    recordings = [answer for answer in streams() if len(answer.body) < 60_000][::3]
    async with secured(side, player.url, authority) as path, await path.connect() as client:
        for recorded in recordings:
            name = recorded.name.replace("/", ".")
            answer = await client.ask(request(sim_play=name, sim_rechunk="size:1000,writes:333"))
            assert (answer.status, answer.end, answer.payload) == (200, "whole", recorded.body), recorded
        if path.edge is not None:
            assert path.edge.connections == 1  # idle connections are used again
            assert path.edge.names == ["localhost"]


@pytest.mark.parametrize("record_bytes", [1, 2, 3, 7, 100])
async def test_records_of_any_size(record_bytes: int, player: Engine, authority: Authority) -> None:
    async with secured("both", player.url, authority) as path, await path.connect() as client:
        assert path.edge is not None
        path.edge.record_bytes = record_bytes
        for recorded in shortest():
            answer = await client.ask(request(sim_play=recorded.name.replace("/", ".")))
            assert (answer.status, answer.end, answer.payload) == (200, "whole", recorded.body), recorded


@pytest.mark.parametrize("side", SIDES)
async def test_bodies_of_many_records_both_ways(side: str, authority: Authority) -> None:
    """More than the kernel's buffers take, so that both directions have to wait in the middle of a write."""
    body = bytes(range(256)) * 40_000
    async with fakes("tiny") as (engine,), secured(side, engine.url, authority) as path:
        engine.answer = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        answer = await path.ask(request("/v1/images", body))
        assert (answer.status, answer.end) == (200, "whole")
        assert answer.payload == body
        assert (await path.relay.record()).bytes_in == len(body)


async def test_httpx_and_the_engine_see_https(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("both", engine.url, authority) as path:
        async with httpx.AsyncClient(verify=authority.client()) as client:
            url = f"https://localhost:{path.relay.port}/v1/chat/completions"
            answer = await client.post(url, json={"model": "tiny", "stream": True})
        assert (answer.status_code, answer.content) == (200, STREAM)
        (head,) = engine.asked
        assert b"\r\nx-forwarded-proto: https\r\n" in head


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl(engine: Engine, authority: Authority) -> None:
    async with secured("both", engine.url, authority) as path:
        url = f"https://localhost:{path.relay.port}/v1/chat/completions"
        data = request().partition(b"\r\n\r\n")[2]
        command = ["curl", "-sSN", "--http1.1", "--cacert", authority.path, "--data-binary", "@-", url]
        said = await trio.run_process(command, stdin=data, capture_stdout=True, capture_stderr=True)
        assert said.stderr == b""
        assert said.stdout.endswith(b"data: [DONE]\n\n")


# -- ends


@pytest.mark.parametrize(
    ("side", "how"),
    [
        (side, how)
        for side in SIDES
        for how in ("goodbye", "fin", "close", "rst")
        if (side, how) != ("engine", "goodbye")
    ],
)
async def test_a_client_that_leaves_frees_the_engine(side: str, how: str, engine: Engine, authority: Authority) -> None:
    """``goodbye``: close_notify alone, on a connection that stays open."""
    async with (
        secured(side, engine.url, authority) as path,
        await path.connect() as client,
        trio.open_nursery() as nursery,
    ):
        await client.send(request(body={"max_tokens": 1000}, sim_step_ms="20"))
        await client.frames(2)
        before = states(engine)
        if how == "goodbye":
            assert client.secure is not None
            nursery.start_soon(say_goodbye, client.secure)
        else:
            client.leave(how)
        await until(lambda: states(engine) != before)
        assert (await path.relay.record()).outcome == "CD"
        nursery.cancel_scope.cancel()


async def say_goodbye(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Sends close_notify, and waits for the relay's, or its end."""
    with suppress(trio.BrokenResourceError):
        await stream.unwrap()


@pytest.mark.parametrize("side", ["engine", "both"])
async def test_an_end_without_a_goodbye_is_no_end(side: str, authority: Authority) -> None:
    """Of an answer without a length: whoever cuts the connection can forge a FIN."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with fakes("tiny") as (engine,), secured(side, engine.url, authority) as path:
        assert path.edge is not None
        engine.answer, engine.then = head + STREAM, "fin"
        good = await path.ask(request())
        assert (good.end, good.payload) == ("whole", STREAM)
        path.edge.says_goodbye = False
        cut = await path.ask(request())
        assert_cut_off_by_tls(cut, side)
        assert [record.outcome for record in path.relay.records] == ["--", "UD"]


async def test_an_end_without_a_goodbye_is_told_in_words(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("engine", engine.url, authority) as path:
        assert path.edge is not None
        path.edge.says_goodbye = False
        engine.answer, engine.then = b"HTTP/1.1 200 OK\r\n", "fin"
        answer = await path.ask(request())
        assert (answer.status, answer.error["message"]) == (
            502,
            "the engine's connection broke: the connection was closed",
        )


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
async def test_an_end_without_a_goodbye_leaves_nothing_to_collect(how: str, authority: Authority) -> None:
    """Of an idle client, of one with a stream, and of an engine."""
    async with fakes("tiny") as (engine,), secured("both", engine.url, authority) as path:
        assert path.edge is not None
        connections = path.relay.worker.connections
        with nothing_unreachable():
            async with await path.connect() as client:
                assert (await client.ask(request())).end == "whole"
                client.leave(how)
                await until(lambda: not connections)
            engine.hold()
            async with await path.connect() as client:
                await client.send(request())
                await until(lambda: len(engine.asked) == 2)
                client.leave(how)
                await until(lambda: not connections)
            engine.gate.set()
            path.edge.says_goodbye = False
            engine.answer, engine.then = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "fin"
            assert (await path.ask(request())).end == "rst"  # that may not be all
            await until(lambda: not connections)


@pytest.mark.parametrize("side", ["engine", "both"])
async def test_a_goodbye_is_an_end_by_itself(side: str, authority: Authority) -> None:
    """Of an engine that leaves its connection open, as asyncio does for half a minute, waiting for the relay's."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with fakes("tiny") as (engine,), secured(side, engine.url, authority) as path:
        assert path.edge is not None
        path.edge.stays = True
        engine.answer, engine.then = head + STREAM, "fin"
        for _ in range(20):  # the goodbye may come in one read with the last frame, or behind it
            answer = await path.ask(request())
            assert (answer.end, answer.payload) == ("whole", STREAM)


async def test_a_goodbye_right_behind_the_request(authority: Authority) -> None:
    """In one segment, so that both are read at once; with TCP's end it would be the same."""
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority) as path:
        engine.hold()
        async with await Client.connect(path.relay.port) as client:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = authority.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            await client.send(outgoing.read())
            incoming.write(await client.stream.receive_some())
            tls.do_handshake()
            tls.write(request())
            with suppress(ssl.SSLWantReadError):
                tls.unwrap()
            await client.send(outgoing.read())
            assert (await path.relay.record()).outcome in ("CR", "CH", "CC")


def assert_cut_off_by_tls(answer: Answer, side: str) -> None:
    """As `assert_cut_off`; towards a TLS client without a goodbye."""
    assert answer.status == 200
    assert answer.end == ("fin" if side == "engine" else "rst")
    assert answer.rest == b""
    assert error_frames(answer) == answer.frames[-1:]


@pytest.mark.parametrize("side", SIDES)
async def test_an_engine_that_dies_in_mid_stream(side: str, engine: Engine, authority: Authority) -> None:
    async with secured(side, engine.url, authority) as path:
        for fault in ("die-after:3", "die-mid-frame:3"):
            answer = await path.ask(request(sim_fault=fault))
            assert_cut_off_by_tls(answer, side)
            assert len(answer.frames) == 4


async def test_a_chunked_body_needs_no_goodbye(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("both", engine.url, authority) as path:
        assert path.edge is not None
        path.edge.says_goodbye = False
        engine.then = "fin"
        answer = await path.ask(request())
        assert (answer.end, answer.payload) == ("whole", STREAM)


async def test_the_relay_says_goodbye_behind_a_body_without_length(engine: Engine, authority: Authority) -> None:
    """To a client of HTTP/1.0, which has nothing else to go by."""
    async with secured("client", engine.url, authority) as path:
        answer = await path.ask(request(version="1.0"))
        assert (answer.end, answer.frames[-1]) == ("fin", b"data: [DONE]\n\n")
        cut = await path.ask(request(version="1.0", sim_fault="die-after:3"))
        assert (cut.end, error_frames(cut)) == ("rst", cut.frames[-1:])


async def test_a_fault_of_the_relays_own_is_no_end(
    engine: Engine, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a body that a goodbye would end."""

    async def fail(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("a bug")

    monkeypatch.setattr("relay.net.delivery.Delivery._pump", fail)
    async with secured("client", engine.url, authority) as path:
        assert (await path.ask(request(version="1.0"))).end == "rst"


async def test_a_client_that_reads_nothing(engine: Engine, authority: Authority) -> None:
    timeouts = TimeoutsConfig(client_stall_s=0.2)
    async with secured("both", engine.url, authority, timeouts=timeouts) as path:
        async with await path.connect(receive_buffer=4096) as client:
            await client.send(request(body={"max_tokens": 100_000}))
            assert (await path.relay.record()).outcome == "cD"
            await until(lambda: not any(state == "running" for state in states(engine)))


async def test_comments_and_silence(engine: Engine, authority: Authority) -> None:
    stream, timeouts = StreamConfig(keepalive_comment_s=0.1), TimeoutsConfig(between_tokens_s=1.0)
    async with secured("both", engine.url, authority, stream=stream, timeouts=timeouts) as path:
        answer = await path.ask(request(sim_fault="stall-after:2"))
        assert b": keep-alive\n\n" in answer.payload
        assert answer.end == "rst"
        assert error_frames(answer) == answer.frames[-1:]
        assert (await path.relay.record()).outcome == "uD"


async def test_pipelined_requests(authority: Authority) -> None:
    """The second one lies in a record that was looked at for a goodbye."""
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority) as path:
        engine.hold()
        async with await path.connect() as client:
            await client.send(request())
            await until(lambda: len(engine.asked) == 1)
            await client.send(request())
            await trio.testing.wait_all_tasks_blocked(0.05)
            engine.gate.set()
            for _ in range(2):
                answer = await client.answer()
                assert (answer.end, answer.payload) == ("whole", STREAM)


# -- handshakes


async def test_who_idles_makes_room_before_who_has_just_come(authority: Authority) -> None:
    """Though a handshake may take less time than a client may idle, and so is the first whose time is over."""
    limits = LimitsConfig(max_connections=2)
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority, limits=limits) as path:
        connections = path.relay.worker.connections
        async with await path.connect() as idle:
            assert (await idle.ask(request())).status == 200
            async with await Client.connect(path.relay.port) as newer:
                await until(lambda: len(connections) == 2 and all(each.is_waiting for each in connections))
                assert (await path.ask(request())).status == 200
                assert await idle.is_closed()
                assert (await newer.ask(request())).status == 400  # it is still there


async def test_plain_http_is_answered_in_plain_words(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority) as path:
        async with await Client.connect(path.relay.port) as client:
            answer = await client.ask(request())
            assert answer.status == 400
            assert "https://" in answer.error["message"]
            assert await client.is_closed()
        assert not engine.asked


async def test_what_is_no_handshake(authority: Authority, capfd: pytest.CaptureFixture[str]) -> None:
    """Garbage, silence, and those that leave: the others notice nothing, and standard error stays empty."""
    timeouts = TimeoutsConfig(client_head_s=0.3)
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority, timeouts=timeouts) as path:
        async with await Client.connect(path.relay.port) as silent, await Client.connect(path.relay.port) as half:
            await half.send(b"\x16\x03\x01\x02\x00")  # the beginning of a ClientHello
            for how in ("fin", "rst", "close"):
                client = await Client.connect(path.relay.port)
                client.leave(how)
                client.stream.socket.close()
            async with await Client.connect(path.relay.port) as client:
                await client.send(b"\0" * 600)
                await path.relay.record()
            assert (await path.ask(request())).payload == STREAM
            assert await silent.is_closed()
            assert await half.is_closed()
        assert [record.outcome for record in path.relay.records] == ["CR", "--"]
        assert "TLS handshake failed: wrong version number" in str(path.relay.records[0].error)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_a_client_that_does_not_trust_the_relay(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority) as path:
        command = ["curl", "-sS", f"https://localhost:{path.relay.port}/"]
        said = await trio.run_process(command, capture_stderr=True, check=False)
        assert b"self-signed certificate" in said.stderr or b"issuer certificate" in said.stderr
        assert "unknown ca" in str((await path.relay.record()).error)


async def test_old_versions_are_refused(authority: Authority) -> None:
    async with fakes("tiny") as (engine,), secured("client", engine.url, authority) as path:
        context = authority.client()
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with await Client.connect(path.relay.port, tls=context) as client:
            assert (await client.ask(request())).payload == STREAM
            assert client.secure is not None
            assert client.secure.selected_alpn_protocol() == "http/1.1"
            assert client.secure.compression() is None
        assert server_context(authority.issue()).minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("name", "expires", "trusts", "server_name", "said"),
    [
        ("localhost", None, False, "", "unable to get local issuer certificate"),
        ("other.example", None, True, "", "Hostname mismatch, certificate is not valid for 'localhost'"),
        ("localhost", LONG_AGO, True, "", "certificate has expired"),
        ("localhost", None, True, "other.example", "Hostname mismatch, certificate is not valid for 'other.example'"),
        ("other.example", None, True, "other.example", ""),
    ],
)
async def test_an_engine_that_is_not_who_it_should_be(
    name: str, expires: datetime | None, trusts: bool, server_name: str, said: str, authority: Authority
) -> None:
    health = HealthConfig(interval_s=30.0, failures=1, successes=1)
    async with fakes("tiny") as (engine,), behind_tls(engine.url, authority.server(name, expires=expires)) as edge:
        upstream = edge.as_upstream(authority.path if trusts else "", server_name=server_name)
        async with running_relay(upstream) as relay, await Client.connect(relay.port) as client:
            answer = await client.ask(request())
            if not said:
                assert answer.payload == STREAM
                assert edge.names == ["other.example"]
            else:
                assert (answer.status, answer.error["code"]) == (502, "upstream_error")
                assert f"certificate verify failed: {said.partition(',')[0]}" in answer.error["message"]
                assert "example" not in answer.error["message"]
                assert "localhost" not in answer.error["message"]
                assert (await relay.record()).outcome == "UC"
                assert not engine.asked
        async with running_relay(upstream, health=health) as relay:  # probes see the same
            (known,) = relay.worker.service.fleet.upstreams
            assert known.health.is_up is not bool(said)
            if said:
                assert f"probe: certificate verify failed: {said}" in str(known.last_error)
            else:
                await until(lambda: known.models is not None)  # a probe cancelled in its handshake loses its socket


async def test_an_engine_that_does_not_speak_tls() -> None:
    """And waits for the rest of what it takes for a request's head."""
    timeouts = TimeoutsConfig(connect_s=0.3)
    async with fakes("tiny") as (engine,):
        url = engine.url.replace("http:", "https:")
        async with running_relay(url, timeouts=timeouts) as relay, await Client.connect(relay.port) as client:
            answer = await client.ask(request())
            assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
            assert (await relay.record()).outcome == "uC"


async def test_an_engine_that_answers_a_handshake_in_plain_words(engine: Engine) -> None:
    """Without a limit, so that it is the answer that ends it."""
    url, timeouts = engine.url.replace("http:", "https:"), TimeoutsConfig(connect_s=0.0)
    said = "wrong version number: it seems to speak plain HTTP (http:// in its URL)"
    async with running_relay(url, timeouts=timeouts) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request())
        assert (answer.status, answer.error["code"]) == (502, "upstream_error")
        assert answer.error["message"].startswith(f"cannot connect to the engine: {said}")
        assert (await relay.record()).outcome == "UC"
    health = HealthConfig(interval_s=30.0, failures=1, successes=1)
    async with running_relay(url, timeouts=timeouts, health=health) as relay:  # probes see the same
        (known,) = relay.worker.service.fleet.upstreams
        assert known.last_error == f"probe: {said}"


# -- files


def config_file(path: Path, engine: str, files: TlsConfig) -> ConfigFile:
    file = ConfigFile(path)
    file.pools(("chat", engine), extra=f"[listen]\ntls = {{ cert = '{files.cert}', key = '{files.key}' }}\n")
    return file


async def serial_at(port: int, authority: Authority) -> object:
    """The number of the certificate that is shown there."""
    async with await Client.connect(port, tls=authority.client()) as client:
        assert (await client.ask(request())).end == "whole"
        assert client.secure is not None
        return client.secure.getpeercert()["serialNumber"]


async def test_a_reload_reads_the_certificate_again(
    engine: Engine, authority: Authority, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who is connected goes on; a broken file leaves the one before in force."""
    file = config_file(tmp_path / "relay.toml", engine.url, authority.issue())
    config = file.load()
    async with running_fleet(*config.pools, load_config=file.load, listen=config.listen) as relay:
        serial = partial(serial_at, relay.port, authority)
        before = await serial()
        async with await Client.connect(relay.port, tls=authority.client()) as stream:
            await stream.send(request(body={"max_tokens": 20}, sim_step_ms="20"))
            await stream.frames(2)
            authority.issue()
            assert (await relay.admin("POST", "/-/reload")).json() == {"reloaded": "yes"}
            after = await serial()
            assert after != before
            authority.spoil()
            refused = await relay.admin("POST", "/-/reload")
            assert refused.status == 400
            assert "no certificate chain and key in PEM" in refused.json()["error"]
            assert await serial() == after
            assert (await stream.answer()).end == "whole"


async def test_a_reload_that_fails_leaves_those_trusted_who_were(
    engine: Engine, authority: Authority, tmp_path: Path
) -> None:
    """The file of certificates is another's by now, and the configuration is refused for an address in use."""
    file = ConfigFile(tmp_path / "relay.toml")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with behind_tls(engine.url, authority.server()) as edge:
            upstream = f'[[pool]]\nupstreams = [{{ url = "{edge.url}", ca = "{authority.path}" }}]\n'
            file.path.write_text(upstream)
            async with running_fleet(*file.load().pools, load_config=file.load) as relay:
                authority.become_another()
                address = f"127.0.0.1:{taken.getsockname()[1]}"
                file.path.write_text(
                    f"{upstream}[[pool]]\nname = 'split'\nmodels = ['split']\nconnector = 'ascend_layerwise'\n"
                    f"callback_address = '{address}'\nprefill = ['{engine.url}']\ndecode = ['{engine.url}']\n"
                )
                refused = await relay.admin("POST", "/-/reload")
                assert (refused.status, "in use" in refused.json()["error"]) == (400, True)
                async with await Client.connect(relay.port) as client:
                    assert (await client.ask(request())).status == 200


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue()
    other = Authority(tmp_path).issue  # over the same names
    key = Path(files.key).read_bytes()
    for wrong, said in (
        (TlsConfig(cert=str(tmp_path / "none"), key=files.key), "listen.tls.cert: .* cannot be read: No such file"),
        (TlsConfig(cert=files.cert, key=str(tmp_path)), "listen.tls.key: .* cannot be read: Is a directory"),
        (TlsConfig(cert=files.key, key=files.key), "no certificate chain and key in PEM: PEM lib$"),
    ):
        with pytest.raises(TlsError, match=said):
            server_context(wrong)
    other()
    rsa = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("localhost", key_type=trustme.KeyType.RSA)
    for another in (key, rsa.private_key_pem.bytes()):
        Path(files.key).write_bytes(another)
        with pytest.raises(TlsError, match="is not the key of"):
            server_context(files)


async def test_an_engine_behind_tls_is_put_in_by_hand(authority: Authority) -> None:
    async with (
        fakes("tiny", "tiny") as (first, second),
        behind_tls(second.url, authority.server()) as edge,
        running_fleet(pool_of(first.url)) as relay,
    ):
        wrong = await relay.admin("POST", "/-/upstreams", {"url": edge.url, "ca": "/none"})
        assert (wrong.status, "cannot be read" in wrong.json()["error"]) == (400, True)
        added = await relay.admin("POST", "/-/upstreams", {"url": edge.url, "ca": authority.path})
        assert added.json()["added"] == edge.url
        await relay.admin("DELETE", "/-/upstreams", {"url": first.url})
        async with await Client.connect(relay.port) as client:
            assert (await client.ask(request())).payload == STREAM
        assert len(second.asked) == 1


async def test_what_the_file_says_of_tls_may_be_repeated(authority: Authority) -> None:
    configured = msgspec.structs.replace(
        parse_upstream("https://127.0.0.1:9"), ca=authority.path, server_name="a.example", weight=3
    )
    async with running_fleet(PoolConfig(upstreams=(configured,))) as relay:
        for said in ({}, {"ca": authority.path}, {"server_name": "a.example"}):
            assert (await relay.admin("DELETE", "/-/upstreams", {"url": configured.url})).status == 200
            assert (await relay.admin("POST", "/-/upstreams", {"url": configured.url, **said})).status == 200
            assert relay.upstreams[configured.url].config == configured


async def test_two_workers_with_systemds_sockets(engine: Engine, authority: Authority, tmp_path: Path) -> None:
    """The one named https speaks TLS, the other does not; a reload reaches both workers."""
    file = config_file(tmp_path / "relay.toml", engine.url, authority.issue())
    with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_server(("127.0.0.1", 0)) as secure:
        http, https = (sock.getsockname()[1] for sock in (plain, secure))
        passed = {"http": plain, "https": secure}
        async with relay_serve("--config", str(file.path), "--workers", "2", passed=passed) as relay:
            await relay.prints(lambda: relay.stderr.count(b"listening on") == 2 and relay.stderr.endswith(b"\n"))
            assert f"listening on http://127.0.0.1:{http}\n" in relay.stderr.decode()
            assert f"listening on https://127.0.0.1:{https}\n" in relay.stderr.decode()
            async with await Client.connect(http) as client:
                assert (await client.ask(request())).end == "whole"
            before = await serial_at(https, authority)
            authority.issue()
            relay.signal(signal.SIGHUP)
            await relay.prints(lambda: b"relay: reloaded" in relay.stderr)
            after = {await serial_at(https, authority) for _ in range(10)}
            assert len(after) == 1
            assert before not in after
            relay.signal(signal.SIGTERM)
            assert await relay.ended() == 0


async def test_a_socket_for_https_needs_a_certificate(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secure:
        async with relay_serve("--upstream", engine.url, passed={"https": secure}) as relay:
            assert await relay.ended() == 1
    assert b"give listen.tls, or disable relay-https.socket" in relay.stderr


def test_check_reads_the_files(tmp_path: Path, authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file(tmp_path / "relay.toml", "http://127.0.0.1:1", authority.issue())
    assert cli.main(["check", "--config", str(file.path)]) == 0
    assert "listen on https://127.0.0.1:8080" in capsys.readouterr().out
    authority.spoil()
    assert cli.main(["check", "--config", str(file.path)]) == 2
    assert "no certificate chain and key in PEM" in capsys.readouterr().err
