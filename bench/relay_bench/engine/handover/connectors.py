"""What each connector's engines read in a request, and refuse. Pure.

The relay's side of the same protocols is `relay.core.connectors`; nothing is shared with it, so that a mistake there
meets somebody who does not make it, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import msgspec

from relay_bench.engine.handover.part import Here, Meeting, Part
from relay_bench.engine.plain import Refusal
from relay_bench.engine.script import ENGINE_DIED

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay_bench.engine.ask import Ask

#: Tokens in a block of the recorded engine's KV cache.
_BLOCK_TOKENS: Final = 16

ROLES: Final = ("both", "prefill", "decode")

#: Of a request, its part; raises `Refusal`.
Connector: TypeAlias = "Callable[[Ask, Here], Part]"


def nixl(ask: Ask, here: Here) -> Part:
    """vLLM `nixl/pull_scheduler.py`: the decoder pulls what the prefiller's answer names.

    A handle is given only to an answer that was cut by its length. A decoder whose parameters lack a member never gets
    its blocks; here its answer fails at once.
    """
    params = _params(ask)
    if params.get("do_remote_decode") and ask.is_capped and not ask.stream:
        return _held(ask, here)
    if not params.get("do_remote_prefill"):
        return Part()
    try:
        found = msgspec.convert(params, _Pull, strict=False)
    except msgspec.ValidationError:
        return Part(is_lost=True)
    where = Meeting(found.remote_request_id, found.remote_host, found.remote_port, found.remote_engine_id)
    return Part(takes=where, is_lost=not found.remote_block_ids)


class _Pull(msgspec.Struct):
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: list[Any]


def _held(ask: Ask, here: Here) -> Part:
    handle = f"{ask.id}-8794c0af"
    host, port = here.address
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(1, ask.prompt_tokens // _BLOCK_TOKENS + 2))],
        "remote_engine_id": here.engine_id,
        "remote_request_id": handle,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": ask.prompt_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": ask.cached_tokens or 0,
    }
    return Part(holds=handle, params=params)


def ascend_mooncake(ask: Ask, here: Here) -> Part:
    """vllm-ascend `kv_p2p/mooncake_connector.py`: NIXL's hand-over, with more members in the handle."""
    part = nixl(ask, here)
    if part.params is None:
        return part
    sizes = dict.fromkeys(("remote_pcp_size", "remote_dcp_size", "remote_ptp_size"), 1)
    blocks = {"last_token_id": 1, "num_prompt_blocks": ask.prompt_tokens // _BLOCK_TOKENS + 1}
    more = {"remote_multi_nodes_meta_mapping": {}, "remote_block_size": _BLOCK_TOKENS}
    return msgspec.structs.replace(part, params={**part.params, **sizes, **blocks, **more})


def mooncake(ask: Ask, here: Here) -> Part:
    """vLLM `mooncake/mooncake_connector.py`: the legs meet by a transfer id, at the bootstrap server.

    A prefill leg without a ``transfer_id`` ends the engine (`KeyError`). A decode leg that lacks a member, or names an
    engine that its bootstrap server does not know, never gets its blocks; here its answer fails.
    """
    params = _params(ask)
    if params.get("do_remote_decode"):
        if "transfer_id" not in params:
            raise Refusal(500, ENGINE_DIED, "InternalServerError")
        return Part(holds=str(params["transfer_id"]))
    if not params.get("do_remote_prefill"):
        return Part()
    try:
        found = msgspec.convert(params, _Transfer)
        bootstrap = urlsplit(found.remote_bootstrap_addr)
        host, port = bootstrap.hostname or "", bootstrap.port or 0
    except (msgspec.ValidationError, ValueError):
        return Part(is_lost=True)
    where = Meeting(found.transfer_id, host, port, found.remote_engine_id)
    return Part(takes=where, waits=True, is_lost=not host)


class _Transfer(msgspec.Struct):
    transfer_id: str
    remote_engine_id: str
    remote_bootstrap_addr: str


def p2p_nccl(ask: Ask, here: Here) -> Part:
    """vLLM `p2p/p2p_nccl_connector.py`: each reads the other's sockets from the request id; the prefiller pushes.

    An id without addresses ends the engine (`ValueError`). A decoder waits for the tensors of every request.
    """
    id_ = ask.inner_id
    to = r"___decode_addr_(.*):(\d+)" if here.role == "prefill" else r"___prefill_addr_(.*):(\d+)___"
    found = re.search(to, id_)
    if found is None:
        raise Refusal(500, ENGINE_DIED, "InternalServerError")
    if here.role == "prefill":
        return Part(pushes=Meeting(id_, found[1].strip("[]"), int(found[2])))
    return Part(takes=Meeting(id_), waits=True)


def ascend_layerwise(ask: Ask, here: Here) -> Part:
    """vllm-ascend `kv_p2p/mooncake_layerwise_connector.py`: the decoder calls back, and the prefiller pushes to it.

    Both go by the request's own id: a prefill leg under another one than its decoder's ends without anybody's gain.
    """
    params = _params(ask)
    if params.get("do_remote_prefill"):
        if not isinstance(params.get("metaserver"), str):
            raise Refusal(500, ENGINE_DIED, "InternalServerError")
        message = msgspec.json.encode(_room(ask, here))
        return Part(calls=(params["metaserver"], message), takes=Meeting(ask.inner_id), waits=True)
    if not params.get("do_remote_decode"):
        return Part()
    try:
        found = msgspec.convert(params, _Room, strict=False)
    except msgspec.ValidationError:
        raise Refusal(500, ENGINE_DIED, "InternalServerError") from None
    return Part(pushes=Meeting(ask.inner_id, found.remote_host, found.remote_port, found.remote_engine_id))


class _Room(msgspec.Struct):
    request_id: str
    remote_engine_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: list[Any]


def _room(ask: Ask, here: Here) -> dict[str, Any]:
    """What the decoder posts once it has blocks."""
    return {
        "token_ids": [],
        "request_id": ask.inner_id,
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "remote_block_ids": [list(range(1, ask.prompt_tokens // _BLOCK_TOKENS + 2))],
        "remote_block_size": _BLOCK_TOKENS,
        "remote_engine_id": here.engine_id,
        "remote_host": here.address[0],
        "remote_port": here.address[1],
        "remote_tp_size": 1,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_cached_tokens": 0,
    }


def sglang(ask: Ask, here: Here) -> Part:
    """SGLang `srt/disaggregation`: both legs at once, in a room at the prefiller's bootstrap server.

    Neither role serves a request without a room, and the prefiller begins only once its decoder has come. The texts are
    those of `Scheduler.handle_generate_request`, `handle_bootstrap_failure` and `pop_transferred`.
    """
    host, port, room = (ask.request.get(f"bootstrap_{name}") for name in ("host", "port", "room"))
    if room is None:
        message = f"Invalid request: Disaggregated request received without bootstrap room id. req.rid={ask.id!r}"
        raise Refusal.flat(400, message)
    handle = f"room {room}"
    if here.role == "prefill":
        return Part(
            meets=handle,
            holds=handle,
            error=f"Prefill bootstrap failed for request rank=0 req.rid={ask.id!r} req.bootstrap_room={room!r}",
        )
    host, port = (value[0] if isinstance(value, list) and value else value for value in (host, port))
    is_lost = not isinstance(host, str) or not isinstance(port, int)
    where = None if is_lost else Meeting(handle, str(host).strip("[]"), int(str(port)))
    about = f"decode_req.req.rid={ask.id!r} decode_req.req.bootstrap_room={room!r}"
    error = f"Decode transfer failed for request rank=0 {about}"
    return Part(takes=where, waits=True, is_lost=is_lost, error=error)


def none(ask: Ask, here: Here) -> Part:
    """No hand-over: whatever the request says, the engine computes it alone."""
    return Part()


CONNECTORS: Final[dict[str, Connector]] = {
    "nixl": nixl,
    "mooncake": mooncake,
    "ascend_mooncake": ascend_mooncake,
    "p2p_nccl": p2p_nccl,
    "ascend_layerwise": ascend_layerwise,
    "sglang": sglang,
    "none": none,
}

#: Those whose requests do not say which half they are.
_NEED_ROLE: Final = frozenset({"p2p_nccl", "sglang"})


def connector_named(name: str, role: str) -> Connector:
    """The connector of that name. Raises ValueError saying what is wrong and what is allowed."""
    if name not in CONNECTORS:
        raise ValueError(f"--connector {name}: allowed are {', '.join(CONNECTORS)}")
    if role not in ROLES:
        raise ValueError(f"--role {role}: allowed are {', '.join(ROLES)}")
    if name in _NEED_ROLE and role == "both":
        raise ValueError(f"--connector {name} needs --role prefill or --role decode: its requests do not say which")
    return CONNECTORS[name]


def _params(ask: Ask) -> dict[str, Any]:
    params = ask.request.get("kv_transfer_params")
    return params if isinstance(params, dict) else {}
