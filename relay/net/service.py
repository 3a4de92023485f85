"""What the exchanges of a worker share, and the few paths a worker answers itself."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING

from relay.config import Config, PriceConfig
from relay.core.cost import PriceList, Prices
from relay.core.request_head import Request
from relay.core.timeline import Record
from relay.errors import RequestRefused
from relay.net.drains import Drains
from relay.net.fleet import Fleet
from relay.net.guard import NO_LIMITS, Guard
from relay.net.keyring import Keyring, Visit
from relay.net.pump import Pump
from relay.net.tally import Tally

if TYPE_CHECKING:
    from relay.core.board import Block
    from relay.net.exchange import Exchange


class Service:
    """Configuration, fleet, pump and the exchanges in flight."""

    def __init__(
        self,
        config: Config,
        pump: Pump,
        write_record: Callable[[Record], None] | None,
        block: Block | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`guard`: None for one that is read here, which raises GuardError."""
        self.pump = pump
        self.fleet = Fleet(config)
        self.tally = Tally(block)  #: in a block of its own, or in shared memory
        self.keys = Keyring(self.tally.board)
        self.reconfigure(config, guard or Guard.read(config.auth))
        self.write_record = write_record  #: None: nobody reads records
        self.is_ready = True  #: false: load balancers are to send no more, but what comes is served
        self.is_draining = False  #: no more requests
        self.active: set[Exchange] = set()
        self.drains = Drains()
        self.callbacks: dict[str, Callable[[bytes], None]] = {}  #: of decoders that are to call back, by key

    def reconfigure(self, config: Config, guard: Guard) -> None:
        """What exchanges begin with from now on. `guard` has been made before, so that nothing can go wrong here."""
        self.config = config
        self.guard = guard
        self.keys.keep({*(guard.credentials.names or {}).values()})
        self.prices = PriceList({model: _as_decimals(prices) for model, prices in config.prices.items()})

    def drain(self) -> None:
        """No more requests, which the answers that have not begun are to say."""
        self.is_draining = True
        for exchange in self.active:
            exchange.pair.preface = None

    def admit(self, request: Request) -> Visit | None:
        """Judges a request by its head, notes whose it is, and lets it in; None: nobody's, as no key is asked for.

        Raises RequestRefused: 401 or 404; RateLimited: 429.
        """
        guard = self.guard
        if guard.access is None:
            return None
        request.key = name = guard.admit(request.head.method, request.head.target, request.fields)
        return None if name is None else self.keys.of(name).enter(guard.limits.get(name, NO_LIMITS))

    def __repr__(self) -> str:
        return f"<Service active={len(self.active)} {'draining' if self.is_draining else 'serving'}>"


def _as_decimals(prices: PriceConfig) -> Prices:
    """Prices as they are written: the shortest text of a float is what was read."""
    cached = prices.prompt if prices.cached_prompt is None else prices.cached_prompt
    return Prices(*(Decimal(repr(price)) for price in (prices.prompt, cached, prices.completion)))


def local_answer(service: Service, method: bytes, path: bytes) -> tuple[int, bytes] | None:
    """Status and JSON body of a path that the relay answers on every listener; None for an engine's.

    Asked for `Route.OTHER` alone: what generates is the engines'.
    Raises RequestRefused for the admin side's, of which an engine is to hear nothing.
    """
    if path.startswith(b"/-/"):
        if path == b"/-/live":
            return 200, b'{"status":"live"}\n'
        if path == b"/-/ready":
            return (200, b'{"status":"ready"}\n') if service.is_ready else (503, b'{"status":"draining"}\n')
        raise RequestRefused(404, "not_found", "this path is not served here; the relay's own are on its admin side")
    if path == b"/v1/models" and method == b"GET":
        models = service.fleet.models()
        return None if models is None else (200, models)
    return None
