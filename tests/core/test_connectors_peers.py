"""Each connector against a strict stand-in for its two engines.

The stand-ins do what the engines' connectors do with a request (vLLM `kv_connector/v1`, vllm-ascend `kv_p2p`, SGLang
`disaggregation`), and refuse whatever the engines would refuse, misread, or wait for without end. One driver, which
knows no connector, runs them all: it is the exchange without its sockets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from types import FunctionType
from typing import Any, Protocol

import msgspec
import pytest

from relay.core.connectors import connector_named
from relay.core.connectors.base import (
    CALLBACK_PATH,
    Concurrent,
    Connector,
    DecodeFirst,
    DecodeOnly,
    Endpoint,
    HandOver,
    LegRequest,
    Plan,
    Sequential,
    SplitRequest,
    drain,
)
from relay.core.document import edit
from relay.core.request import Route
from tests.core.captured import CAPTURES

PREFILL = Endpoint("http://10.0.0.1:8000", "10.0.0.1")
DECODE = Endpoint("http://10.0.0.2:8000", "10.0.0.2")
CALLBACK = f"http://10.0.0.9:8080{CALLBACK_PATH.decode()}"

CLIENT = {
    Route.CHAT: b'{"model":"m","messages":[{"role":"user","content":"Z\\u00fcrich"}],"stream":true,"min_tokens":3,'
    b'"stream_options":{"include_usage":true}, "max_completion_tokens":64,"temperature":1.0e-5}',
    Route.COMPLETIONS: b'{ "model":"m", "prompt":"once", "max_tokens":64, "seed":12345678901234567890, "n":1 }\n',
    Route.RESPONSES: b'{"model":"m","input":"once","max_output_tokens":64,"stream":true}',
    Route.MESSAGES: b'{"model":"m","messages":[],"max_tokens":4096,"thinking":{"type":"enabled","budget_tokens":2048}}',
}


class Refused(Exception):
    """An engine would not take this, or would not find its other half."""


def need(condition: object, message: str) -> None:
    """As `assert`, and `Refused`, so that a test can ask for it."""
    if not condition:
        raise Refused(message)


class Peer(Protocol):
    """A prefiller and a decoder."""

    def query(self, url: str) -> bytes: ...
    def prefill(self, leg: LegRequest) -> bytes: ...
    def decode(self, leg: LegRequest) -> bytes: ...


Tamper = Callable[[str, LegRequest], LegRequest]


def run(connector: Connector, peer: Peer, request: SplitRequest, tamper: Tamper = lambda _, leg: leg) -> Plan:
    """One attempt, as the exchange runs it, whatever the connector; `tamper` may falsify a leg on its way."""
    prefill, decode = connector.complete(PREFILL, "prefill"), connector.complete(DECODE, "decode")
    question = connector.preflight(prefill)
    if question is not None:
        prefill = question.parse(peer.query(question.url))
        assert connector.preflight(prefill) is None
    plan = connector.plan(request, prefill, decode, Random(f"{request.id} {request.attempt}"))
    match plan:
        case DecodeOnly(decode=leg):
            peer.decode(tamper("decode", leg))
        case Sequential(prefill=leg, hand_over=hand_over):
            handed = hand_over(peer.prefill(tamper("prefill", leg)))
            assert not handed.is_missing
            peer.decode(tamper("decode", handed.decode))
        case Concurrent(prefill=first, decode=second):
            peer.decode(tamper("decode", second))
            peer.prefill(tamper("prefill", first))
        case DecodeFirst(decode=leg, key=key, prefill=prefill_of):
            message = peer.decode(tamper("decode", leg))
            need(connector.callback_key(message) == key, "the callback finds nobody")
            peer.prefill(tamper("prefill", prefill_of(message)))
    return plan


# -- vLLM's API server


def limit_of(route: Route, body: dict[str, Any]) -> int | None:
    """How many tokens vLLM generates at most."""
    if route is Route.RESPONSES:
        found = body.get("max_output_tokens")
    else:
        found = (body.get("max_completion_tokens") if route is Route.CHAT else None) or body.get("max_tokens")
    assert found is None or isinstance(found, int)
    return found


def parsed(route: Route, leg: LegRequest) -> dict[str, Any]:
    """The body, if vLLM takes it."""
    body = json.loads(bytes(leg.body))
    limit = limit_of(route, body)
    need(body.get("stream") or "stream_options" not in body, "400: stream options without a stream")
    need(limit is None or body.get("min_tokens", 0) <= limit, "400: min_tokens above max_tokens")
    thinking = body.get("thinking") or {}
    is_prefill = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
    if route is Route.MESSAGES and not is_prefill and thinking.get("type") == "enabled":
        need(limit and thinking["budget_tokens"] < limit, "400: thinking.budget_tokens")
    assert isinstance(body, dict)
    return body


def one_token(route: Route, leg: LegRequest) -> dict[str, Any]:
    """The body, if its answer is one token, in one piece, ended by length."""
    body = parsed(route, leg)
    need(limit_of(route, body) == 1, "more than one token")
    need(body.get("min_tokens") == 1, "EOS may swallow the handle")
    need(not body.get("stream"), "an answer in pieces has no handle")
    need(body.get("stream") is False, "stream must be said")
    return body


def ids_of(route: Route, leg: LegRequest, body: dict[str, Any]) -> list[str]:
    """Under which ids vLLM runs the request's sequences, before it appends 9 random characters."""
    prompt = body.get("prompt")
    if route is Route.COMPLETIONS:
        several = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        ids = [f"cmpl-{leg.request_id}-{index}" for index in range(several)]
    elif route is Route.RESPONSES:
        ids = [f"{body.get('request_id', 'resp_' + str(id(leg)))}_0"]
    else:
        ids = [f"chatcmpl-{leg.request_id}"]
    n = body.get("n") or 1
    return ids if n == 1 else [f"{index}_{one}" for one in ids for index in range(n)]


class _Params(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


def raw_params(leg: LegRequest) -> bytes:
    """`kv_transfer_params` in the bytes they were sent in."""
    return bytes(msgspec.json.decode(leg.body, type=_Params).kv_transfer_params)


# -- NIXL, and vllm-ascend's Mooncake

#: An answer as vLLM gives it, and one in other bytes: spaces, an escape, a number no double holds, a key twice.
REAL_ANSWER = (CAPTURES / "pd/pd_chat_stream.1prefill.response.raw").read_bytes().partition(b"\r\n\r\n")[2]
REAL_HANDLE = REAL_ANSWER[REAL_ANSWER.index(b'{"do_remote_prefill"') : REAL_ANSWER.index(b',"ec_transfer_params"')]
ODD_HANDLE = b'{ "do_remote_prefill" : true, "a":1e400,"a":12345678901234567890.10, "h\\u00e9":"\\/", "x":[ ] }'


class PullPeer:
    """vLLM with the NixlConnector: a handle is read by one sequence, and stays held until it is."""

    def __init__(self, route: Route, client: bytes, handle: bytes = REAL_HANDLE) -> None:
        self.route, self.client, self.handle = route, client, handle
        self.id = ""
        self.held: set[bytes] = set()
        self.decoded_alone = 0

    def query(self, url: str) -> bytes:
        """Nothing is asked."""
        raise Refused(url)

    def prefill(self, leg: LegRequest) -> bytes:
        """The answer that holds the handle."""
        body = one_token(self.route, leg)
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        nulls = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        need(body.get("kv_transfer_params") == {**wanted, **nulls}, "asks for no handle")
        need(len(ids_of(self.route, leg, body)) == 1, "one handle for several sequences")
        need(not leg.headers, "headers nobody reads")
        self.id = leg.request_id
        self.held.add(self.handle)
        return b'{"id":"chatcmpl-x","kv_transfer_params":%b,"usage":{}}' % self.handle

    def decode(self, leg: LegRequest) -> bytes:
        """Reads what the handle names; decodes alone where there is none."""
        body = parsed(self.route, leg)
        if self.held:
            need(raw_params(leg) in self.held, "not the handle, to the byte")
            need(leg.request_id == self.id, "another id than the prefill leg")
            need(len(ids_of(self.route, leg, body)) == 1, "two sequences read one handle")
            self.held.remove(raw_params(leg))
        else:
            need("kv_transfer_params" not in body, "a handle from elsewhere")
            self.decoded_alone += 1
        need(edit(leg.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        return b""


@pytest.mark.parametrize("name", ["nixl", "ascend_mooncake"])
@pytest.mark.parametrize("handle", [REAL_HANDLE, ODD_HANDLE], ids=["real", "odd"])
@pytest.mark.parametrize("route", CLIENT)
def test_pull(name: str, route: Route, handle: bytes) -> None:
    peer = PullPeer(route, CLIENT[route], handle)
    plan = run(connector_named(name), peer, SplitRequest(route, CLIENT[route], "req-1"))
    assert isinstance(plan, Sequential)
    assert not plan.binds_decoder
    assert (peer.id, peer.held, peer.decoded_alone) == ("req-1", set(), 0)


@pytest.mark.parametrize("name", ["pd_chat_nonstream", "pd_chat_stream", "pd_comp_nonstream", "pd_comp_stream"])
def test_the_decode_leg_that_a_real_decoder_answered(name: str) -> None:
    route = Route.CHAT if "chat" in name else Route.COMPLETIONS
    client = (CAPTURES / f"pd/{name}.reference_direct.request.json").read_bytes()
    answer = (CAPTURES / f"pd/{name}.1prefill.response.raw").read_bytes().partition(b"\r\n\r\n")[2]
    handed = handed_over("nixl", route, client, answer)
    assert handed.holds_kv
    assert raw_params(handed.decode) in answer
    assert json.loads(handed.decode.body) == json.loads((CAPTURES / f"pd/{name}.2decode.request.json").read_bytes())


@pytest.mark.parametrize("name", ["pd_prefill_messages", "pd_prefill_responses"])
def test_the_handle_is_where_the_other_apis_have_it(name: str) -> None:
    route = Route.MESSAGES if "messages" in name else Route.RESPONSES
    answer = (CAPTURES / f"fail/{name}.response.raw").read_bytes().partition(b"\r\n\r\n")[2]
    handed = handed_over("nixl", route, CLIENT[route], answer)
    assert json.loads(raw_params(handed.decode)) == json.loads(answer)["kv_transfer_params"]


@pytest.mark.parametrize("answer", [
    (CAPTURES / "fail/pd_prefill_no_kv_params.response.raw").read_bytes().partition(b"\r\n\r\n")[2],
    b"{}", b'{"kv_transfer_params":{}}', b'{"kv_transfer_params":[1]}', b'{"kv_transfer_params":"x"}',
    b"", b"\xff", b"[]",
    b'{"choices":[{"kv_transfer_params":{"a":1}}]}',
], ids=lambda value: repr(value)[:30])  # fmt: skip
@pytest.mark.parametrize("name", ["nixl", "ascend_mooncake"])
def test_an_answer_without_a_handle_is_told(name: str, answer: bytes) -> None:
    client = edit(CLIENT[Route.CHAT], {"kv_transfer_params": b'{"remote_host":"203.0.113.9"}'})
    handed = handed_over(name, Route.CHAT, client, answer)
    assert handed.is_missing
    assert not handed.holds_kv
    assert handed.decode == LegRequest(CLIENT[Route.CHAT], "req-1")


def handed_over(name: str, route: Route, client: bytes, answer: bytes) -> HandOver:
    """What a sequential connector makes of a prefiller's answer."""
    plan = connector_named(name).plan(SplitRequest(route, client, "req-1"), PREFILL, DECODE, Random(1))
    assert isinstance(plan, Sequential)
    return plan.hand_over(answer)


# -- vLLM's Mooncake


class MooncakePeer:
    """vLLM with the MooncakeConnector: two engines, of which one has two data-parallel ranks, meet by transfer id."""

    def __init__(self, route: Route, client: bytes, ranks: int = 2) -> None:
        self.route, self.client = route, client
        self.engines = {str(rank): f"engine-{rank}" for rank in range(ranks)}
        self.waiting: dict[str, str] = {}
        self.transfers: list[str] = []

    def query(self, url: str) -> bytes:
        """The bootstrap server's answer."""
        need(url == "http://10.0.0.1:8998/query", "not the bootstrap server")
        workers = {"worker_addr": {"0": {"0": "10.0.0.1:5000"}}}
        return json.dumps({rank: {"engine_id": engine, **workers} for rank, engine in self.engines.items()}).encode()

    def decode(self, leg: LegRequest) -> bytes:
        """Asks the named engine for the transfer, and waits for it."""
        body = parsed(self.route, leg)
        params = body["kv_transfer_params"]
        fixed = {"do_remote_decode": False, "do_remote_prefill": True, "remote_bootstrap_addr": "http://10.0.0.1:8998"}
        keys = {*fixed, "remote_engine_id", "transfer_id"}
        need(params.keys() == keys and {**params, **fixed} == params, "invalid KVTransferParams")
        need(len(ids_of(self.route, leg, body)) == 1, "two sequences read one transfer")
        need(edit(leg.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        need(params["transfer_id"] not in self.transfers, "a transfer id used twice")
        need(re.fullmatch(r"xfer-[0-9a-f]{32}", params["transfer_id"]), "an id that is not random")
        self.waiting[params["transfer_id"]] = params["remote_engine_id"]
        self.transfers.append(params["transfer_id"])
        return b""

    def prefill(self, leg: LegRequest) -> bytes:
        """Computes on the rank that was asked, and serves the decoder that waits there."""
        body = one_token(self.route, leg)
        need(len(ids_of(self.route, leg, body)) == 1, "several sequences")
        params = dict(body["kv_transfer_params"])
        need(self.waiting.pop(params.pop("transfer_id", ""), "") == self.engine_of(leg), "the decoder waits elsewhere")
        need(params == {"do_remote_decode": True, "do_remote_prefill": False}, "invalid KVTransferParams")
        return b'{"kv_transfer_params":null}'

    def engine_of(self, leg: LegRequest) -> str:
        """The engine that computes: the rank the header asks for, which an engine of one rank needs not."""
        headers = dict(leg.headers)
        rank = headers.pop(b"x-data-parallel-rank", b"0").decode()
        need(not headers and (leg.headers or len(self.engines) == 1), "which rank computes is left open")
        return self.engines[rank]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("route", CLIENT)
def test_mooncake(route: Route, ranks: int) -> None:
    peer = MooncakePeer(route, CLIENT[route], ranks)
    for attempt in range(1, 9):
        plan = run(connector_named("mooncake"), peer, SplitRequest(route, CLIENT[route], "req-1", attempt))
        assert isinstance(plan, Concurrent)
        assert plan.prefill.request_id == plan.decode.request_id == ("req-1" if attempt == 1 else f"req-1-{attempt}")
    assert len(peer.transfers) == 8
    assert not peer.waiting


@pytest.mark.parametrize(
    "answer",
    [
        *[b"", b"[]", b"{}", b'{"0":{}}', b'{"x":{"engine_id":"a"}}', b'{"0":{"engine_id":1}}'],
        *[b'{"0":{"engine_id":"\xff"}}', b'{"0":{"engine_id":"a","x":' + b"[" * 100_000],
    ],
    ids=lambda answer: repr(answer)[:40],
)
def test_mooncake_learns_nothing_from_such_a_bootstrap_server(answer: bytes) -> None:
    connector = connector_named("mooncake")
    question = connector.preflight(connector.complete(PREFILL, "prefill"))
    assert question is not None
    with pytest.raises(ValueError, match=r"gave no list of engines|knows no engine"):
        question.parse(answer)


# -- P2P NCCL


class PushPeer:
    """vLLM with the P2pNcclConnector, request ids not randomised: tensors travel under the sequences' ids."""

    def __init__(self, route: Route, client: bytes) -> None:
        self.route, self.client = route, client
        self.sent: dict[str, str] = {}
        self.seen: set[str] = set()

    def query(self, url: str) -> bytes:
        """Nothing is asked."""
        raise Refused(url)

    def prefill(self, leg: LegRequest) -> bytes:
        """Sends each sequence's tensors to the decoder its id names."""
        body = one_token(self.route, leg)
        need("kv_transfer_params" not in body, "parameters nobody reads")
        for one in ids_of(self.route, leg, body):
            need(one not in self.seen, "an id used twice")
            self.seen.add(one)
            self.sent[one] = address_in(one, r"___decode_addr_(.*):(\d+)")
        return b'{"choices":[]}'

    def decode(self, leg: LegRequest) -> bytes:
        """Waits for the tensors of each sequence, from the prefiller its id names."""
        body = parsed(self.route, leg)
        for one in ids_of(self.route, leg, body):
            need(self.sent.pop(one, "") == "10.0.0.2:14579", "waits without end")
            need(address_in(one, r"___prefill_addr_(.*):(\d+)___") == "10.0.0.1:14579", "another prefiller")
        own = {"request_id": None} if self.route is Route.RESPONSES else {}
        need(edit(leg.body, own) == self.client, "not the client's body")
        return b""


def address_in(request_id: str, pattern: str) -> str:
    """The address that an engine reads from an id: greedily, up to the last port."""
    found = re.search(pattern, request_id)
    need(found, "no address in the id")
    assert found is not None
    return f"{found[1]}:{found[2]}"


@pytest.mark.parametrize("route", CLIENT)
def test_p2p_nccl(route: Route) -> None:
    peer = PushPeer(route, CLIENT[route])
    for attempt in (1, 2):
        plan = run(connector_named("p2p_nccl"), peer, SplitRequest(route, CLIENT[route], "a:1:2", attempt))
        assert isinstance(plan, Sequential)
        assert plan.binds_decoder
    assert len(peer.seen) == 2
    assert not peer.sent


@pytest.mark.parametrize("extra", [b'"n":3', b'"prompt":["a","b"]', b'"prompt":["a","b"],"n":2'])
def test_p2p_nccl_sends_each_sequence_under_its_own_id(extra: bytes) -> None:
    client = b'{"model":"m",%b}' % extra
    peer = PushPeer(Route.COMPLETIONS, client)
    run(connector_named("p2p_nccl"), peer, SplitRequest(Route.COMPLETIONS, client, "req-1"))
    assert len(peer.seen) > 1
    assert not peer.sent


# -- vllm-ascend, layer by layer


class LayerwisePeer:
    """vllm-ascend with the MooncakeLayerwiseConnector; request ids randomised, as they must be."""

    def __init__(self, route: Route, client: bytes) -> None:
        self.route, self.client = route, client
        self.message = b""
        self.waiting = ""

    def query(self, url: str) -> bytes:
        """Nothing is asked."""
        raise Refused(url)

    def decode(self, leg: LegRequest) -> bytes:
        """Makes room, and calls the metaserver back."""
        body = parsed(self.route, leg)
        room = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": CALLBACK}
        need(body["kv_transfer_params"] == room, "not told whom to call")
        need(edit(leg.body, {"kv_transfer_params": None}) == self.client, "not the client's body")
        (inner,) = [f"{one}-0123abcd" for one in ids_of(self.route, leg, body)]
        self.waiting = inner[:-9]
        blocks = {"remote_block_ids": [[7, 8]], "remote_block_size": [128], "remote_engine_id": "d", "token_ids": []}
        where = {"remote_host": "10.0.0.2", "remote_port": 5000, "remote_tp_size": 1, "remote_cached_tokens": 0}
        flags = {"do_remote_prefill": False, "do_remote_decode": True, "request_id": self.waiting}
        self.message = json.dumps({**flags, **blocks, **where}, indent=1).encode()
        return self.message

    def prefill(self, leg: LegRequest) -> bytes:
        """Pushes each layer, and reports "done" under its own id."""
        body = one_token(self.route, leg)
        need(raw_params(leg) == self.message, "not the decoder's message, to the byte")
        (inner,) = [f"{one}-4567cdef" for one in ids_of(self.route, leg, body)]
        need(inner[:-9] == self.waiting, "the decoder waits for another id")
        self.waiting = ""
        return b'{"choices":[]}'


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS, Route.MESSAGES])
def test_ascend_layerwise(route: Route) -> None:
    connector = connector_named("ascend_layerwise")
    keys = set()
    for attempt in (1, 2):
        peer = LayerwisePeer(route, CLIENT[route])
        plan = run(connector, peer, SplitRequest(route, CLIENT[route], "req-1", attempt, CALLBACK))
        assert isinstance(plan, DecodeFirst)
        assert plan.decode.request_id == ("req-1-" if attempt == 1 else "req-1-2-") + plan.key
        assert not peer.waiting
        keys.add(plan.key)
    assert len(keys) == 2


@pytest.mark.parametrize("message", [
    b"", b"[]", b"{}", b'{"request_id":7}', b'{"request_id":"chatcmpl-0123abcd"}',
    b'{"request_id":"%b"}' % (b"a" * 33), b"\xff",
])  # fmt: skip
def test_a_callback_for_nobody(message: bytes) -> None:
    assert connector_named("ascend_layerwise").callback_key(message) is None


def test_a_clients_id_that_looks_like_a_key_is_none() -> None:
    key = "0" * 32
    message = b'{"request_id":"chatcmpl-%b-2-%b"}' % (b"f" * 32, key.encode())
    assert connector_named("ascend_layerwise").callback_key(message) == key


# -- SGLang


class RoomPeer:
    """SGLang in its two disaggregation modes: a room for each sequence."""

    def __init__(self, client: bytes, sequences: int = 1) -> None:
        self.client, self.sequences = client, sequences
        self.rooms: list[int] = []

    def query(self, url: str) -> bytes:
        """Nothing is asked."""
        raise Refused(url)

    def decode(self, leg: LegRequest) -> bytes:
        """Waits in the rooms, and goes on from the prefiller's first token."""
        self.rooms = self.rooms_of(leg)
        need(not leg.headers and without_rooms(leg.body) == self.client, "not the client's body")
        return b""

    def prefill(self, leg: LegRequest) -> bytes:
        """Samples the first token, as the client wants it, and hands it over in the rooms."""
        need(self.rooms_of(leg) == self.rooms, "other rooms than the decoder's")
        need(json.loads(bytes(leg.body)).get("stream") is False, "an error would have status 200")
        streaming: dict[str, None] = {"stream": None, "stream_options": None}
        need(
            edit(without_rooms(leg.body), streaming) == edit(self.client, streaming),
            "another first token than the client's",
        )
        self.rooms = []
        return b'{"choices":[]}'

    def rooms_of(self, leg: LegRequest) -> list[int]:
        """The rooms, one for each sequence, all at the prefiller."""
        body = json.loads(bytes(leg.body))
        hosts, ports, rooms = (body[f"bootstrap_{part}"] for part in ("host", "port", "room"))
        if self.sequences == 1:
            hosts, ports, rooms = [hosts], [ports], [rooms]
        need(hosts == ["10.0.0.1"] * self.sequences, "not the prefiller's host, for each sequence")
        need(ports == [8998] * self.sequences, "not its port")
        need(len(set(rooms)) == self.sequences and all(0 <= room < 2**63 for room in rooms), "no room of its own")
        assert isinstance(rooms, list)
        return rooms


def without_rooms(body: bytes | bytearray) -> bytes:
    """A body without the members that lead to the rooms."""
    return edit(body, dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room")))


@pytest.mark.parametrize("route", CLIENT)
def test_sglang(route: Route) -> None:
    peer = RoomPeer(CLIENT[route])
    plans = [
        run(connector_named("sglang"), peer, SplitRequest(route, CLIENT[route], "req-1", attempt)) for attempt in (1, 2)
    ]
    rooms = [json.loads(plan.decode.body)["bootstrap_room"] for plan in plans if isinstance(plan, Concurrent)]
    assert len(set(rooms)) == 2
    assert not peer.rooms


@pytest.mark.parametrize(("members", "sequences"), [
    (b'"n":3', 3), (b'"prompt":["a","b"]', 2), (b'"prompt":[[1],[2]],"n":2', 4), (b'"prompt":[1,2],"n":1', 1),
    (b'"prompt":["a"]', 1), (b'"n":0', 1), (b'"n":null', 1), (b'"n":4096', 4096),
])  # fmt: skip
def test_sglang_has_a_room_for_each_sequence(members: bytes, sequences: int) -> None:
    client = b'{"model":"m",%b}' % members
    run(connector_named("sglang"), RoomPeer(client, sequences), SplitRequest(Route.COMPLETIONS, client, "req-1"))


@pytest.mark.parametrize("members", [b'"n":4097', b'"n":10000000000', b'"n":100,"prompt":[%b"z"]' % (b'"z",' * 50)])
def test_sglang_makes_no_arrays_that_outgrow_the_request(members: bytes) -> None:
    client = b"{%b}" % members
    plan = connector_named("sglang").plan(SplitRequest(Route.COMPLETIONS, client, "r"), PREFILL, DECODE, Random(1))
    assert plan == DecodeOnly(LegRequest(client, "r"), "n")


# -- none


class WarmPeer:
    """Two engines that share a cache of prefixes."""

    def __init__(self, route: Route, client: bytes) -> None:
        self.route, self.client = route, client
        self.warmed = 0

    def query(self, url: str) -> bytes:
        """Nothing is asked."""
        raise Refused(url)

    def prefill(self, leg: LegRequest) -> bytes:
        """Computes the prompt once."""
        body = one_token(self.route, leg)
        need(not {"n", "best_of"} & body.keys() and "kv_transfer_params" not in body, "more than a warmer")
        self.warmed += 1
        return b""

    def decode(self, leg: LegRequest) -> bytes:
        """The client's request."""
        need(leg.body == self.client and self.warmed, "not the client's body")
        return b""


@pytest.mark.parametrize("route", CLIENT)
@pytest.mark.parametrize("extra", [b"", b'"n":3,', b'"best_of":3,'])
def test_none(route: Route, extra: bytes) -> None:
    client = b"{" + extra + edit(CLIENT[route], {"n": None}).lstrip(b"{")
    peer = WarmPeer(route, client)
    run(connector_named("none"), peer, SplitRequest(route, client, "req-1"))
    assert peer.warmed == 1
    handed = handed_over("none", route, client, b"")
    assert not handed.is_missing
    assert not handed.holds_kv


# -- draining


@pytest.mark.parametrize("route", CLIENT)
def test_a_drain_takes_the_handle_and_ends_at_once(route: Route) -> None:
    peer = PullPeer(route, CLIENT[route])
    plan = connector_named("nixl").plan(SplitRequest(route, CLIENT[route], "req-1"), PREFILL, DECODE, Random(1))
    assert isinstance(plan, Sequential)
    handed = plan.hand_over(peer.prefill(plan.prefill))
    assert handed.holds_kv
    short = drain(handed.decode, route)
    one_token(route, short)
    assert raw_params(short) in peer.held
    assert short.request_id == handed.decode.request_id


@pytest.mark.parametrize("route", CLIENT)
def test_a_drain_of_pushed_tensors_goes_by_the_same_id(route: Route) -> None:
    handed = handed_over_by_push(route)
    short = drain(handed.decode, route)
    body = one_token(route, short)
    assert ids_of(route, short, body) == ids_of(route, handed.decode, json.loads(bytes(handed.decode.body)))


def handed_over_by_push(route: Route) -> HandOver:
    """What p2p_nccl makes of any answer."""
    connector = connector_named("p2p_nccl")
    ends = connector.complete(PREFILL, "prefill"), connector.complete(DECODE, "decode")
    plan = connector.plan(SplitRequest(route, CLIENT[route], "req-1"), *ends, Random(1))
    assert isinstance(plan, Sequential)
    handed = plan.hand_over(b"")
    assert handed.holds_kv
    assert not handed.is_missing
    return handed


# -- the stand-ins are strict

CHAT = CLIENT[Route.CHAT]


def respelled(leg: LegRequest) -> bytes:
    """The same JSON in other bytes."""
    return json.dumps(json.loads(bytes(leg.body))).encode()


def named(value: object) -> str:
    """An id that is the same in each run: no address of an object in it."""
    if hasattr(value, "prefill"):
        return type(value).__name__
    return value.__qualname__ if isinstance(value, FunctionType) else str(value)


@pytest.mark.parametrize(
    ("name", "peer", "where", "falsify"),
    [
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"stream": b"true"}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"stream_options": b"{}"}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"max_completion_tokens": b"64"}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"min_tokens": b"3"}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"min_tokens": None}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"n": b"2"}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "prefill", {"kv_transfer_params": b'{"do_remote_decode":true}'}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "decode", {"kv_transfer_params": None}),
        ("nixl", PullPeer(Route.CHAT, CHAT), "decode", {"temperature": b"0.00001"}),
        ("nixl", PullPeer(Route.CHAT, CHAT, ODD_HANDLE), "decode", respelled),
        ("nixl", PullPeer(Route.CHAT, CHAT), "decode", "other-id"),
        ("mooncake", MooncakePeer(Route.CHAT, CHAT), "prefill", {"kv_transfer_params": {"transfer_id": b'"xfer-1"'}}),
        ("mooncake", MooncakePeer(Route.CHAT, CHAT), "prefill", {"max_tokens": b"2"}),
        (
            "mooncake",
            MooncakePeer(Route.CHAT, CHAT),
            "decode",
            {"kv_transfer_params": {"transfer_id": b'"xfer-req-1"'}},
        ),
        ("mooncake", MooncakePeer(Route.CHAT, CHAT), "decode", {"kv_transfer_params": {"remote_engine_id": b'"x"'}}),
        ("mooncake", MooncakePeer(Route.CHAT, CHAT), "decode", {"kv_transfer_params": {"remote_bootstrap_addr": None}}),
        ("p2p_nccl", PushPeer(Route.CHAT, CHAT), "prefill", "other-id"),
        ("p2p_nccl", PushPeer(Route.CHAT, CHAT), "decode", "___prefill_addr_a:1___decode_addr_b:2_c"),
        ("p2p_nccl", PushPeer(Route.CHAT, CHAT), "decode", {"n": b"2"}),
        ("ascend_layerwise", LayerwisePeer(Route.CHAT, CHAT), "prefill", "other-id"),
        ("ascend_layerwise", LayerwisePeer(Route.CHAT, CHAT), "prefill", respelled),
        ("ascend_layerwise", LayerwisePeer(Route.CHAT, CHAT), "decode", "other-id"),
        ("ascend_layerwise", LayerwisePeer(Route.CHAT, CHAT), "decode", {"kv_transfer_params": {"metaserver": b'""'}}),
        ("sglang", RoomPeer(CHAT), "prefill", {"bootstrap_room": b"1"}),
        ("sglang", RoomPeer(CHAT), "prefill", {"min_tokens": b"1"}),
        ("sglang", RoomPeer(CHAT), "prefill", {"stream": b"true"}),
        ("sglang", RoomPeer(CHAT), "decode", {"bootstrap_host": b'"10.0.0.2"'}),
        ("sglang", RoomPeer(CHAT), "decode", {"stream": b"false"}),
        ("none", WarmPeer(Route.CHAT, CHAT), "prefill", {"max_tokens": b"2"}),
        ("none", WarmPeer(Route.CHAT, CHAT), "decode", respelled),
    ],
    ids=named,
)
def test_a_falsified_leg_is_refused(name: str, peer: Peer, where: str, falsify: Any) -> None:
    def tamper(side: str, leg: LegRequest) -> LegRequest:
        if side != where:
            return leg
        if isinstance(falsify, str):
            return msgspec.structs.replace(leg, request_id=falsify)
        return msgspec.structs.replace(leg, body=falsify(leg) if callable(falsify) else edit(leg.body, falsify))

    with pytest.raises(Refused):
        run(connector_named(name), peer, SplitRequest(Route.CHAT, CHAT, "req-1", 1, CALLBACK), tamper)
