"""Which path does what: reports are answered at once, generating requests become the steps of a sequence."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

import msgspec

from relay_bench.engine.ask import Ask, Route, read_ask
from relay_bench.engine.chat import ChatScript
from relay_bench.engine.completions import CompletionsScript
from relay_bench.engine.faults import Controls, Shape, read_controls
from relay_bench.engine.handover import CONNECTORS, Here, Part
from relay_bench.engine.messages import MessagesScript
from relay_bench.engine.metrics import CONTENT_TYPE, metrics_text
from relay_bench.engine.plain import Refusal, body_answer, empty_answer, json_answer, models_body, response_head
from relay_bench.engine.prefix_cache import BLOCK_TOKENS
from relay_bench.engine.recording import Recording, load_recording
from relay_bench.engine.responses import ResponsesScript
from relay_bench.engine.text import words_of
from relay_bench.engine.wire import (
    Cut,
    Op,
    framed_stream,
    json_answer_steps,
    ready_stream,
    stream_answer,
    uvicorn_steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h11

    from relay_bench.engine.config import EngineConfig
    from relay_bench.engine.ledger import Ledger
    from relay_bench.engine.script import Script

GENERATING: Final = {
    "/v1/chat/completions": Route.CHAT,
    "/v1/completions": Route.COMPLETIONS,
    "/v1/responses": Route.RESPONSES,
    "/v1/messages": Route.MESSAGES,
}
REPORTING: Final = frozenset(
    {"/health", "/ping", "/version", "/v1/models", "/metrics", "/query"}
    | {"/sim/requests", "/sim/last", "/sim/take", "/sim/give", "/sim/defaults"}
)

_SCRIPTS: Final[dict[Route, type[Script]]] = {
    Route.CHAT: ChatScript,
    Route.COMPLETIONS: CompletionsScript,
    Route.RESPONSES: ResponsesScript,
    Route.MESSAGES: MessagesScript,
}

#: How a request ends that gets no answer at all.
_SILENT_ENDS: Final = {"die-before-head": Cut.FIN, "rst-before-head": Cut.RST, "stall-before-head": Cut.STALL}


class Request:
    """What the engine reads of a request's head; names in lower case, of repeated fields the last."""

    def __init__(self, method: str, path: str, query: str, headers: dict[str, str], *, keep_alive: bool) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.keep_alive = keep_alive
        self.body = b""
        self.address = ("127.0.0.1", 0)  #: at which it came in

    @classmethod
    def of(cls, event: h11.Request) -> Request:
        """That of a head; as uvicorn, it keeps no connection of HTTP/1.0."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        path, _, query = event.target.decode("latin-1").partition("?")
        # uvicorn keeps no HTTP/1.0 connection, whatever it asks for
        keep_alive = event.http_version != b"1.0" and headers.get("connection", "").lower() != "close"
        return cls(event.method.decode("latin-1"), path, query, headers, keep_alive=keep_alive)

    def argument(self, name: str) -> str:
        """The first of that name in the query; empty: there is none."""
        return parse_qs(self.query).get(name, [""])[0]

    @property
    def is_report(self) -> bool:
        """Whether the answer needs no sequence."""
        return self.method != "POST" or self.path not in GENERATING

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {len(self.body)} bytes>"


class Work(msgspec.Struct, frozen=True):
    """A generating request made ready for the decode loop."""

    steps: Iterator[list[Op]]
    width: int  #: tokens per step
    ttft_ms: float
    step_ms: float
    own_clock: bool
    keep_alive: bool
    blocks: int  #: of the KV cache, for its prompt
    words: list[str]  #: of prompt and answer, for the prefix cache


def report(request: Request, config: EngineConfig, ledger: Ledger) -> bytes:
    """The answer to anything that does not generate."""
    now_s, close = int(time.time()), not request.keep_alive
    allowed = b"POST" if request.path in GENERATING or request.path == "/sim/defaults" else b"GET"
    is_there = request.path != "/query" or config.connector == "mooncake"
    if not is_there or (request.path not in GENERATING and request.path not in REPORTING):
        return json_answer(404, b'{"detail":"Not Found"}', now_s, is_head=request.method == "HEAD", close=close)
    if request.method.encode() != allowed:
        body, is_head = b'{"detail":"Method Not Allowed"}', request.method == "HEAD"
        return json_answer(405, body, now_s, b"allow: " + allowed, is_head=is_head, close=close)
    if request.path == "/sim/give":
        ledger.handles.give(request.argument("handle"))
        return json_answer(200, b"{}", now_s, close=close)
    if request.path == "/metrics":
        return body_answer(metrics_text(config, ledger), CONTENT_TYPE, now_s, close=close)
    if request.path == "/sim/defaults":
        return _take_defaults(request, ledger, now_s, close=close)
    if request.path in {"/health", "/ping"}:
        return empty_answer(now_s, close=close)
    return json_answer(200, _report_body(request, config, ledger, now_s), now_s, close=close)


def _take_defaults(request: Request, ledger: Ledger, now_s: int, *, close: bool) -> bytes:
    """Headers for all requests from now on that do not bring their own, in place of those told before."""
    try:
        defaults = msgspec.json.decode(request.body, type=dict[str, str])
        read_controls(defaults)
    except msgspec.DecodeError as error:
        refusal = Refusal(400, f"wanted an object of headers: {error}", "BadRequestError")
        return json_answer(400, refusal.body(is_anthropic=False), now_s, close=close)
    except Refusal as refusal:
        return json_answer(400, refusal.body(is_anthropic=False), now_s, close=close)
    ledger.defaults = defaults
    return json_answer(200, b"{}", now_s, close=close)


def _report_body(request: Request, config: EngineConfig, ledger: Ledger, now_s: int) -> bytes:
    if request.path == "/version":
        return b'{"version":"0.32.0"}'
    if request.path == "/v1/models":
        return models_body(config.model, now_s)
    if request.path == "/sim/last":
        return msgspec.json.encode(ledger.last(request.argument("path")))
    if request.path == "/query":  # the list of mooncake's bootstrap server: one rank
        worker = {"0": {"0": f"tcp://{request.address[0]}:{request.address[1]}"}}
        return msgspec.json.encode({"0": {"engine_id": ledger.engine_id, "worker_addr": worker}})
    return msgspec.json.encode(ledger.as_dict())


def refusal_answer(request: Request, refusal: Refusal, now_s: int) -> bytes:
    """An error in the form of the request's route."""
    body = refusal.body(is_anthropic=GENERATING.get(request.path) is Route.MESSAGES)
    # what engines and gateways send with these, and what clients obey
    extra = (b"retry-after: 7",) if refusal.status in {429, 503} else ()
    return json_answer(refusal.status, body, now_s, *extra, close=not request.keep_alive)


class Reading(msgspec.Struct, frozen=True):
    """A generating request, understood."""

    request: Request
    ask: Ask
    controls: Controls
    part: Part  #: what it has to do with another engine


def read(request: Request, config: EngineConfig, ledger: Ledger, now_s: int) -> Reading:
    """Understands a generating request. Raises `Refusal`."""
    controls = read_controls(request.headers)
    ask = read_ask(GENERATING[request.path], request.body, request.headers, config, now_s=now_s, clock_us=_clock_us)
    _refuse_if_told(controls)
    part = CONNECTORS[config.connector](ask, Here(ledger.engine_id, config.role, request.address))
    return Reading(request, ask, controls, part)


def plan(reading: Reading, config: EngineConfig, ledger: Ledger, now_s: int, *, is_lost: bool = False) -> Work:
    """Turn a generating request into work; `is_lost` says that its KV cache is. Raises `Refusal`."""
    request, controls, part = reading.request, reading.controls, reading.part
    ask = msgspec.structs.replace(reading.ask, kv_params=part.params, error=part.error if is_lost else "")
    if is_lost:
        controls = _without_cache(ask, controls)
    ask, words = _looked_up(ask, ledger, is_fetched=part.takes is not None)
    ledger.prompt_tokens += ask.prompt_tokens
    return Work(
        steps=_steps(request, ask, controls, config, now_s),
        width=ask.choices if ask.tokens else 0,
        ttft_ms=(config.ttft_ms if controls.ttft_ms is None else controls.ttft_ms) + _prefill_ms(ask, part, config),
        step_ms=config.step_ms if controls.step_ms is None else controls.step_ms,
        own_clock=controls.own_clock,
        keep_alive=request.keep_alive and "close-idle" not in controls.faults and controls.shape.framing != "close",
        blocks=-(-ask.prompt_tokens // BLOCK_TOKENS),
        words=words,
    )


def _looked_up(ask: Ask, ledger: Ledger, *, is_fetched: bool) -> tuple[Ask, list[str]]:
    """The request with what the prefix cache has of its prompt; and all its words, to be kept once it is answered."""
    if ledger.cache is None:
        return ask, []
    prompt = words_of(ask.request.get(ask.route.prompt_field), ask.request.get("tools"))
    found = ledger.cache.serve(prompt)
    ledger.cache_queries += len(prompt)
    ledger.cache_hits += found
    answer = " ".join(_SCRIPTS[ask.route](ask).text(choice) for choice in range(ask.choices)).split()
    return msgspec.structs.replace(ask, cached_tokens=len(prompt) if is_fetched else found), [*prompt, *answer]


def _prefill_ms(ask: Ask, part: Part, config: EngineConfig) -> float:
    """The time that the prompt's own computing takes."""
    if not config.prefill_tokens_per_s or part.takes is not None:
        return 0.0
    known = ask.cached_tokens if config.prefix_cache_blocks else 0
    return (ask.prompt_tokens - known) / config.prefill_tokens_per_s * 1000


def _clock_us() -> int:
    return time.monotonic_ns() // 1000


def _without_cache(ask: Ask, controls: Controls) -> Controls:
    """As recorded (``fail/pd_prefill_then_killed``): a stream tells of it behind the role, with status 200."""
    if not ask.stream:
        raise Refusal(500, ask.error, "InternalServerError")
    frames = "1" if ask.route is Route.CHAT else "0"
    return msgspec.structs.replace(controls, faults={**controls.faults, "error-frame": frames})


def _refuse_if_told(controls: Controls) -> None:
    """Faults ``status`` and ``json-error``."""
    fault = controls.first(frozenset({"status", "json-error"}))
    if fault:
        status = controls.number(fault, 500)
        raise Refusal(status, f"The request asked for a {status}.", "InternalServerError")


def _steps(request: Request, ask: Ask, controls: Controls, config: EngineConfig, now_s: int) -> Iterator[list[Op]]:
    silent = controls.first(frozenset(_SILENT_ENDS))
    if silent:
        return iter([[_SILENT_ENDS[silent]]])
    close = not request.keep_alive
    if controls.play and (ask.stream or not load_recording(config.captures, controls.play).is_stream):
        return _played(controls, config, now_s, close=close)
    script = _SCRIPTS[ask.route](ask)
    if ask.stream and "json-on-stream" not in controls.faults:
        return stream_answer(script, controls, now_s, close=close)
    body = script.body()
    return json_answer_steps(ask.tokens, _json_head(200, len(body), now_s, close=close), body, controls)


def _played(controls: Controls, config: EngineConfig, now_s: int, *, close: bool) -> Iterator[list[Op]]:
    """The steps of a recording: its status, type and payload; framed as the request says."""
    recording = load_recording(config.captures, controls.play)
    if recording.is_stream:
        kind = b"content-type: " + recording.content_type
        if controls.shape == Shape() and not controls.faults:
            return ready_stream(_ordinary_body(recording), now_s, kind, close=close)
        frames = list(recording.steps())
        return framed_stream(iter(frames), len(frames), controls, now_s, kind, close=close)
    head = _json_head(recording.status, len(recording.body), now_s, close=close)
    return json_answer_steps(1, head, recording.body, controls)


@lru_cache(maxsize=8)
def _ordinary_body(recording: Recording) -> tuple[list[Op], ...]:
    """Made once: where nothing but the connections holds it up, an engine is to send as fast as it can."""
    frames = list(recording.steps())
    return tuple(uvicorn_steps(iter(frames), len(frames)))


def _json_head(status: int, length: int, now_s: int, *, close: bool) -> bytes:
    fields = [b"content-length: %d" % length, b"content-type: application/json", b"vary: Origin"]
    if close:
        fields.append(b"connection: close")
    return response_head(status, now_s, *fields)
