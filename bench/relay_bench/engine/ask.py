"""What a generating request asks for, read from its body and headers; or the refusal vLLM answers it with."""

from __future__ import annotations

import re
import secrets
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from relay_bench.engine.plain import Refusal
from relay_bench.engine.text import TOOL_ARGUMENTS, count_words
from relay_bench.engine.usage import UsagePlacement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay_bench.engine.config import EngineConfig


class Route(Enum):
    """A path that generates; the value is the field that holds the prompt."""

    CHAT = "messages"
    COMPLETIONS = "prompt"
    RESPONSES = "input"
    MESSAGES = "anthropic messages"

    @property
    def prompt_field(self) -> str:
        return self.value.rpartition(" ")[2]


ID_PREFIXES = {
    Route.CHAT: "chatcmpl-",
    Route.COMPLETIONS: "cmpl-",
    Route.RESPONSES: "resp_",
    Route.MESSAGES: "chatcmpl-",
}


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as far as it shapes the answer."""

    route: Route
    id: str  #: the body's id, the client's X-Request-Id behind the route's prefix
    created: int  #: UNIX seconds
    model: str
    stream: bool
    tokens: int  #: content tokens of each choice
    choices: int
    prompt_tokens: int
    finish_reason: str  #: ``length``, ``stop`` or ``tool_calls``, as chat has it
    usage: UsagePlacement
    max_tokens: int | None = None  #: the request's own limit
    reasoning: int = 0  #: how many of `tokens` are reasoning, at the start
    tool: str = ""  #: the function to call instead of talking
    request: dict[str, Any] = {}
    clock_us: Callable[[], int] | None = None  #: set: tokens are stamps of this clock

    @property
    def completion_tokens(self) -> int:
        """All tokens that usage reports; an answer without content still made its end-of-sequence token."""
        return max(self.tokens, 1) * self.choices

    @property
    def wants_kv_handle(self) -> bool:
        """Whether this is the prefill half of a split request (vLLM's NixlConnector)."""
        params = self.request.get("kv_transfer_params")
        return isinstance(params, dict) and bool(params.get("do_remote_decode"))


def read_ask(
    route: Route,
    body: bytes,
    headers: Mapping[str, str],
    config: EngineConfig,
    *,
    now_s: int,
    clock_us: Callable[[], int],
) -> Ask:
    """Read a request; raises `Refusal` with what vLLM would answer."""
    request = _decode(body)
    _validate(route, request, config)
    limit = _limit(request)
    asked = _int_header(headers, "x-sim-tokens")
    tokens = asked if asked is not None else limit if limit is not None else config.max_tokens_default
    options = request.get("stream_options") or {}
    words = re.split(r"[,\s]+", headers.get("x-sim-usage", config.usage).strip())
    finish_reason = "length" if limit is not None and tokens >= limit else "stop"
    tool, is_named = _tool(request)
    if tool:
        tokens, finish_reason = len(TOOL_ARGUMENTS), "stop" if is_named else "tool_calls"
    n = request.get("n")
    return Ask(
        route=route,
        id=ID_PREFIXES[route] + (headers.get("x-request-id") or secrets.token_hex(8)),
        created=now_s,
        model=config.model,
        stream=bool(request.get("stream")),
        tokens=tokens,
        choices=1 if n is None else n,
        prompt_tokens=count_words(request.get(route.prompt_field)) + count_words(request.get("tools")),
        finish_reason=finish_reason,
        usage=UsagePlacement.of(
            words,
            include=bool(options.get("include_usage")),
            continuous=bool(options.get("continuous_usage_stats")),
        ),
        max_tokens=limit,
        reasoning=min(_int_header(headers, "x-sim-reasoning") or 0, tokens),
        tool=tool,
        request=request,
        clock_us=clock_us if config.stamp else None,
    )


def _decode(body: bytes) -> dict[str, Any]:
    if not body:
        raise Refusal.invalid("{'type': 'missing', 'loc': 'body', 'msg': 'Field required', 'input': 'None'}", "body")
    try:
        request = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        # msgspec and Python's json disagree on positions; vLLM tells the length of a body cut short
        found = re.search(r"byte (\d+)", str(error))
        where = f"body.{found[1] if found else len(body)}"
        raise Refusal.invalid(
            f"{{'type': 'json_invalid', 'loc': '{where}', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', "
            "'ctx': {'error': 'Expecting value'}}",
            where,
        ) from None
    if not isinstance(request, dict):
        size = f"<{type(request).__name__} of {len(request) if isinstance(request, list) else 1} items>"
        raise Refusal.invalid(
            "{'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary or object to "
            f"extract fields from', 'input': '{size}'}}",
            "body",
        )
    return request


def _validate(route: Route, request: dict[str, Any], config: EngineConfig) -> None:
    field = route.prompt_field
    if field not in request:
        raise Refusal.invalid(
            f"{{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required', "
            f"'input': '<dict of {len(request)} items>'}}",
            f"body.{field}",
        )
    model = request.get("model")
    if model is not None and model != config.model:
        message = f"The model `{model}` does not exist. Valid aliases: {config.model}."
        raise Refusal(404, message, "NotFoundError", "model")
    n = request.get("n")
    if n is not None and (not isinstance(n, int) or n < 1):
        raise Refusal(400, f"n must be at least 1, got {n}.", "BadRequestError")
    if request.get("stream_options") and not request.get("stream") and route in {Route.CHAT, Route.COMPLETIONS}:
        # the part of vLLM's checks that a relay which turns streaming on or off trips over
        message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refusal(400, message, "BadRequestError", "stream_options")


def _limit(request: dict[str, Any]) -> int | None:
    """The request's own limit of tokens; chat prefers the newer name, as vLLM does."""
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        value = request.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise Refusal(400, f"{name} must be at least 1, got {value}.", "BadRequestError", name)
        return value
    return None


def _tool(request: dict[str, Any]) -> tuple[str, bool]:
    """The function a forced call goes to, and whether the request named it; ``auto`` leaves the engine talking.

    vLLM ends a named call with ``stop`` and a required one with ``tool_calls``.
    """
    choice, tools = request.get("tool_choice"), request.get("tools") or []
    names = [str((tool.get("function") or tool).get("name")) for tool in tools if isinstance(tool, dict)]
    if not names:
        return "", False
    if isinstance(choice, dict):
        name = (choice.get("function") or choice).get("name")
        if name is not None:
            return str(name), True
        return (names[0], False) if choice.get("type") == "any" else ("", False)
    return (names[0], False) if choice == "required" else ("", False)


def _int_header(headers: Mapping[str, str], name: str) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise Refusal(400, f"{name}: a whole number is wanted, got {value!r}", "BadRequestError", name)
    return int(value)
