"""The two halves of a split request, by every connector the relay knows, checked as strictly as the engines do.

`connectors` reads out of a request what it has to do with an engine on the other side (`part.Part`); `meeting` does
it, over HTTP between stand-ins, as NIXL, ZMQ and NCCL do between engines; `handles` keeps what is held meanwhile, and
counts. A request whose parameters are missing, wrong, of another prefiller or used before ends as in the real engine.
Where that would wait without end, the stand-in gives up after `EngineConfig.kv_patience_s`, so that a mistake is seen.
"""

from relay_bench.engine.handover.connectors import CONNECTORS, ROLES, connector_named
from relay_bench.engine.handover.handles import Handles
from relay_bench.engine.handover.part import Here, Part

__all__ = ["CONNECTORS", "ROLES", "Handles", "Here", "Part", "connector_named"]
