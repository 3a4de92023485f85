"""How a prefiller hands a request over to a decoder: one file for each engine's protocol, one interface for all.

`base` has the interface and says how to add one.
"""

from __future__ import annotations

from typing import Final

from relay.core.connectors.ascend_layerwise import AscendLayerwise
from relay.core.connectors.base import Connector
from relay.core.connectors.mooncake import AscendMooncake, Mooncake
from relay.core.connectors.nixl import Nixl
from relay.core.connectors.none import NoConnector
from relay.core.connectors.p2p_nccl import P2pNccl
from relay.core.connectors.sglang import Sglang

_BY_NAME: Final[dict[str, Connector]] = {
    connector.name: connector
    for connector in (Nixl(), Mooncake(), AscendMooncake(), P2pNccl(), AscendLayerwise(), Sglang(), NoConnector())
}

#: Their names, as the configuration has them.
CONNECTORS: Final = tuple(_BY_NAME)


def connector_named(name: str) -> Connector:
    """The connector of that name. Raises ValueError naming those there are."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(f"no connector is named {name!r}; allowed: {', '.join(CONNECTORS)}") from None
