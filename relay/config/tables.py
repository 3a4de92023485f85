"""The configuration: what each setting means, its unit, its default and the reason for it.

The structs are what the daemon works with. What a mistake's line says is the `description` of the setting's type, so a
type is described once, here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from relay.address import UPSTREAM_FORMS, Address, UpstreamConfig

_YEAR_S = 31_536_000.0

Limit = Annotated[float, Meta(ge=0, le=_YEAR_S, description="seconds, 0 or more (0: no limit)")]
Delay = Annotated[float, Meta(ge=0, le=_YEAR_S, description="seconds, 0 or more (0: none at all)")]
Budget = Annotated[float, Meta(gt=0, le=_YEAR_S, description="seconds, more than 0")]
Size = Annotated[int, Meta(ge=1, description="a whole number of bytes, at least 1")]
Count = Annotated[int, Meta(ge=1, description="a whole number, at least 1")]
Status = Annotated[int, Meta(ge=400, le=599, description="an HTTP error status, 400 to 599")]
Name = Annotated[str, Meta(pattern=r"^\S+\Z", description="text without spaces")]
AddressOrOff = Annotated[Address | None, Meta(description='HOST:PORT, [::1]:PORT, unix:/path or "off"')]
Listener = Annotated[Address, Meta(description="HOST:PORT, [::1]:PORT or unix:/path")]
Listeners = Annotated[tuple[Listener, ...], Meta(min_length=1, description="a list of at least one address")]
Upstream = Annotated[UpstreamConfig, Meta(description=f"{UPSTREAM_FORMS}, as text or {{ url = … }}")]
MostOrNone = Annotated[int, Meta(ge=0, description="a whole number, 0 or more (0: no limit)")]
PerMinute = Annotated[int, Meta(ge=0, le=50_000, description="a whole number, 0 to 50000 (0: no limit)")]
Places = Annotated[int, Meta(ge=0, description="a whole number, 0 or more (0: none)")]
Weight = Annotated[int, Meta(ge=1, le=1000, description="a whole number, 1 to 1000")]
UrlPath = Annotated[str, Meta(pattern=r"^/[!-~]*\Z", description="a path, beginning with /")]
Routes = Annotated[tuple[UrlPath, ...], Meta(min_length=1, description="a list of paths, each beginning with /")]
FieldName = Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", description="the name of a header field")]
Balance = Annotated[
    Literal["least_outstanding", "round_robin", "random", "power_of_two", "session_affinity", "prefix_affinity"],
    Meta(
        description='"least_outstanding", "round_robin", "random", "power_of_two", "session_affinity" or '
        '"prefix_affinity"'
    ),
]
Workers = Annotated[
    Literal["auto"] | Annotated[int, Meta(ge=1, le=1024)], Meta(description='"auto" or a whole number, 1 to 1024')
]
Port = Annotated[int, Meta(ge=0, le=65535, description="a port, 1 to 65535 (0: the engine's default)")]
Connector = Annotated[
    Literal["nixl", "mooncake", "ascend_mooncake", "p2p_nccl", "ascend_layerwise", "sglang", "none"],
    Meta(description='"nixl", "mooncake", "ascend_mooncake", "p2p_nccl", "ascend_layerwise", "sglang" or "none"'),
]
CachedFrom = Annotated[Literal["prefill", "decode"], Meta(description='"prefill" or "decode"')]
OnMissing = Annotated[Literal["decode", "error"], Meta(description='"decode" or "error"')]
AddressOrNone = Annotated[str, Meta(pattern=r"^(\S+:\d+)?\Z", description='HOST:PORT, or "" for one of its own')]
UrlOrNone = Annotated[str, Meta(pattern=r"^(https?://\S+)?\Z", description='http://HOST:PORT, or "" for the default')]
File = Annotated[str, Meta(description="a file's path")]
NameOrNone = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]*\Z", description='a name, or "" for the one in the URL')]
OwnTls = Annotated["TlsConfig | None", Meta(description="{ cert = …, key = … }, both files in PEM")]
Flag = Annotated[bool, Meta(description="true or false")]
OwnFlag = Annotated[bool | None, Meta(description="true or false")]
OwnDelay = Annotated[
    Annotated[float, Meta(ge=0, le=_YEAR_S)] | None, Meta(description="seconds, 0 or more (0: none at all)")
]
IncludeUsage = Annotated[Literal["as-asked", "always"], Meta(description='"as-asked" or "always"')]
OwnIncludeUsage = Annotated[Literal["as-asked", "always"] | None, Meta(description='"as-asked" or "always"')]
_PRICES = "money for a million tokens, 0 or more"
Price = Annotated[float, Meta(ge=0, le=1e9, description=_PRICES)]
OwnPrice = Annotated[Annotated[float, Meta(ge=0, le=1e9)] | None, Meta(description=_PRICES)]
LimitedKeys = Annotated[dict[str, "KeyLimitsConfig"], Meta(description='tables, [auth.limits."NAME"]')]
PricedModels = Annotated[dict[str, "PriceConfig"], Meta(description='tables, [prices."MODEL"]')]
LogFormat = Annotated[Literal["json", "text", "off"], Meta(description='"json", "text" or "off"')]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


class TlsConfig(Table, frozen=True):
    """What a listener shows its clients. Read again with each reload."""

    #: Its certificate, and those between it and a root, in PEM.
    cert: File
    #: The certificate's key, in PEM.
    key: File


class ListenConfig(Table, frozen=True):
    """Where clients connect."""

    #: Loopback: whoever opens an engine to a network should say so. Ignored where systemd passes sockets.
    addresses: Listeners = (Address("127.0.0.1", 8080),)
    #: With it all of `addresses` speak https, and of systemd's sockets those named so; none.
    tls: OwnTls = None


class AdminConfig(Table, frozen=True):
    """Where operators and Prometheus connect."""

    #: Apart from the public listener, so that no client ever reaches it; None (in the file "off"): no admin side.
    address: AddressOrOff = Address("127.0.0.1", 8081)
    #: Whether `address` may be reached from other machines: whoever reaches it can take engines out.
    allow_remote: Flag = False


class DaemonConfig(Table, frozen=True):
    """The life of the process."""

    #: Processes that carry traffic; "auto": one for each core the daemon may use (``CPUAffinity=``).
    workers: Workers = "auto"
    #: Seconds for open streams after SIGTERM; below the stop limit of most supervisors, 0 cuts them at once.
    drain_s: Delay = 30.0
    #: Seconds that readiness says 503 before accepting stops; 0, as only a load balancer that polls it needs more.
    ready_delay_s: Delay = 0.0


class UpstreamTable(Table, frozen=True):
    """An engine's long form."""

    url: Upstream
    #: Its share of the requests, beside the other weights.
    weight: Weight = 1
    #: Exchanges at once; none, as for the pool.
    max_in_flight: MostOrNone = 0
    #: Certificates, in PEM, that vouch for an https engine in the place of the system's.
    ca: File = ""
    #: The name that an https engine's certificate must be for; else the URL's host.
    server_name: NameOrNone = ""
    #: Where a prefiller or decoder of p2p_nccl has its key-value sockets; else vLLM's default port on its host.
    kv_address: AddressOrNone = ""
    #: A mooncake prefiller's bootstrap server; else vLLM's default port on its host.
    bootstrap: UrlOrNone = ""
    #: The port of an sglang prefiller's bootstrap server; else SGLang's default.
    bootstrap_port: Port = 0


class PoolConfig(Table, frozen=True):
    """Engines that serve the same models."""

    #: The pool's name in records and metrics.
    name: Name = "default"
    #: Models served here, `*` matches any text; empty: every model that no other pool claims.
    models: tuple[Name, ...] = ()
    #: The engines; none is an error unless flags give some.
    upstreams: tuple[Upstream, ...] = ()
    #: Streams differ in length by orders of magnitude, so counting what is open beats taking turns.
    balance: Balance = "least_outstanding"
    #: Exchanges at the pool's engines at once; none, as engines queue by themselves, but see the README.
    max_in_flight: MostOrNone = 0
    #: Requests that wait for a place beyond `max_in_flight`; the next gets 429. None: it gets that at once.
    max_queue: Places = 0
    #: The request field that names a session, for `session_affinity`.
    session_header: FieldName = "X-Session-Id"
    #: Instead of `upstreams`, for disaggregated prefill and decode: engines that compute prompts,
    prefill: tuple[Upstream, ...] = ()
    #: and engines that go on from there.
    decode: tuple[Upstream, ...] = ()
    #: How a prefiller hands over to a decoder.
    connector: Connector = "nixl"
    #: What a prefiller's answer without a handle leads to: the decoder computes the prompt itself, or 502.
    on_missing_kv: OnMissing = "decode"
    #: Whether a handle whose client left before its decode request was sent is freed by a decoder all the same.
    drain_kv: Flag = True
    #: Whose count of cached tokens clients see: a decoder counts all that it was handed over.
    cached_tokens_from: CachedFrom = "prefill"
    #: Where decoders reach this worker (ascend_layerwise).
    callback_address: AddressOrNone = ""
    #: For this pool alone, instead of what [stream] says.
    force_stream: OwnFlag = None
    #: Likewise.
    include_usage: OwnIncludeUsage = None
    #: Likewise.
    keepalive_comment_s: OwnDelay = None

    @property
    def is_split(self) -> bool:
        """Whether prefill and decode are different engines' work."""
        return bool(self.prefill or self.decode)

    @property
    def roles(self) -> tuple[str, ...]:
        """Those that its engines have."""
        return ("prefill", "decode") if self.is_split else ("serve",)

    def upstreams_of(self, role: str) -> tuple[UpstreamConfig, ...]:
        """The engines of a role: ``serve``, ``prefill`` or ``decode``."""
        return {"serve": self.upstreams, "prefill": self.prefill, "decode": self.decode}[role]


class StreamConfig(Table, frozen=True):
    """What happens to event streams."""

    #: Bytes held while waiting for a frame's end; beyond it the frame goes on unaligned. Far above any token's frame.
    max_frame_bytes: Size = 1_048_576
    #: Whether engines are asked to stream to clients that did not, which get one JSON body made of the stream.
    force_stream: Flag = False
    #: Bytes of such a body, and of one that gets costs: a million tokens are 5 MB, with log probabilities over 100.
    max_answer_bytes: Size = 67_108_864
    #: Whether engines are always asked for usage, its frame hidden from clients that did not; else as clients ask.
    include_usage: IncludeUsage = "as-asked"
    #: Seconds of silence after which a client of a stream gets a comment, at most 0.5 s late. Before the answer, too: a
    #: head of 200 comes with it, so that an error is a frame from then on. None: only idle limits on the way need them.
    keepalive_comment_s: Delay = 0.0


#: Of these a pool may have its own.
_OWN_OF_POOL = ("force_stream", "include_usage", "keepalive_comment_s")


class FailoverConfig(Table, frozen=True):
    """Trying another engine; before the first byte of an answer has gone out, never after."""

    #: Engines tried for one request, the first included: two may fail at once in a rolling restart. 1: no failover.
    attempts: Count = 3
    #: Seconds after which no further attempt is begun: a client's patience, not an engine's.
    budget_s: Budget = 30.0
    #: Statuses that count as the engine's failure: a gateway's. 500 is not one, as it may be the request's own fault.
    statuses: tuple[Status, ...] = (502, 503, 504)


class TimeoutsConfig(Table, frozen=True):
    """One limit for each wait."""

    #: Seconds for a request's head, from its first byte: a head is one packet; nginx takes 60, HAProxy's guide 10.
    client_head_s: Limit = 10.0
    #: Seconds for a request's whole body: a large one with images over a slow line.
    client_body_s: Limit = 60.0
    #: Seconds a client's connection may idle between requests: nginx's keepalive_timeout.
    client_idle_s: Limit = 75.0
    #: Seconds a client may take no byte while some wait for it; memory is held meanwhile.
    client_stall_s: Limit = 30.0
    #: Seconds a request may wait for a place at an engine: as long as people wait for a first word.
    queue_s: Limit = 60.0
    #: Seconds to reach an engine: one lost SYN is sent again after 1 s, a second after 3 s.
    connect_s: Limit = 3.0
    #: Seconds for the prefill leg of a split request: a long prompt behind a long queue, but nothing generated.
    prefill_s: Limit = 300.0
    #: Seconds from the request sent to the first frame: a long prompt behind a long queue; openai's SDK waits 600.
    first_token_s: Limit = 600.0
    #: Seconds between two reads of a stream: preemption and recomputation of a long context pause for tens of seconds.
    between_tokens_s: Limit = 120.0
    #: Seconds for a whole exchange: none, as length is the request's own business (`max_tokens`).
    total_s: Limit = 0.0
    #: Seconds an unused connection to an engine is kept: below the 5 s after which uvicorn closes it.
    upstream_idle_s: Limit = 4.0


class LimitsConfig(Table, frozen=True):
    """What one client, and all together, may hold."""

    #: Bytes of a request's head: nginx takes 8 KiB a line, gateways add long tokens and cookies.
    max_head_bytes: Size = 65_536
    #: Bytes of a request's body: a long context is about 1 MB, images come as base64.
    max_body_bytes: Size = 67_108_864
    #: Client connections of each worker; each takes two descriptors while it streams.
    max_connections: Count = 20_000
    #: Bytes of request bodies held at once; beyond it bodies wait unread, then get 503.
    max_buffered_bytes: Size = 1_073_741_824


class HealthConfig(Table, frozen=True):
    """How the engines are watched; what requests themselves tell of them is watched always."""

    #: What is asked for; any answer of 200 to 299 is good.
    path: UrlPath = "/health"
    #: Seconds between two probes of an engine: HAProxy asks each 2, Kubernetes each 10. 0: no probes.
    interval_s: Delay = 5.0
    #: Failed probes in a row that take an engine out: one may be a hiccup of a busy event loop.
    failures: Count = 3
    #: Good probes in a row that bring it back.
    successes: Count = 2


class PriceConfig(Table, frozen=True):
    """What a million tokens of a model cost, in any currency."""

    #: Of the prompt.
    prompt: Price = 0.0
    #: Of the prompt, where the engine had them in its prefix cache; None: as `prompt`.
    cached_prompt: OwnPrice = None
    #: Generated, reasoning included.
    completion: Price = 0.0


class CostConfig(Table, frozen=True):
    """Who is told of costs, beside the record and the metrics."""

    #: Whether clients are, in the usage object.
    in_usage: Flag = False


class KeyLimitsConfig(Table, frozen=True):
    """What a key may do, over all workers."""

    #: Requests at once; the next gets 429. None: an agent may open a thousand streams.
    max_in_flight: MostOrNone = 0
    #: Requests a minute, so many of them at once at most: a token bucket, which is filled each second.
    requests_per_minute: PerMinute = 0


class AuthConfig(Table, frozen=True):
    """Who may use the relay."""

    #: Lines of ``name:sha256-hex`` (`relay key new` prints them); empty: everybody may, and engines see clients' keys.
    keys_file: File = ""
    #: With keys, the paths that are open, ``*`` for anything: engines' own control routes stay inside.
    routes: Routes = ("/v1/*",)
    #: By the name of a key; `*` matches any text, a key's own name comes first, then the longest pattern.
    limits: LimitedKeys = msgspec.field(default_factory=dict)
    #: A file with the key that engines ask for, sent instead of clients' own.
    upstream_key_file: File = ""


class LogConfig(Table, frozen=True):
    """The records of exchanges, on standard output."""

    #: One JSON object a line, for the journal and jq; "text" for people, "off" for neither.
    format: LogFormat = "json"


class Config(Table, frozen=True):
    """A whole configuration; `Config()` is what an empty file means."""

    listen: ListenConfig = ListenConfig()
    admin: AdminConfig = AdminConfig()
    daemon: DaemonConfig = DaemonConfig()
    pools: tuple[PoolConfig, ...] = msgspec.field(name="pool", default=())
    stream: StreamConfig = StreamConfig()
    failover: FailoverConfig = FailoverConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    limits: LimitsConfig = LimitsConfig()
    health: HealthConfig = HealthConfig()
    auth: AuthConfig = AuthConfig()
    #: By model; `*` matches any text, a model's own name comes first, then the longest pattern.
    prices: PricedModels = msgspec.field(default_factory=dict)
    cost: CostConfig = CostConfig()
    log: LogConfig = LogConfig()

    def stream_of(self, pool: PoolConfig) -> StreamConfig:
        """What holds for the streams of a pool."""
        own = {name: value for name in _OWN_OF_POOL if (value := getattr(pool, name)) is not None}
        return msgspec.structs.replace(self.stream, **own) if own else self.stream
