"""An engine's settings as its pool's connector takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.connectors import connector_named
from relay.core.connectors.base import Endpoint, Role

if TYPE_CHECKING:
    from relay.address import UpstreamConfig


def endpoint_of(upstream: UpstreamConfig, connector: str, role: Role) -> Endpoint:
    """Where an engine can be reached, and with what is not configured filled in by the connector.

    Raises ValueError saying what is wrong and what is allowed.
    """
    endpoint = Endpoint(
        url=upstream.url,
        host=upstream.host,
        kv_address=upstream.kv_address,
        bootstrap=upstream.bootstrap,
        bootstrap_port=upstream.bootstrap_port or None,
    )
    return connector_named(connector).complete(endpoint, role)
