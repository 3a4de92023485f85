"""Mooncake, in the two forms that go by this name.

**vLLM's own** (`mooncake/mooncake_connector.py`): the two engines meet by a ``transfer_id`` that the relay makes up, so
both legs are sent at once. The decoder must be told which engine to pull from: its id, one for each data-parallel rank,
is asked of the prefiller's bootstrap server (``GET /query``). Which of several ranks computes is then the relay's
choice, said in a header. The id of a transfer is random, not the client's: two requests under one id would read each
other's keys and values.

**vllm-ascend's** (`kv_p2p/mooncake_connector.py`) is NIXL's hand-over word for word, though it gives a handle only to
what ended by length.
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from relay.core.connectors.base import (
    KV_PARAMS,
    Concurrent,
    Connector,
    Endpoint,
    LegRequest,
    Plan,
    Preflight,
    Role,
    SplitRequest,
    alone,
    host_and_port,
    unique,
)
from relay.core.connectors.nixl import Nixl
from relay.core.document import Document
from relay.core.loose import UNDECODABLE
from relay.core.prefill import obstacle, one_token

#: vLLM's VLLM_MOONCAKE_BOOTSTRAP_PORT.
DEFAULT_BOOTSTRAP_PORT: Final = 8998

_encode = msgspec.json.Encoder().encode


class _Rank(msgspec.Struct, gc=False):
    engine_id: str


_decode_ranks = msgspec.json.Decoder(dict[int, _Rank]).decode


class Mooncake(Connector):
    """vLLM's MooncakeConnector."""

    name = "mooncake"

    def complete(self, endpoint: Endpoint, role: Role) -> Endpoint:
        """Fills in the prefiller's bootstrap server, at its default port; it must be reachable for decoders too."""
        if role == "decode":
            return endpoint
        bootstrap = endpoint.bootstrap.rstrip("/")
        if not bootstrap:
            if not endpoint.host:
                raise ValueError('has no host to find a bootstrap server on; give bootstrap = "http://HOST:PORT"')
            bootstrap = f"http://{host_and_port(endpoint.host, DEFAULT_BOOTSTRAP_PORT)}"
        if not bootstrap.startswith("http://"):
            raise ValueError("has a bootstrap that is no URL; allowed: http://HOST:PORT")
        return msgspec.structs.replace(endpoint, bootstrap=bootstrap)

    def preflight(self, prefill: Endpoint) -> Preflight | None:
        """The bootstrap server's list of ranks."""
        if prefill.ranks:
            return None

        def parse(answer: bytes) -> Endpoint:
            try:
                ranks = tuple((rank, entry.engine_id) for rank, entry in _decode_ranks(answer).items())
            except UNDECODABLE as error:
                raise ValueError(f"it gave no list of engines: {error}") from None
            if not ranks:
                raise ValueError("it knows no engine yet")
            return msgspec.structs.replace(prefill, ranks=ranks)

        return Preflight(f"{prefill.bootstrap}/query", parse)

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        document = Document(request.body)
        in_the_way = obstacle(document)
        if in_the_way is not None:
            return alone(request, in_the_way)
        rank, engine_id = rng.choice(prefill.ranks)
        transfer = {"transfer_id": f"xfer-{unique(rng)}"}
        send = _encode({"do_remote_decode": True, "do_remote_prefill": False, **transfer})
        receive = _encode({
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": prefill.bootstrap,
            "remote_engine_id": engine_id,
            **transfer,
        })  # fmt: skip
        which = ((b"x-data-parallel-rank", b"%d" % rank),) if len(prefill.ranks) > 1 else ()
        return Concurrent(
            prefill=LegRequest(one_token(document, request.route, {KV_PARAMS: send}), request.attempt_id, which),
            decode=LegRequest(document.edit({KV_PARAMS: receive}), request.attempt_id),
        )


class AscendMooncake(Nixl):
    """vllm-ascend's MooncakeConnector, in which the decoder pulls."""

    name = "ascend_mooncake"
    may_recompute = True
