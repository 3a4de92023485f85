"""The declared metrics are the interface's, by name and by label, and well formed."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from relay.core import metrics
from relay.core.metrics import FAMILIES, CounterFamily, GaugeFamily, HistogramFamily

#: As the interface writes them; `relay_upstream_in_flight` shares the labels of the line's neighbour. Those of the
#: upstreams' answers, and of how many are up, have come later.
INTERFACE = """
relay_requests_total{pool,route,status,outcome} relay_in_flight{pool} relay_queue_depth{pool}
relay_time_to_first_token_seconds{pool,model} relay_inter_frame_seconds{pool,model} relay_request_duration_seconds
relay_added_seconds{stage} relay_prefill_seconds relay_handover_seconds
relay_tokens_total{pool,model,kind} relay_cost_total
relay_key_requests_total{key} relay_key_in_flight{key} relay_key_refusals_total{key,limit}
relay_key_tokens_total{key,kind} relay_key_cost_total{key}
relay_upstream_healthy{pool,role,upstream} relay_upstream_in_flight{pool,role,upstream}
relay_upstream_responses_total{pool,role,upstream,class} relay_upstreams_up{pool,role}
relay_upstream_failures_total{phase} relay_failovers_total relay_client_disconnects_total{phase}
relay_prefill_without_kv_total relay_kv_drains_total{result} relay_recomputed_total
relay_frames_total relay_bytes_total{direction} relay_event_loop_lag_seconds
relay_records_dropped_total relay_metrics_dropped_total
"""


def test_the_families_are_those_of_the_interface() -> None:
    declared = {
        family.name + ("{" + ",".join(family.labels) + "}" if family.labels else "") for family in metrics.FAMILIES
    }
    assert declared == set(INTERFACE.split())


def test_each_is_declared_once_and_listed() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    declared = [value for value in vars(metrics).values() if isinstance(value, metrics.Family)]
    assert declared == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_keeps_the_naming_rules(family: metrics.Family) -> None:
    """https://prometheus.io/docs/practices/naming/: counters end in ``_total``, times in ``_seconds``, nothing else."""
    assert re.fullmatch(r"relay(_[a-z]+)+", family.name)
    assert family.name.endswith("_total") == isinstance(family, CounterFamily)
    assert family.name.endswith("_seconds") == isinstance(family, HistogramFamily)
    assert family.help.endswith(".")
    assert "\n" not in family.help
    assert "le" not in family.labels


def test_a_gauge_over_processes() -> None:
    greatest = {family.name for family in FAMILIES if isinstance(family, GaugeFamily) and family.is_max}
    assert greatest == {"relay_upstream_healthy", "relay_upstreams_up"}


@pytest.mark.parametrize(
    ("bounds", "first", "last", "widest"),
    [
        (metrics.FIRST_TOKEN_BOUNDS, 0.001, 60, 1.67),
        (metrics.FRAME_BOUNDS, 0.0001, 10, 1.67),
        (metrics.REQUEST_BOUNDS, 0.01, 1000, 2.5),
        (metrics.ADDED_BOUNDS, 0.00005, 50, 2.5),
        (metrics.LAG_BOUNDS, 0.0001, 10, 2.5),
    ],
)
def test_bounds_rise_in_even_steps(bounds: tuple[float, ...], first: float, last: float, widest: float) -> None:
    assert (bounds[0], bounds[-1]) == (first, last)
    assert all(1 < upper / lower <= widest for lower, upper in pairwise(bounds))
    # as decimal fractions, so that `le` is 0.003 and not 0.0030000000000000001
    assert all(len(repr(bound)) <= 7 for bound in bounds)
