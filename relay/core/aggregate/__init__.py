"""From a stream to the one JSON body the engine would have sent without ``stream``.

Clients that cannot stream still gain when the engine does: its streaming parsers for tool calls and reasoning are the
ones that get the work, and an engine that is asked for a stream says at once when something is wrong.

Frames are merged as they come, by dialect: `chat` and `completions` put choices together out of deltas, `messages`
builds blocks out of events, and of `responses` only the last event counts, since it brings the whole object. What a
piece adds to is declared in schemas of the `parts`: text to be joined, lists to be extended, objects by their index,
and whatever nobody knows yet keeps its last value.

The parts hold JSON as the engine wrote it. Cost and memory are linear in the answer, and bounded.
"""

from __future__ import annotations

from relay.core.aggregate.base import Aggregator
from relay.core.aggregate.chat import ChatAggregator, forces_tool
from relay.core.aggregate.collector import Collector
from relay.core.aggregate.completions import CompletionsAggregator, wants_token_ids
from relay.core.aggregate.failure import AggregateError, EngineError, TooLarge, Truncated
from relay.core.aggregate.messages import MessagesAggregator
from relay.core.aggregate.responses import ResponsesAggregator
from relay.core.framing import Buffer
from relay.core.request import Route

__all__ = ["AggregateError", "Aggregator", "Collector", "EngineError", "TooLarge", "Truncated", "aggregator_for"]


def aggregator_for(route: Route, *, max_bytes: int, request: Buffer = b"{}") -> Aggregator:
    """What makes one body of a stream on `route`, of at most `max_bytes`.

    `request` is the body that was sent: vLLM answers a forced tool call a little differently, which its stream does
    not show. Raises ValueError for a route whose streams the relay does not know.
    """
    match route:
        case Route.CHAT:
            return ChatAggregator(max_bytes, is_tool_forced=forces_tool(request))
        case Route.COMPLETIONS:
            return CompletionsAggregator(max_bytes, wants_token_ids=wants_token_ids(request))
        case Route.RESPONSES:
            return ResponsesAggregator(max_bytes)
        case Route.MESSAGES:
            return MessagesAggregator(max_bytes)
        case _:
            raise ValueError(f"streams of route {route.value!r} cannot be aggregated")
