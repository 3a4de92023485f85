"""Split pools over real sockets: which engine gets what, in which order, and what the client hears of it."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
import trio
import trio.testing

from relay.address import parse_upstream
from relay.config import FailoverConfig, TimeoutsConfig
from relay.core.connectors import CONNECTORS
from relay.core.document import edit
from relay.core.request import Route
from relay.net.pool import UpstreamConnection
from relay.net.tally import COMPLAINT_S
from tests.core.test_connectors_peers import Refused, address_in, ids_of, need, one_token, parsed, raw_params
from tests.e2e.fleet import answer
from tests.e2e.harness import Answer, Client, ask, assert_cut_off, request, until
from tests.e2e.pairs import (
    BODIES,
    CLIENT,
    DECODED,
    HANDLE,
    LOST,
    PREFILLED,
    STREAMS,
    WITHOUT_HANDLE,
    Asked,
    Half,
    Silence,
    Turn,
    dies,
    raw,
    recorded,
    says,
    sent,
    split_pair,
)

ROUTES: Final = tuple(CLIENT)
IS_STREAM: Final = pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])


def decoders_answer(route: Route, *, stream: bool) -> str:
    return STREAMS[route] if stream else BODIES[route]


def body_of(data: bytes) -> bytes:
    return data.partition(b"\r\n\r\n")[2]


def assert_decoders(got: Answer, name: str) -> None:
    """The client has the decoder's answer, to the byte."""
    wanted = recorded(name)
    assert (got.status, got.end) == (wanted.status, "whole")
    assert got.payload == wanted.body
    assert got.headers["content-type"] == dict(wanted.headers)[b"content-type"].decode()


# -- each connector, with engines as strict as the real ones


class Strict:
    """Both engines of a connector: whatever they would not take is a 400 that says why."""

    def __init__(self, route: Route, client: bytes) -> None:
        self.route = route
        self.client = client
        self.name = ""

    def checked(self, turn: Turn) -> Turn:
        async def checked(asked: Asked, stream: trio.SocketStream) -> None:
            try:
                self.check_head(asked)
                await turn(asked, stream)
            except Refused as refusal:
                await stream.send_all(answer(400, json.dumps({"refused": str(refusal)}).encode()))

        return checked

    def check_head(self, asked: Asked) -> None:
        """What every leg carries of the client's request, and of the relay."""
        fields = asked.headers
        need(asked.method == "POST" and asked.path.endswith("?q=1"), "not the client's method and target")
        need(fields["host"].startswith("127.0.0.1:"), "the client's host")
        need(fields["authorization"] == "Bearer sk-1", "no key")
        need(fields["traceparent"] == "00-1-2-01", "no trace")
        need(fields["x-own"] == "1", "a header is missing")
        need(fields["via"] == "1.1 relay" and fields["accept-encoding"] == "identity", "not the relay's")
        need("x-hop" not in fields, "a hop-by-hop header")

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        raise NotImplementedError

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        raise NotImplementedError

    async def answer_it(self, stream: trio.SocketStream) -> None:
        """The decoder's good answer."""
        await stream.send_all(raw(self.name))


class Pull(Strict):
    """NIXL, and vllm-ascend's Mooncake: a handle is read once, to the byte."""

    held: bytes = b""
    id = ""

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        params = one_token(self.route, asked.leg).get("kv_transfer_params") or {}
        need(params.get("do_remote_decode") is True and params.get("remote_host", 0) is None, "asks for no handle")
        need(edit(asked.body, {"kv_transfer_params": None}) != self.client, "not cut down to a token")
        self.held, self.id = HANDLE, asked.id
        await stream.send_all(PREFILLED)

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        need(raw_params(asked.leg) == self.held, "not the handle, to the byte")
        need(asked.id == self.id, "another id than the prefill leg")
        need(edit(asked.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        self.held = b""
        await self.answer_it(stream)


class Together(Strict):
    """Both are asked at once; neither answers before the other has come."""

    def __init__(self, route: Route, client: bytes) -> None:
        super().__init__(route, client)
        self.prefilling, self.decoding = trio.Event(), trio.Event()


class Mooncake(Together):
    """vLLM's: the two meet by a transfer id, at the engine that the bootstrap server has named."""

    def __init__(self, route: Route, client: bytes) -> None:
        super().__init__(route, client)
        self.transfer: Any = None
        self.queries = 0
        self.bootstrap = ""

    async def query(self, asked: Asked, stream: trio.SocketStream) -> None:
        assert (asked.method, asked.path) == ("GET", "/query")
        self.queries += 1
        await stream.send_all(answer(200, b'{"0":{"engine_id":"engine-%d"}}' % self.queries))

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        params = one_token(self.route, asked.leg)["kv_transfer_params"]
        self.prefilling.set()
        await self.decoding.wait()
        wanted = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": self.transfer["transfer_id"]}
        need(params == wanted, "the decoder waits elsewhere")
        await stream.send_all(WITHOUT_HANDLE)

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        self.transfer = parsed(self.route, asked.leg)["kv_transfer_params"]
        need(self.transfer["remote_bootstrap_addr"] == self.bootstrap, "another bootstrap server")
        need(self.transfer["remote_engine_id"] == f"engine-{self.queries}", "an engine of old")
        need(edit(asked.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        self.decoding.set()
        await self.prefilling.wait()
        await self.answer_it(stream)


class Push(Strict):
    """p2p_nccl: each reads the other's address from the request id."""

    id = ""

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        for one in ids_of(self.route, asked.leg, one_token(self.route, asked.leg)):
            need(address_in(one, r"___decode_addr_(.*):(\d+)") == "10.0.0.7:21001", "no decoder in the id")
        self.id = asked.id
        await stream.send_all(WITHOUT_HANDLE)

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        need(asked.id == self.id, "another id")
        own = {"request_id": None} if self.route is Route.RESPONSES else {}
        need(edit(asked.body, own) == self.client, "not the client's body")
        await self.answer_it(stream)


class Layerwise(Strict):
    """vllm-ascend's: the decoder makes room and calls back; its message becomes the prefill leg's parameters."""

    message = b""

    def __init__(self, route: Route, client: bytes) -> None:
        super().__init__(route, client)
        self.is_pushed = trio.Event()

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        body = parsed(self.route, asked.leg)
        need(edit(asked.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        need("kv_transfer_params" in body, "alone")
        params = body["kv_transfer_params"]
        (inner,) = ids_of(self.route, asked.leg, body)
        self.message = b'{ "request_id":"%b", "remote_port":5000, "x":1e400 }' % inner.encode()
        for _ in range(2):  # it calls again where it thinks that nobody heard
            assert (await call(params["metaserver"], self.message)).status == 200
        await self.is_pushed.wait()
        await self.answer_it(stream)

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        (inner,) = ids_of(self.route, asked.leg, one_token(self.route, asked.leg))
        need(raw_params(asked.leg) == self.message, "not the decoder's message, to the byte")
        need(f'"{inner}"'.encode() in self.message, "the decoder waits for another id")
        self.is_pushed.set()
        await stream.send_all(WITHOUT_HANDLE)


async def call(url: str, message: bytes, *, source: str = "127.0.0.1", path: str = "") -> Answer:
    """A decoder's call to a metaserver; `source` is the address it comes from."""
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/v1/metaserver)", url)
    assert found is not None, url
    sock = trio.socket.socket()
    await sock.bind((source, 0))
    await sock.connect(("127.0.0.1", int(found[1])))
    head = f"POST {path or found[2]} HTTP/1.1\r\nhost: relay\r\ncontent-length: {len(message)}\r\n\r\n"
    async with Client(trio.SocketStream(sock)) as client:
        return await client.ask(head.encode() + message)


class Rooms(Together):
    """SGLang's: a room at the prefiller's bootstrap server."""

    room: Any = None

    def in_room(self, asked: Asked) -> Any:
        body = asked.json()
        members = [body.pop(f"bootstrap_{part}") for part in ("host", "port", "room")]
        need(members[:2] == ["127.0.0.1", 9001] and 0 <= members[2] < 2**63, "no room")
        return members

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        need(asked.json().get("stream") is False, "an error would have status 200")
        self.prefilling.set()
        await self.decoding.wait()
        need(self.in_room(asked) == self.room, "another room")
        await stream.send_all(WITHOUT_HANDLE)

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        self.room = self.in_room(asked)
        rooms = dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"))
        need(edit(asked.body, rooms) == self.client, "not the client's body")
        self.decoding.set()
        await self.prefilling.wait()
        await self.answer_it(stream)


class Warm(Strict):
    """Two engines that share a cache."""

    is_warm = False

    async def prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        need("kv_transfer_params" not in one_token(self.route, asked.leg), "more than a warmer")
        self.is_warm = True
        await stream.send_all(WITHOUT_HANDLE)

    async def decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        need(self.is_warm and asked.body == self.client, "not the client's body")
        await self.answer_it(stream)


PEERS: Final[dict[str, type[Strict]]] = {
    "nixl": Pull,
    "mooncake": Mooncake,
    "ascend_mooncake": Pull,
    "p2p_nccl": Push,
    "ascend_layerwise": Layerwise,
    "sglang": Rooms,
    "none": Warm,
}
#: In which order the engines are asked.
ORDERS: Final = {"ascend_layerwise": "dp", "mooncake": "", "sglang": ""}  # the others: "pd"; empty: any
OWN: Final[dict[str, Any]] = {"authorization": "Bearer sk-1", "traceparent": "00-1-2-01", "x_own": "1", "x_hop": "1"}


def client_body(route: Route, *, stream: bool) -> bytes:
    return CLIENT[route][:-1] + b',"stream":true}' if stream else CLIENT[route]


@IS_STREAM
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.value)
@pytest.mark.parametrize("connector", CONNECTORS)
async def test_a_connector(connector: str, route: Route, stream: bool) -> None:
    peer = PEERS[connector](route, client_body(route, stream=stream))
    peer.name = decoders_answer(route, stream=stream)
    settings = {"kv_address": "10.0.0.7:21001", "bootstrap_port": 9001}
    async with trio.open_nursery() as nursery:
        if isinstance(peer, Mooncake):
            settings["bootstrap"] = peer.bootstrap = await Half(peer.query).listen(nursery)
        async with split_pair(connector=connector, engine=settings) as pair:
            pair.prefill.usual, pair.decode.usual = peer.checked(peer.prefill), peer.checked(peer.decode)
            got = await ask(pair.relay.port, sent(route, stream=stream, connection="x-hop", **OWN))
            record = await pair.relay.record()
        nursery.cancel_scope.cancel()
    if connector == "ascend_layerwise" and route is Route.RESPONSES:  # whose API does not go by X-Request-Id
        assert (got.status, got.json(), pair.order) == (400, {"refused": "alone"}, "d")
        return
    assert_decoders(got, peer.name)
    assert pair.order in (ORDERS.get(connector, "pd") or ("pd", "dp"))
    assert len(pair.order) == 2
    assert (record.outcome, record.status, record.attempts) == ("--", 200, 1)
    assert (record.upstream, record.prefill_upstream) == (pair.decode.last.engine, pair.prefill.last.engine)
    assert record.prefill_ms is not None
    assert (record.handover_ms is not None) == stream
    assert "prefill;dur=" in got.headers["server-timing"]
    assert pair.prefill.last.headers["content-length"] == str(len(pair.prefill.last.body))


@pytest.mark.parametrize("connector", CONNECTORS)
async def test_what_does_not_generate_goes_to_a_decoder(connector: str) -> None:
    async with split_pair(connector=connector, engine={"bootstrap": "http://127.0.0.1:9"}) as pair:
        pair.decode.usual = says(answer(200, b'{"tokens":[1]}'))
        body = b'{"model":"tiny","prompt":"once"}'
        head = f"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        got = await ask(pair.relay.port, head.encode() + body)
        record = await pair.relay.record()
    assert (got.status, got.json(), pair.order) == (200, {"tokens": [1]}, "d")
    assert pair.decode.last.body == body
    assert (record.prefill_upstream, record.prefill_ms) == (None, None)


@pytest.mark.parametrize(("connector", "members"), [("nixl", b'"n":2'), ("nixl", b'"echo":true,"logprobs":1'),
    ("mooncake", b'"prompt":["a","b"]'), ("ascend_layerwise", b'"n":2')])  # fmt: skip
async def test_what_cannot_be_split_is_decoded_alone(connector: str, members: bytes) -> None:
    async with trio.open_nursery() as nursery:
        url = await Half(says(answer(200, b'{"0":{"engine_id":"e"}}'))).listen(nursery)
        async with split_pair(connector=connector, engine={"bootstrap": url}) as pair:
            body = b'{"model":"tiny",%b,"kv_transfer_params":{"remote_host":"203.0.113.9"}}' % members
            pair.decode.usual = says(raw(STREAMS[Route.COMPLETIONS]))
            got = await ask(pair.relay.port, sent(Route.COMPLETIONS, body))
        nursery.cancel_scope.cancel()
    assert (got.status, got.end, pair.order) == (200, "whole", "d")
    assert pair.decode.last.body == b'{"model":"tiny",%b,"stream":true}' % members


# -- what a prefiller does wrong

SLOW: Final = TimeoutsConfig(prefill_s=0.05)
TRY_TWICE: Final = FailoverConfig(attempts=2)
BAD_REQUEST: Final = answer(400, b'{"error":{"message":"too long"}}', "x-why: 1")


@pytest.mark.parametrize(
    ("path", "rest", "status"),
    [
        ("/v1/chat/completions", b"", 200),
        ("/v1/chat/completion%73", b"", 200),
        ("/v1/chat%2Fcompletions", b"", 200),
        ("/invocations", b"", 200),
        ("/v1/chat/completions", b',"a":NaN', 400),
        ("/invocations", b',"a":"\\ud800"', 400),
    ],
)
async def test_a_clients_own_handle_reaches_nobody(path: str, rest: bytes, status: int) -> None:
    body = b'{"model":"tiny","messages":[],"kv_transfer_params":{"remote_host":"203.0.113.9"}%b}' % rest
    async with split_pair() as pair:
        got = await ask(pair.relay.port, request(path, body))
        assert got.status == status
        if status == 400:
            assert got.error["code"] == "invalid_json"
            assert got.error["message"].startswith("a split pool has to read the body: not a JSON object: ")
        for asked in (*pair.prefill.asked, *pair.decode.asked):
            assert b"203.0.113.9" not in asked.body
        assert len(pair.decode.asked) == (status == 200)
        assert (await pair.relay.record()).outcome == ("--" if status == 200 else "RR")


async def test_a_preflight_is_the_decoders_and_takes_no_prefillers_place() -> None:
    async with split_pair(1, 2, engine={"max_in_flight": 1}) as pair:
        silence = Silence()
        pair.prefill.usual = silence
        pair.decode.usual = says(answer(204, b""))
        async with await Client.connect(pair.relay.port) as busy:
            await busy.send(sent())
            await until(lambda: len(pair.prefill.asked) == 1)
            preflight = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: relay\r\norigin: http://page\r\n\r\n"
            assert (await ask(pair.relay.port, preflight)).status == 204
        assert [asked.method for asked in pair.decode.asked] == ["OPTIONS"]


@IS_STREAM
@pytest.mark.parametrize("connector", ["nixl", "sglang", "none"])
async def test_a_prefillers_refusal_is_the_answer(connector: str, stream: bool) -> None:
    async with split_pair(2, 2, connector=connector) as pair:
        silence = Silence()
        pair.prefill.usual, pair.decode.usual = says(BAD_REQUEST), silence
        got = await ask(pair.relay.port, sent(stream=stream))
        record = await pair.relay.record()
        if connector == "sglang":
            await silence.left()  # it would wait for the prefiller without end
        assert len(pair.order) == (2 if connector == "sglang" else 1)
    assert (got.status, got.payload, got.headers["x-why"]) == (400, body_of(BAD_REQUEST), "1")
    assert got.headers["x-request-id"] == record.id
    assert (record.status, record.outcome, record.attempts, record.error) == (400, "--", 1, "too long")


class Failed(NamedTuple):
    """What becomes of a prefiller's failure where nobody takes over."""

    outcome: str
    status: int
    code: str = ""  #: empty: the client gets the engine's own answer, which came whole


FAILURES: Final[dict[str, tuple[Turn, Failed]]] = {
    "500": (says(answer(500, b'{"error":"P"}')), Failed("UP", 500)),
    "503": (says(answer(503, b'{"error":"P"}')), Failed("UP", 503)),
    "dies": (dies(), Failed("UP", 502, "upstream_disconnected")),
    "dies in its answer": (dies(PREFILLED[:-9]), Failed("UP", 502, "upstream_disconnected")),
    "no HTTP": (says(b"220 smtp ready\r\n\r\n"), Failed("UP", 502, "upstream_error")),
    "too slow": (Silence(), Failed("uP", 504, "upstream_timeout")),
}


@pytest.mark.parametrize(("failure", "told"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("connector", ["nixl", "sglang"])
async def test_another_prefiller_takes_over(connector: str, failure: Turn, told: Failed) -> None:
    async with split_pair(2, 2, connector=connector, timeouts=SLOW) as pair:
        pair.prefill.script = [failure]
        got = await ask(pair.relay.port, sent(x_request_id="own"))
        record = await pair.relay.record()
        first, second = pair.prefill.asked
        assert first.engine != second.engine
        assert (first.id, second.id) == ("own", "own-2")
        assert pair.metric("relay_failovers_total") == 1
        assert pair.metric("relay_upstream_failures_total") == 1
        failed = pair.relay.upstreams[first.engine]
        assert (failed.failures, failed.idle) == (1, not told.code)
    assert_decoders(got, STREAMS[Route.CHAT])
    assert (record.outcome, record.attempts, record.prefill_upstream) == ("--", 2, second.engine)
    assert got.headers["x-request-id"] == "own"
    if connector == "sglang":
        rooms = {asked.json()["bootstrap_room"] for asked in pair.prefill.asked}
        assert len(rooms) == 2


async def test_a_prefiller_that_takes_no_connection_is_not_waited_for_longer(tmp_path: Path) -> None:
    """`prefill_s` bounds all of the leg, also where `connect_s` bounds nothing."""
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as filler:
        full.bind(f"{tmp_path}/p")
        full.listen(0)
        filler.connect(f"{tmp_path}/p")
        prefill = {"prefill": (parse_upstream(f"unix:{tmp_path}/p"),)}
        limits = TimeoutsConfig(prefill_s=0.05, connect_s=0)
        async with split_pair(settings=prefill, timeouts=limits) as pair:
            got = await ask(pair.relay.port, sent())
            record = await pair.relay.record()
            assert not pair.decode.asked
    assert (got.status, record.outcome) == (504, "uP")
    assert "prefill_s = 0.05" in (record.error or "")


async def test_a_prefillers_last_word_counts() -> None:
    """Its answer was on its way when its time was over: nobody else would free the handle in it."""

    async def answers_when_left(asked: Asked, stream: trio.SocketStream) -> None:
        assert not await stream.receive_some()
        await stream.send_all(PREFILLED)
        await stream.aclose()

    async with split_pair(2, 2, connector="nixl", timeouts=SLOW) as pair:
        pair.prefill.script = [answers_when_left]
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
        assert len(pair.prefill.asked) == 1
        assert pair.metric("relay_upstream_failures_total") == 0
    assert_decoders(got, STREAMS[Route.CHAT])
    assert (record.outcome, record.attempts) == ("--", 1)


@IS_STREAM
@pytest.mark.parametrize(("failure", "told"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("connector", ["nixl", "sglang"])
async def test_the_last_prefillers_failure_is_told(connector: str, failure: Turn, told: Failed, stream: bool) -> None:
    async with split_pair(connector=connector, timeouts=SLOW) as pair:
        pair.prefill.usual = failure
        pair.decode.usual = silence = Silence()
        got = await ask(pair.relay.port, sent(stream=stream))
        record = await pair.relay.record()
        if connector == "sglang":
            await silence.left()
        assert pair.relay.upstreams[pair.prefill.urls[0]].idle == (not told.code)
    assert (got.status, got.end, record.status, record.attempts) == (told.status, "whole", told.status, 1)
    assert record.outcome == told.outcome
    if told.code:
        assert got.error["code"] == told.code
    else:
        assert got.payload == b'{"error":"P"}'  # the engine's own words
        assert record.error == f'the prefiller answered {told.status}: {{"error":"P"}}'


async def test_attempts_are_bounded() -> None:
    async with split_pair(3, 3, failover=TRY_TWICE) as pair:
        pair.prefill.usual = dies()
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert (got.status, record.attempts, pair.order) == (502, 2, "pp")


async def test_no_attempt_begins_behind_the_budget() -> None:
    async with split_pair(2, 2, failover=FailoverConfig(budget_s=0.01), timeouts=SLOW) as pair:
        pair.prefill.usual = Silence()
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert (got.status, record.attempts, pair.order) == (504, 1, "p")


# -- the handle


@IS_STREAM
async def test_without_a_handle_the_decoder_is_alone(stream: bool) -> None:
    async with split_pair() as pair:
        pair.prefill.usual = says(WITHOUT_HANDLE)
        pair.decode.usual = says(raw(decoders_answer(Route.CHAT, stream=stream)))
        got = await ask(pair.relay.port, sent(stream=stream))
        assert pair.metric("relay_prefill_without_kv_total") == 1
        assert pair.decode.last.body == client_body(Route.CHAT, stream=stream)
    assert_decoders(got, decoders_answer(Route.CHAT, stream=stream))


async def test_a_prefiller_without_handles_is_told_of_once_in_a_while(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of them, and again when a minute is over."""
    async with split_pair(2, settings={"name": "long", "balance": "round_robin"}) as pair:
        pair.prefill.usual = says(WITHOUT_HANDLE)
        for _ in range(4):
            assert (await ask(pair.relay.port, sent())).status == 200
        first = capsys.readouterr().err.splitlines()
        for prefiller in pair.relay.worker.service.fleet.pools[0].groups["prefill"].upstreams.values():
            prefiller.lack_told_at -= COMPLAINT_S
        for _ in range(4):
            assert (await ask(pair.relay.port, sent())).status == 200
        again = capsys.readouterr().err.splitlines()
        assert pair.metric("relay_prefill_without_kv_total") == 8
    advice = "if it goes on, look at its --kv-transfer-config, and the pool's connector: nixl"
    assert (
        sorted(first)
        == sorted(again)
        == sorted(
            f"relay: pool long: {url} prefilled and gave no handle, so a decoder computes the prompt again; {advice}"
            for url in pair.prefill.urls
        )
    )


async def test_a_missing_handle_may_be_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    async with split_pair(settings={"on_missing_kv": "error"}) as pair:
        pair.prefill.usual = says(WITHOUT_HANDLE)
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
        assert pair.metric("relay_prefill_without_kv_total") == 1
    assert (got.status, got.error["code"], pair.order) == (502, "upstream_error", "p")
    assert record.outcome == "UP"
    assert "gave no handle, so the request fails (on_missing_kv);" in capsys.readouterr().err


async def test_a_missing_handle_leads_to_another_prefiller() -> None:
    async with split_pair(2, settings={"on_missing_kv": "error"}) as pair:
        pair.prefill.script = [says(WITHOUT_HANDLE)]
        got = await ask(pair.relay.port, sent())
    assert (got.status, pair.order) == (200, "ppd")


# -- what a decoder does wrong

BEFORE_A_FRAME: Final[dict[str, Turn]] = {
    "500": says(answer(500, b'{"error":"D"}')),
    "503": says(answer(503)),
    "dies": dies(),
    "dies behind its head": dies(DECODED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"),
    "dies behind the role": dies(DECODED[: DECODED.index(b"\n\n") + 4]),
    "loses the handle": says(LOST),
    "loses it a moment later": says(*LOST.partition(b"\r\n72\r\n")),
    "no HTTP": says(b"220 smtp ready\r\n\r\n"),
    "too slow": Silence(),
}


@pytest.mark.parametrize("connector", ["nixl", "sglang", "p2p_nccl"])
@pytest.mark.parametrize("failure", BEFORE_A_FRAME.values(), ids=BEFORE_A_FRAME)
async def test_another_pair_takes_over_with_a_fresh_prefill(connector: str, failure: Turn) -> None:
    timeouts = TimeoutsConfig(first_token_s=0.05)
    async with split_pair(2, 2, connector=connector, timeouts=timeouts) as pair:
        pair.decode.script = [failure]
        handles = iter((b'{"first":1}', b'{"second":2}'))

        async def hand_over(asked: Asked, stream: trio.SocketStream) -> None:
            await stream.send_all(answer(200, b'{"kv_transfer_params":%b}' % next(handles)))

        pair.prefill.usual = hand_over
        got = await ask(pair.relay.port, sent(x_request_id="own"))
        record = await pair.relay.record()
        assert pair.metric("relay_failovers_total") == 1
        first, second = pair.decode.asked
        assert first.engine != second.engine
        assert pair.relay.upstreams[first.engine].failures == 1
        drains = pair.relay.worker.service.drains
        assert (drains.done, drains.failed) == (0, 0)  # the handle was sent
    assert_decoders(got, STREAMS[Route.CHAT])
    assert (record.outcome, record.status, record.attempts, record.error) == ("--", 200, 2, None)
    assert len({asked.id for asked in (*pair.prefill.asked, *pair.decode.asked)}) == 2
    if connector != "p2p_nccl":
        assert (first.id, second.id) == ("own", "own-2")
    if connector == "nixl":
        assert raw_params(first.leg) == b'{"first":1}'
        assert raw_params(second.leg) == b'{"second":2}'


async def test_a_lost_handle_has_a_true_status_where_there_is_nobody_else() -> None:
    async with split_pair() as pair:
        pair.decode.usual = says(LOST)
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert (got.status, got.end) == (500, "whole")
    assert got.headers["content-type"] == "application/json"
    assert got.error == {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
    assert (record.outcome, record.status, record.error) == ("UH", 500, "Internal server error")


async def test_a_wrong_request_told_in_the_stream_is_not_tried_again() -> None:
    frame = b'data: {"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    async with split_pair(2, 2) as pair:
        pair.decode.usual = says(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(frame), frame))
        got = await ask(pair.relay.port, sent())
        assert pair.metric("relay_upstream_failures_total") == 0  # nor is it an engine's failure
    assert (got.status, got.error["message"], pair.order) == (400, "no", "pd")


async def test_a_decoders_refusal_ends_the_prefill_leg() -> None:
    async with split_pair(connector="sglang") as pair:
        pair.prefill.usual = silence = Silence()
        pair.decode.usual = says(BAD_REQUEST)
        got = await ask(pair.relay.port, sent())
        await silence.left()
    assert (got.status, got.payload) == (400, body_of(BAD_REQUEST))


async def test_a_stream_that_breaks_is_told_so() -> None:
    frames = DECODED.index(b"\n\n", DECODED.index(b"\n\n") + 2) + 4  # role and one token
    async with split_pair(2, 2) as pair:
        pair.decode.usual = dies(DECODED[:frames])
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert_cut_off(got, "upstream_disconnected", frames=2)
    assert (record.outcome, record.attempts, pair.order) == ("UD", 1, "pd")


# -- the second frame


async def test_a_role_waits_a_moment_only() -> None:
    """A decoder that is silent behind its role: that frame goes out all the same, and soon."""
    role = DECODED[: DECODED.index(b"\n\n") + 4]
    async with split_pair() as pair:
        pair.decode.usual = silence = Silence(role)
        async with await Client.connect(pair.relay.port) as client:
            await client.send(sent())
            await silence.begun.wait()
            began = trio.current_time()
            frames = await client.frames(1)
            waited = trio.current_time() - began
            assert frames.endswith(role[-60:])
        await silence.left()
        assert (await pair.relay.record()).outcome == "CD"
    assert 0.05 < waited < 0.6


async def test_a_role_waits_a_moment_only_where_more_of_its_kind_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as they are read, so that there is never anything to wait for."""
    role = DECODED[: DECODED.index(b"\n\n") + 4]
    comment = b"e\r\n: keep-alive\n\n\r\n"
    reads = 0

    async def flood(_: object, connection: UpstreamConnection) -> bytes:  # noqa: ASYNC124 - a turn of the others is what must not be had here
        nonlocal reads
        reads += 1
        assert reads < 50_000
        assert connection.source is not None
        connection.source.has_news = True
        return comment

    monkeypatch.setattr("relay.net.second_frame.wire", SimpleNamespace(receive=flood))
    async with split_pair() as pair:
        pair.decode.usual = says(role, comment)
        async with await Client.connect(pair.relay.port) as client:
            await client.send(sent())
            assert b"keep-alive" in await client.frames(2)


async def test_what_comes_within_the_moment_goes_out_with_the_role() -> None:
    end = DECODED.index(b"\n\n") + 4
    async with split_pair() as pair:
        pair.decode.usual = says(DECODED[:end], DECODED[end:])
        got = await ask(pair.relay.port, sent())
    assert_decoders(got, STREAMS[Route.CHAT])


async def test_streams_of_unknown_routes_do_not_wait() -> None:
    stream = b"data: {}\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    async with split_pair() as pair:
        pair.decode.usual = silence = Silence(head + stream)
        async with await Client.connect(pair.relay.port) as client:
            await client.send(b"POST /other HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            await silence.begun.wait()
            began = trio.current_time()
            await client.frames(1)
            assert trio.current_time() - began < 0.09
        await silence.left()


# -- what has to be asked, or told, beside the legs


async def test_a_bootstrap_server_is_asked_once_and_again_after_a_failure() -> None:
    async with trio.open_nursery() as nursery:
        numbers = iter(range(1, 9))

        async def query(asked: Asked, stream: trio.SocketStream) -> None:
            await stream.send_all(answer(200, b'{"0":{"engine_id":"engine-%d"}}' % next(numbers)))

        bootstrap = Half(query)
        url = await bootstrap.listen(nursery)
        async with split_pair(connector="mooncake", engine={"bootstrap": url}) as pair:

            async def engine_asked() -> tuple[int, str]:
                got = await ask(pair.relay.port, sent())
                return got.status, pair.decode.last.json()["kv_transfer_params"]["remote_engine_id"]

            assert await engine_asked() == (200, "engine-1")
            assert await engine_asked() == (200, "engine-1")
            pair.prefill.script = [says(answer(500))]
            assert await engine_asked() == (500, "engine-1")
            assert await engine_asked() == (200, "engine-2")
            pair.decode.script = [says(answer(500))]  # it does not find the engine: that has been started anew
            assert await engine_asked() == (500, "engine-2")
            assert await engine_asked() == (200, "engine-3")
        assert len(bootstrap.asked) == 3
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "useless", [says(answer(500)), says(answer(200, b"{}")), says(answer(200, b"<html>")), dies()]
)  # fmt: skip
async def test_a_useless_bootstrap_server_is_its_prefillers_failure(useless: Turn) -> None:
    async with trio.open_nursery() as nursery:
        bootstrap = Half(says(answer(200, b'{"0":{"engine_id":"e"}}')))
        bootstrap.script = [useless]
        url = await bootstrap.listen(nursery)
        async with split_pair(2, connector="mooncake", engine={"bootstrap": url}) as pair:
            got = await ask(pair.relay.port, sent())
            record = await pair.relay.record()
            failures = [pair.relay.upstreams[url].failures for url in pair.prefill.urls]
            assert sorted(failures) == [0, 1]
            bootstrap.usual = useless
            for upstream in pair.relay.upstreams.values():
                upstream.endpoint = None
            last = await ask(pair.relay.port, sent())
            assert (await pair.relay.record(2)).outcome == "UP"
        nursery.cancel_scope.cancel()
    assert (got.status, record.attempts) == (200, 2)
    assert last.status == 502
    assert last.error["message"].startswith("the prefiller's bootstrap server was of no use: ")
    assert "127.0.0.1" not in last.error["message"]


async def test_only_the_pools_decoders_may_call_back() -> None:
    async with split_pair(connector="ascend_layerwise") as pair:
        pair.decode.usual = silence = Silence()
        async with await Client.connect(pair.relay.port) as client:
            await client.send(sent())
            await silence.begun.wait()
            url = pair.decode.last.json()["kv_transfer_params"]["metaserver"]
            message = b'{"request_id":"chatcmpl-%b"}' % pair.decode.last.id.encode()
            assert (await call(url, b"", source="127.0.0.2")).status == 403
            assert (await call(url, b"", path="/v1/completions")).status == 404
            assert (await call(url, b'{"request_id":"chatcmpl-%b"}' % (b"0" * 32))).status == 200  # nobody's
            assert (await call(url, b"no JSON")).status == 200
            await trio.testing.wait_all_tasks_blocked()
            assert pair.order == "d"
            assert (await call(url, message)).status == 200
            await until(lambda: pair.order == "dp")
        await silence.left()
        record = await pair.relay.record()
        assert (await call(url, message)).status == 200  # too late
    assert (record.outcome, pair.order) == ("CH", "dp")


async def test_callbacks_come_where_the_configuration_says(free_port: int) -> None:
    settings = {"callback_address": f"127.0.0.1:{free_port}"}
    async with split_pair(connector="ascend_layerwise", settings=settings) as pair:
        await ask(pair.relay.port, sent())
        url = pair.decode.last.json()["kv_transfer_params"]["metaserver"]
    assert url == f"http://127.0.0.1:{free_port}/v1/metaserver"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("failure", "status", "outcome"), [(says(BAD_REQUEST), 400, "--"), (dies(), 502, "UP")], ids=["refuses", "dies"]
)
async def test_a_prefillers_failure_ends_a_decoder_that_waits_for_it(failure: Turn, status: int, outcome: str) -> None:
    async with split_pair(connector="ascend_layerwise") as pair:
        silence = Silence()

        async def wait_for_blocks(asked: Asked, stream: trio.SocketStream) -> None:
            url = asked.json()["kv_transfer_params"]["metaserver"]
            await call(url, b'{"request_id":"chatcmpl-%b"}' % asked.id.encode())
            await silence(asked, stream)

        pair.decode.usual, pair.prefill.usual = wait_for_blocks, failure
        got = await ask(pair.relay.port, sent())
        await silence.left()
        record = await pair.relay.record()
    assert (got.status, record.status, record.outcome) == (status, status, outcome)


async def test_a_prefillers_failure_is_all_the_same_once_tokens_flow() -> None:
    """The blocks are with the decoder by then."""
    async with split_pair(connector="ascend_layerwise") as pair:
        is_streaming = trio.Event()
        half = len(DECODED) // 2

        async def fail(asked: Asked, stream: trio.SocketStream) -> None:
            await is_streaming.wait()
            await stream.aclose()

        async def decode(asked: Asked, stream: trio.SocketStream) -> None:
            url = asked.json()["kv_transfer_params"]["metaserver"]
            await call(url, b'{"request_id":"chatcmpl-%b"}' % asked.id.encode())
            await stream.send_all(DECODED[:half])
            await until(lambda: bool(pair.relay.worker.service.pump.frames))
            is_streaming.set()
            await until(lambda: bool(pair.relay.upstreams[pair.prefill.urls[0]].failures))
            await stream.send_all(DECODED[half:])

        pair.decode.usual, pair.prefill.usual = decode, fail
        got = await ask(pair.relay.port, sent())
    assert_decoders(got, STREAMS[Route.CHAT])


async def test_an_engine_that_the_connector_cannot_tell_of_is_not_added() -> None:
    async with split_pair(connector="sglang") as pair:
        wrong = await pair.relay.admin("POST", "/-/upstreams", {"role": "prefill", "url": "unix:/run/p"})
        right = await pair.relay.admin("POST", "/-/upstreams", {"role": "prefill", "url": "http://10.0.0.1:8000"})
        assert len(pair.relay.upstreams) == 3
    assert (wrong.status, right.status) == (400, 200)
    assert b"unix:/run/p has no host for decoders to find its bootstrap server on" in wrong.payload
