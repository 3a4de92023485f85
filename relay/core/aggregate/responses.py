"""Responses: the last event brings the whole object."""

from __future__ import annotations

from typing import Final

from relay.core.aggregate.base import Aggregator
from relay.core.aggregate.parts import NULL, Members, decode_members
from relay.core.request import Route

_LAST_EVENTS: Final = (b'"response.completed"', b'"response.incomplete"', b'"response.failed"')


class ResponsesAggregator(Aggregator):
    """The answer of `/v1/responses`; one that failed too, since OpenAI's API tells that by the object's ``status``."""

    __slots__ = ("_response",)

    route = Route.RESPONSES
    end_mark = "response.completed, response.incomplete or response.failed"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._response = NULL

    def _take(self, members: Members) -> int:
        if "response" not in members or bytes(members.get("type", NULL)) not in _LAST_EVENTS:
            return 0
        decode_members(members["response"])  # an object, and nothing else, is an answer
        self._response = bytes(members["response"])
        self.is_complete = True
        return len(self._response)

    def _result(self) -> bytes:
        return self._response
