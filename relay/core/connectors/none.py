"""No hand-over: the prefiller only warms a cache that the decoder shares, as in vLLM's oldest example of a split.

Whatever the engines share (LMCache, a store below both, or one engine in both roles), the relay has no part in it. So
nothing is held and nothing can be missing.
"""

from __future__ import annotations

from random import Random

from relay.core.connectors.base import Connector, Endpoint, HandOver, LegRequest, Plan, Sequential, SplitRequest
from relay.core.document import Document
from relay.core.prefill import one_token


class NoConnector(Connector):
    """Prefill for its side effect, then decode."""

    name = "none"

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        as_it_is = LegRequest(request.body, request.attempt_id)
        # One sequence warms as much as several.
        body = one_token(Document(request.body), request.route, {"n": None, "best_of": None})
        return Sequential(LegRequest(body, request.attempt_id), lambda _: HandOver(as_it_is))
