"""What a generating request asks for, read from its body and headers; or the refusal vLLM answers it with."""

from __future__ import annotations

import re
import secrets
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from relay_bench.engine.plain import Refusal
from relay_bench.engine.text import TOOL_ARGUMENTS, count_words
from relay_bench.engine.usage import USAGE_WORDS, UsagePlacement, made_up_cached_tokens

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
        """The field of the body that holds it."""
        return self.value.rpartition(" ")[2]


ID_PREFIXES = {
    Route.CHAT: "chatcmpl-",
    Route.COMPLETIONS: "cmpl-",
    Route.RESPONSES: "resp_",
    Route.MESSAGES: "chatcmpl-",
}


class _Fields(msgspec.Struct):
    """The fields the engine acts on, and their types; a request with others is refused before anything starts."""

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def limit(self) -> int | None:
        """The request's own limit of tokens; chat prefers the newer name, as vLLM does."""
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(400, f"{name} must be at least 1, got {value}.", "BadRequestError", name)
            if value is not None:
                return value
        return None

    def tool(self) -> tuple[str, bool]:
        """The function a forced call goes to, and whether the request named it; ``auto`` leaves the engine talking.

        vLLM ends a named call with ``stop`` and a required one with ``tool_calls``.
        """
        names = [_function_name(tool) for tool in self.tools or []]
        if not names:
            return "", False
        if isinstance(self.tool_choice, dict):
            name = _function_name(self.tool_choice)
            if name:
                return name, True
            return (names[0], False) if self.tool_choice.get("type") == "any" else ("", False)
        return (names[0], False) if self.tool_choice == "required" else ("", False)


def _function_name(tool: dict[str, Any]) -> str:
    """The function's name: chat has it one level down, the other dialects at the top."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return str(name) if name is not None else ""


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
    cached_tokens: int = 0  #: of the prompt's, found in the prefix cache
    kv_params: dict[str, Any] | None = None  #: ``kv_transfer_params`` of a whole answer
    error: str = ""  #: what a stream says whose engine failed; empty: that it died
    clock_us: Callable[[], int] | None = None  #: set: tokens are stamps of this clock

    @property
    def completion_tokens(self) -> int:
        """All tokens that usage reports; an answer without content still made its end-of-sequence token."""
        return max(self.tokens, 1) * self.choices

    @property
    def is_capped(self) -> bool:
        """Whether the limit ends the answer (vLLM's FINISHED_LENGTH_CAPPED)."""
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    @property
    def inner_id(self) -> str:
        """As other engines know the request (vLLM's, without the random end): the Responses API goes by its body."""
        if self.route is Route.RESPONSES:
            return str(self.request.get("request_id") or self.id)
        return f"{self.id}-0" if self.route is Route.COMPLETIONS else self.id


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
    fields = _validate(route, request, config)
    limit = fields.limit()
    asked = _int_header(headers, "x-sim-tokens")
    tokens = asked if asked is not None else limit if limit is not None else config.max_tokens_default
    finish_reason = "length" if limit is not None and tokens >= limit else "stop"
    tool, is_named = fields.tool()
    if tool:
        tokens, finish_reason = len(TOOL_ARGUMENTS), "stop" if is_named else "tool_calls"
    options = fields.stream_options or {}
    words = re.split(r"[,\s]+", headers.get("x-sim-usage", config.usage).strip())
    if config.prompt_tokens_details:
        words.append("details")
    unknown = set(words) - USAGE_WORDS - {""}
    if unknown:
        message = f"x-sim-usage: {min(unknown)!r} is not understood; wanted: one of {', '.join(sorted(USAGE_WORDS))}"
        raise Refusal(400, message, "BadRequestError", "x-sim-usage")
    prompt_tokens = count_words(request.get(route.prompt_field)) + count_words(request.get("tools"))
    return Ask(
        route=route,
        id=ID_PREFIXES[route] + (headers.get("x-request-id") or secrets.token_hex(8)),
        created=now_s,
        model=config.model,
        stream=bool(fields.stream),
        tokens=tokens,
        choices=1 if fields.n is None else fields.n,
        prompt_tokens=prompt_tokens,
        cached_tokens=made_up_cached_tokens(prompt_tokens),
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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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


def _validate(route: Route, request: dict[str, Any], config: EngineConfig) -> _Fields:
    field = route.prompt_field
    if field not in request:
        raise Refusal.invalid(
            f"{{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required', "
            f"'input': '<dict of {len(request)} items>'}}",
            f"body.{field}",
        )
    try:
        fields = msgspec.convert(request, _Fields)
    except msgspec.ValidationError as error:
        raise Refusal.invalid(f"{{'type': 'wrong_type', 'loc': 'body', 'msg': {str(error)!r}}}", "body") from None
    if fields.model is not None and fields.model != config.model:
        message = f"The model `{fields.model}` does not exist. Valid aliases: {config.model}."
        raise Refusal(404, message, "NotFoundError", "model")
    if fields.n is not None and fields.n < 1:
        raise Refusal(400, f"n must be at least 1, got {fields.n}.", "BadRequestError")
    if fields.stream_options and not fields.stream and route in {Route.CHAT, Route.COMPLETIONS}:
        # the part of vLLM's checks that a relay which turns streaming on or off trips over
        message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refusal(400, message, "BadRequestError", "stream_options")
    return fields


def _int_header(headers: Mapping[str, str], name: str) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise Refusal(400, f"{name}: a whole number is wanted, got {value!r}", "BadRequestError", name)
    return int(value)
