"""What one request has to do with an engine on the other side. Data only."""

from __future__ import annotations

from typing import Any

import msgspec


class Here(msgspec.Struct, frozen=True):
    """The engine a request came to."""

    engine_id: str
    role: str  #: ``both``, ``prefill`` or ``decode``
    address: tuple[str, int]  #: host and port at which the request came in


class Meeting(msgspec.Struct, frozen=True):
    """A handle, and the engine that holds it; without a host: this one."""

    handle: str
    host: str = ""
    port: int = 0
    #: Whose it must be; empty: whoever is there.
    engine_id: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """In the order in which it is done: call, meet, take; answer; hold or push."""

    #: vllm-ascend's layerwise decoder: POST this to its metaserver.
    calls: tuple[str, bytes] | None = None
    #: SGLang's prefiller: begin only once a decoder has come for this handle.
    meets: str = ""
    #: Fetch this before the first token; the prompt need not be computed then.
    takes: Meeting | None = None
    #: The legs are sent at the same time: what is not held yet may still come.
    waits: bool = False
    #: What this names is not to be had, by its looks.
    is_lost: bool = False
    #: How the answer ends where something cannot be had.
    error: str = "Internal server error"
    #: Hold this for a decoder, from the end of the answer on.
    holds: str = ""
    #: Bring this to a decoder, at the end of the answer.
    pushes: Meeting | None = None
    #: ``kv_transfer_params`` of a whole answer.
    params: dict[str, Any] | None = None

    @property
    def may_wait(self) -> bool:
        """Whether that depends on the other leg's coming."""
        return self.waits or bool(self.meets)

    @property
    def needs_other(self) -> bool:
        """Whether there is something to do before the answer."""
        return bool(self.calls or self.meets or self.takes or self.is_lost)
