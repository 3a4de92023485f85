"""What the engine has done: the numbers and records behind ``/sim/requests``. Changes are synchronous."""

from __future__ import annotations

import uuid
from collections import deque
from enum import Enum
from typing import Any, Final

from relay_bench.engine.first_tokens import TimesToFirstToken
from relay_bench.engine.handover import Handles
from relay_bench.engine.prefix_cache import PrefixCache

#: How many of the latest requests are remembered.
_REMEMBERED: Final = 1000


class State(Enum):
    """Where a request stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    ABORTED = "aborted"  #: its client left
    FAILED = "failed"  #: refused, or cut off by a fault it asked for


class RequestRecord:
    """One generating request."""

    __slots__ = ("id", "path", "state", "tokens_sent")

    def __init__(self, request_id: str, path: str) -> None:
        self.id = request_id
        self.path = path
        self.state: State | None = None
        self.tokens_sent = 0

    def as_dict(self) -> dict[str, Any]:
        """As the engine's account has it."""
        state = self.state.value if self.state is not None else None
        return {"id": self.id, "path": self.path, "state": state, "tokens_sent": self.tokens_sent}

    def __repr__(self) -> str:
        state = self.state.value if self.state is not None else "new"
        return f"<RequestRecord {self.id or '-'} {self.path} {state} tokens_sent={self.tokens_sent}>"


class Ledger:
    """Counts and records of one engine."""

    def __init__(self, *, cache_blocks: int = 0) -> None:
        self.engine_id = str(uuid.uuid4())
        self.counts: Final = dict.fromkeys(State, 0)
        self.served = 0
        self.connections_open = 0
        self.connections_accepted = 0
        self.records: Final[deque[RequestRecord]] = deque(maxlen=_REMEMBERED)
        self.handles: Final = Handles()
        self.cache: Final = PrefixCache(cache_blocks) if cache_blocks else None
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cache_queries = 0  #: tokens looked up in the prefix cache
        self.cache_hits = 0  #: those found
        self.blocks_in_use = 0  #: by the prompts of running requests
        self.first_tokens: Final = TimesToFirstToken()
        #: ``x-sim-*`` headers of requests that bring none: those of proxies that drop them, say
        self.defaults: dict[str, str] = {}
        self._last: dict[str, str] = {"head": "", "body": "", "raw_body": ""}
        self._last_by_path: dict[str, dict[str, str]] = {}

    def open_record(self, request_id: str, path: str, state: State) -> RequestRecord:
        """A generating request has come in."""
        record = RequestRecord(request_id, path)
        self.served += 1
        self.records.append(record)
        self.move(record, state)
        return record

    def move(self, record: RequestRecord, state: State) -> None:
        """`record` is now in `state`."""
        if record.state is not None:
            self.counts[record.state] -= 1
        record.state = state
        self.counts[state] += 1

    def keep_last(self, path: str, head: bytes, body: bytes, raw_body: bytes) -> None:
        """Remember how the latest request looked on the wire; the probes' ``/health`` only under its own path."""
        seen = {"head": head.decode("latin-1"), "body": body.decode("latin-1"), "raw_body": raw_body.decode("latin-1")}
        if path != "/health":
            self._last = seen
        if path in self._last_by_path or len(self._last_by_path) < _REMEMBERED:
            self._last_by_path[path] = seen

    def last(self, path: str = "") -> dict[str, str]:
        """The latest request, or the latest on `path`: head, body, and the body as it was framed."""
        return self._last_by_path.get(path, {"head": "", "body": "", "raw_body": ""}) if path else self._last

    def stats(self) -> dict[str, int]:
        """The counts alone."""
        counts = {state.value: self.counts[state] for state in State}
        return {
            **counts,
            "served": self.served,
            "connections_open": self.connections_open,
            "connections_accepted": self.connections_accepted,
        }

    def as_dict(self) -> dict[str, Any]:
        """The body of ``/sim/requests``."""
        return {**self.stats(), **self.handles.as_dict(), "requests": [record.as_dict() for record in self.records]}

    def __repr__(self) -> str:
        return f"<Ledger {self.stats()}>"
