"""Service level objectives: ``--goodput ttft:500 tpot:50``, in milliseconds, met if not exceeded (as in vLLM)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay_bench.load.records import Record

#: What an objective can be about; the first three are vLLM's.
METRICS: Final = ("ttft", "tpot", "e2el", "ttft_planned", "e2el_planned")


class Objective(msgspec.Struct, frozen=True):
    """One metric and its limit."""

    metric: str
    limit_ms: float

    def is_met(self, record: Record) -> bool:
        """Whether a completed request met it.

        Without a second token there is no `tpot`, and vLLM counts it as 0. Where nobody counted the tokens it is not
        known, and so not met.
        """
        value = record.metric_s(self.metric)
        if value is None:
            return record.completion_tokens is not None
        return value * 1000 <= self.limit_ms

    def __str__(self) -> str:
        return f"{self.metric} <= {self.limit_ms:g} ms"


def parse_objectives(words: Iterable[str]) -> tuple[Objective, ...]:
    """Objectives from ``METRIC:MS``; raises `ValueError` with what is allowed."""
    objectives: dict[str, Objective] = {}
    for word in words:
        metric, _, limit = word.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = math.nan
        if metric not in METRICS or not limit_ms >= 0:
            raise ValueError(f"--goodput {word}: wanted METRIC:MS, METRIC one of {', '.join(METRICS)}")
        objectives[metric] = Objective(metric, limit_ms)
    return tuple(objectives.values())


def is_good(record: Record, objectives: Iterable[Objective]) -> bool:
    """Whether a request counts into goodput: it succeeded and met every objective."""
    return not record.label and all(objective.is_met(record) for objective in objectives)
