"""Every metric of the relay: its name, labels, meaning and buckets. Where the values are kept is `relay.core.board`.

Names and labels are the interface: dashboards and alerts depend on them. Times are seconds, as Prometheus has them;
`le` bounds are inclusive. Values of the labels that are not names of the configuration:

* ``model``: what the client asked for, so of a bounded number of values (`relay.core.board.MOST_MODELS`), then `OTHER`;
* ``route``: `relay.core.request.Route`; ``status``: of the answer; ``outcome``: the record's two letters;
* ``phase``: the name of a `relay.errors.Phase` in lower case;
* ``key``: the name of a client's key; beyond `relay.core.board.MOST_KEYS` of them, `OTHER`;
* ``limit``: `KEY_LIMITS`;
* ``class``: of an engine's answers, `RESPONSE_CLASSES`;
* ``role``: `ROLES`; ``stage``: `STAGES`; ``kind``: `TOKEN_KINDS`; ``direction``: `DIRECTIONS`;
  ``result``: `DRAIN_RESULTS`.
"""

from __future__ import annotations

from typing import Final

import msgspec

#: The ``model`` or ``key`` of what is beyond the bound on their number.
OTHER: Final = "other"
#: What an upstream does: all of it, or one half of a split pool.
ROLES: Final = ("serve", "prefill", "decode")
#: Where added time went: waiting for a place, dialling, and the relay's own work.
STAGES: Final = ("queue", "connect", "relay")
TOKEN_KINDS: Final = ("prompt", "cached", "completion", "reasoning")
#: What a key may be over: the names of its settings.
KEY_LIMITS: Final = ("max_in_flight", "requests_per_minute")
#: Of an attempt: what the engine answered, or that it failed by the engine's fault, be it in the middle of a stream.
RESPONSE_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx", "failed")  # 5xx: and what is above
DRAIN_RESULTS: Final = ("done", "failed")
#: Bytes of requests taken from clients, and of answers given to them.
DIRECTIONS: Final = ("in", "out")


class Family(msgspec.Struct, frozen=True):
    """All series of one name."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """How many numbers one series is."""
        return 1


class CounterFamily(Family, frozen=True):
    """Only ever grows; its name ends in ``_total``."""


class GaugeFamily(Family, frozen=True):
    """Goes up and down. Over processes it adds up, or with `is_max` the greatest counts."""

    is_max: bool = False


class HistogramFamily(Family, frozen=True, kw_only=True):
    """Counts by upper bound, and a sum."""

    bounds: tuple[float, ...]

    @property
    def cells(self) -> int:
        """One for each bound, one for what is above them all, and the sum."""
        return len(self.bounds) + 2


def _bounds(first: float, last: float, steps: tuple[float, ...]) -> tuple[float, ...]:
    """Round bounds from `first` to `last`, so many to each decade."""
    every = (float(f"{step}e{exponent}") for exponent in range(-6, 5) for step in steps)
    return tuple(bound for bound in every if first <= bound <= last)


# What users judge an engine by gets six bounds a decade, so that a quantile read off them is within a factor of 1.67
# at worst, in the range where each counts: tokens come 0.1 ms (several in one read) to 10 s apart, first ones within
# 1 ms (a stand-in) to 60 s. vLLM's own bounds are coarser below 10 ms, where a relay's part would show.
_FINE: Final = (1, 1.5, 2, 3, 5, 7)
_COARSE: Final = (1, 2, 5)

FIRST_TOKEN_BOUNDS: Final = (*_bounds(0.001, 50, _FINE), 60.0)
FRAME_BOUNDS: Final = _bounds(0.0001, 10, _FINE)
REQUEST_BOUNDS: Final = _bounds(0.01, 1000, _COARSE)
#: From the relay's own work, below a millisecond, to a minute in the queue.
ADDED_BOUNDS: Final = _bounds(0.00005, 50, _COARSE)
LAG_BOUNDS: Final = _bounds(0.0001, 10, _COARSE)

REQUESTS: Final = CounterFamily(
    "relay_requests_total",
    "Exchanges that have ended, by the status sent and the outcome's two letters.",
    ("pool", "route", "status", "outcome"),
)
IN_FLIGHT: Final = GaugeFamily("relay_in_flight", "Exchanges at an engine now.", ("pool",))
QUEUE_DEPTH: Final = GaugeFamily("relay_queue_depth", "Exchanges waiting for a place now.", ("pool",))
FIRST_TOKEN: Final = HistogramFamily(
    "relay_time_to_first_token_seconds",
    "From a request's last byte read to its first content frame sent.",
    ("pool", "model"),
    bounds=FIRST_TOKEN_BOUNDS,
)
INTER_FRAME: Final = HistogramFamily(
    "relay_inter_frame_seconds",
    "Between frames of a stream as they came from the engine, 0 within one read; bounds are met within 6.25 %.",
    ("pool", "model"),
    bounds=FRAME_BOUNDS,
)
REQUEST_DURATION: Final = HistogramFamily(
    "relay_request_duration_seconds",
    "From a request's first byte read to the end of its exchange.",
    bounds=REQUEST_BOUNDS,
)
ADDED: Final = HistogramFamily(
    "relay_added_seconds",
    "Time before the answer that no engine took: in the queue, dialling, and in the relay itself.",
    ("stage",),
    bounds=ADDED_BOUNDS,
)
PREFILL: Final = HistogramFamily(
    "relay_prefill_seconds", "Waited for the prefill leg of a split request.", bounds=FIRST_TOKEN_BOUNDS
)
HANDOVER: Final = HistogramFamily(
    "relay_handover_seconds",
    "From a prefiller's answer to the decoder's first content frame.",
    bounds=FIRST_TOKEN_BOUNDS,
)
TOKENS: Final = CounterFamily(
    "relay_tokens_total",
    "Tokens as the engine counts them, of ended exchanges; cached ones are in prompt, reasoning ones in completion.",
    ("pool", "model", "kind"),
)
COST: Final = CounterFamily("relay_cost_total", "Cost of ended exchanges by the configured prices, in their currency.")
KEY_REQUESTS: Final = CounterFamily(
    "relay_key_requests_total", "Requests let in under a key that have ended, however they did.", ("key",)
)
KEY_IN_FLIGHT: Final = GaugeFamily(
    "relay_key_in_flight", "Requests under a key now, from their head read to their end.", ("key",)
)
KEY_REFUSALS: Final = CounterFamily(
    "relay_key_refusals_total", "Requests refused because their key was over a limit.", ("key", "limit")
)
KEY_TOKENS: Final = CounterFamily("relay_key_tokens_total", "As relay_tokens_total, by key.", ("key", "kind"))
KEY_COST: Final = CounterFamily("relay_key_cost_total", "As relay_cost_total, by key.", ("key",))
UPSTREAM_HEALTHY: Final = GaugeFamily(
    "relay_upstream_healthy", "1 where the upstream may be picked, else 0.", ("pool", "role", "upstream"), is_max=True
)
UPSTREAM_IN_FLIGHT: Final = GaugeFamily(
    "relay_upstream_in_flight", "Legs at the upstream now.", ("pool", "role", "upstream")
)
UPSTREAM_RESPONSES: Final = CounterFamily(
    "relay_upstream_responses_total",
    "Answers of the upstream by class; failed: attempts without one that could be used, and streams that broke off.",
    ("pool", "role", "upstream", "class"),
)
UPSTREAMS_UP: Final = GaugeFamily(
    "relay_upstreams_up", "Upstreams that may be picked, 0 where there is none.", ("pool", "role"), is_max=True
)
UPSTREAM_FAILURES: Final = CounterFamily(
    "relay_upstream_failures_total", "Attempts that failed by the upstream's fault.", ("phase",)
)
FAILOVERS: Final = CounterFamily("relay_failovers_total", "Attempts made because an earlier one had failed.")
CLIENT_DISCONNECTS: Final = CounterFamily(
    "relay_client_disconnects_total", "Exchanges whose client left before their end.", ("phase",)
)
PREFILL_WITHOUT_KV: Final = CounterFamily(
    "relay_prefill_without_kv_total", "Prefill replies without a handle to the key-value cache."
)
KV_DRAINS: Final = CounterFamily(
    "relay_kv_drains_total",
    "Handles whose clients had left, by whether a decoder has freed them or they wait for the engine's timer.",
    ("result",),
)
RECOMPUTED: Final = CounterFamily("relay_recomputed_total", "Answers cut because a decoder gave the request up.")
FRAMES: Final = CounterFamily("relay_frames_total", "Frames passed on to clients.")
BYTES: Final = CounterFamily(
    "relay_bytes_total", "Bytes of request bodies read and of answers sent, on the clients' side.", ("direction",)
)
EVENT_LOOP_LAG: Final = HistogramFamily(
    "relay_event_loop_lag_seconds", "How late a worker's event loop ran a timer.", bounds=LAG_BOUNDS
)
RECORDS_DROPPED: Final = CounterFamily(
    "relay_records_dropped_total", "Records of exchanges lost: their reader was too slow or gone, or the disk full."
)
METRICS_DROPPED: Final = CounterFamily(
    "relay_metrics_dropped_total", "Look-ups of a series that found its board full, so that what they count is lost."
)

#: In the order in which they are shown.
FAMILIES: Final[tuple[Family, ...]] = (
    REQUESTS, IN_FLIGHT, QUEUE_DEPTH, FIRST_TOKEN, INTER_FRAME, REQUEST_DURATION, ADDED, PREFILL, HANDOVER, TOKENS,
    COST, KEY_REQUESTS, KEY_IN_FLIGHT, KEY_REFUSALS, KEY_TOKENS, KEY_COST, UPSTREAM_HEALTHY, UPSTREAM_IN_FLIGHT,
    UPSTREAM_RESPONSES, UPSTREAMS_UP, UPSTREAM_FAILURES, FAILOVERS, CLIENT_DISCONNECTS, PREFILL_WITHOUT_KV, KV_DRAINS,
    RECOMPUTED, FRAMES, BYTES, EVENT_LOOP_LAG, RECORDS_DROPPED, METRICS_DROPPED,
)  # fmt: skip
