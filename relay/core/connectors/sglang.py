"""SGLang: the engines meet in a bootstrap room (`disaggregation/`; the form of its own mini_lb and of smg).

Both legs carry the prefiller's bootstrap server and a random room, and are sent at once. The prefiller computes one
token whatever is asked, and *the decoder goes on from that token*, so nothing may change that has a say in it: not
``min_tokens``, not ``logprobs``, not the response format. Only the stream is turned off on the prefiller, so that its
answer has a true status, not a 200 with an error inside.

Each sequence has a room of its own, so n > 1 and lists of prompts get arrays. A decoder cannot decode alone.
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from relay.core.connectors.base import Concurrent, Connector, DecodeOnly, Endpoint, LegRequest, Plan, Role, SplitRequest
from relay.core.document import Document
from relay.core.prefill import WHOLE, prompts
from relay.core.request import peek

#: SGLang's ``--disaggregation-bootstrap-port``.
DEFAULT_BOOTSTRAP_PORT: Final = 8998

#: Most sequences of one request. Beyond, the arrays would outgrow what clients may send; no engine takes as many.
MAX_SEQUENCES: Final = 4096

_encode = msgspec.json.Encoder().encode


class Sglang(Connector):
    """SGLang's disaggregation mode."""

    name = "sglang"

    def complete(self, endpoint: Endpoint, role: Role) -> Endpoint:
        """Fills in the port of the prefiller's bootstrap server."""
        if role == "decode":
            return endpoint
        if not endpoint.host:
            raise ValueError("has no host for decoders to find its bootstrap server on; allowed: http://HOST:PORT")
        return msgspec.structs.replace(endpoint, bootstrap_port=endpoint.bootstrap_port or DEFAULT_BOOTSTRAP_PORT)

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        sequences = prompts(request.body) * max(1, peek(request.body).n or 1)
        if sequences > MAX_SEQUENCES:
            return DecodeOnly(LegRequest(request.body, request.attempt_id), "n")
        host = f"[{prefill.host}]" if ":" in prefill.host else prefill.host
        rooms = [rng.getrandbits(63) for _ in range(sequences)]
        if sequences == 1:
            members = {
                "bootstrap_host": _encode(host),
                "bootstrap_port": _encode(prefill.bootstrap_port),
                "bootstrap_room": _encode(rooms[0]),
            }
        else:
            members = {
                "bootstrap_host": _encode([host] * sequences),
                "bootstrap_port": _encode([prefill.bootstrap_port] * sequences),
                "bootstrap_room": _encode(rooms),
            }
        document = Document(request.body)
        return Concurrent(
            prefill=LegRequest(document.edit({**members, **WHOLE}), request.attempt_id),
            decode=LegRequest(document.edit(members), request.attempt_id),
        )
