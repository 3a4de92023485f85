"""Figures by contender out of samples. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

import msgspec

from relay_bench.compare import DIRECT, METRICS, Difference, difference_of, paired_differences
from relay_bench.load.stats import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relay_bench.load.records import Record
    from relay_bench.peers.scenarios import Held, Sample

#: Share of its core from which on a proxy is as busy as it can be.
FULL_SHARE: Final = 0.9


#: Of the schedule of latency, by contender and round.
Records = dict[str, dict[int, list["Record"]]]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of a contender over rounds: the median, the least, the most."""

    median: float
    low: float
    high: float
    #: through the contender named first, of the same round: median ratio; None where there is no such round
    ratio: float | None = None
    core_share: float = 0.0  #: of its core that the proxy used: median
    is_reduced: bool = False  #: of a tenth of the streams


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one contender; None: not measured."""

    name: str
    figures: dict[str, Figure]  #: by key of `COLUMNS`
    saturated_frames_per_s: float | None = None  #: that came through, median: more is better
    ttft_p50_ms: float | None = None  #: added, median of the paired differences
    ttft_p99_ms: float | None = None  #: added, difference of the p99s
    memory_bytes: int | None = None  #: before streams were held open
    bytes_per_stream: float | None = None


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that comes of a scenario's samples: what a proxy spends on a unit of work; less is better."""

    scenario: str
    title: str
    short: str  #: for narrow tables
    of: Callable[[Sample], float]  #: µs of CPU


def _us_per_frame(sample: Sample) -> float:
    return sample.cpu_ns / 1000 / sample.frames


COLUMNS: Final = {
    "cpu_us_per_frame_spread": Column(
        scenario="spread",
        title="CPU per frame, spread",
        short="frame, spread",
        of=_us_per_frame,
    ),
    "cpu_us_per_frame_at_once": Column(
        scenario="at_once",
        title="CPU per frame, at once",
        short="frame, at once",
        of=_us_per_frame,
    ),
    "cpu_us_per_frame_saturated": Column(
        scenario="saturated",
        title="CPU per frame, saturated",
        short="frame, saturated",
        of=_us_per_frame,
    ),
    "cpu_us_per_request": Column(
        scenario="short",
        title="CPU per short request",
        short="short request",
        of=lambda sample: sample.cpu_ns / 1000 / sample.answers,
    ),
}


def rows_of(
    names: Sequence[str],
    samples: Sequence[Sample],
    held: Sequence[Held],
    records: Records,
) -> list[Row]:
    """A row for each of `names`, proxies only; ratios are to the first of them."""
    by_name = {one.name: one for one in held}
    rows = []
    for name in names:
        figures = {key: figure for key in COLUMNS if (figure := figure_of(key, name, names[0], samples)) is not None}
        p50, p99 = _added_ttft(*_of_both(name, records))
        saturated = [one for one in samples if (one.name, one.scenario) == (name, "saturated")]
        memory = by_name.get(name)
        rows.append(
            Row(
                name=name,
                figures=figures,
                saturated_frames_per_s=_frames_per_s(saturated) if saturated else None,
                ttft_p50_ms=p50,
                ttft_p99_ms=p99,
                memory_bytes=memory.before_bytes if memory else None,
                bytes_per_stream=(memory.with_streams_bytes - memory.before_bytes) / memory.streams if memory else None,
            )
        )
    return rows


def figure_of(key: str, name: str, first: str, samples: Sequence[Sample]) -> Figure | None:
    """A figure over all rounds that have it."""
    column = COLUMNS[key]
    of_scenario = [one for one in samples if one.scenario == column.scenario]
    mine = {one.round: one for one in of_scenario if one.name == name}
    if not mine:
        return None
    values = {round_: column.of(one) for round_, one in mine.items()}
    beside = {one.round: column.of(one) for one in of_scenario if one.name == first}
    ratios = [value / beside[round_] for round_, value in values.items() if beside.get(round_)]
    return Figure(
        median=statistics.median(values.values()),
        low=min(values.values()),
        high=max(values.values()),
        ratio=statistics.median(ratios) if ratios else None,
        core_share=statistics.median(one.cpu_ns / 1e9 / one.seconds for one in mine.values()),
        is_reduced=any(one.is_reduced for one in mine.values()),
    )


def floor_of(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """What engine and client do without a proxy, by scenario: the most there is to be had through one."""
    found = {}
    for scenario in dict.fromkeys(one.scenario for one in samples):
        direct = [one for one in samples if one.name == DIRECT and one.scenario == scenario]
        if direct:
            found[scenario] = {
                "frames_per_s": _frames_per_s(direct),
                "answers_per_s": statistics.median(one.answers / one.seconds for one in direct),
                "client_cpu_us_per_frame": statistics.median(one.client_cpu_ns / 1000 / one.frames for one in direct),
                "engine_cpu_us_per_frame": statistics.median(one.engine_cpu_ns / 1000 / one.frames for one in direct),
            }
    return found


def _frames_per_s(samples: Sequence[Sample]) -> float:
    return statistics.median(one.frames / one.seconds for one in samples)


def bound_by_harness(rows: Sequence[Row]) -> list[str]:
    """Proxies whose core was not full though frames came as fast as they could: engine and client were."""
    key = "cpu_us_per_frame_saturated"
    return [row.name for row in rows if key in row.figures and row.figures[key].core_share < FULL_SHARE]


def differences_of(names: Sequence[str], records: Records, seed: int) -> list[Difference]:
    """What each proxy adds to the schedule of latency, by metric."""
    return [
        difference
        for metric in METRICS
        for name in names
        if (difference := difference_of(name, metric, *_of_both(name, records), seed=seed)) is not None
    ]


def _of_both(name: str, records: Records) -> tuple[list[list[Record]], list[list[Record]]]:
    """Records direct and through a proxy, of the rounds that both have."""
    direct, through = records.get(DIRECT, {}), records.get(name, {})
    rounds = sorted(direct.keys() & through.keys())
    return [direct[round_] for round_ in rounds], [through[round_] for round_ in rounds]


def _added_ttft(
    direct: Sequence[Sequence[Record]], through: Sequence[Sequence[Record]]
) -> tuple[float | None, float | None]:
    pairs = [pair for both in zip(direct, through, strict=True) for pair in paired_differences(*both, "ttft")]
    if not pairs:
        return None, None
    own, other = sorted(one for one, _ in pairs), sorted(one for _, one in pairs)
    p50 = statistics.median(other_ms - own_ms for own_ms, other_ms in pairs)
    return p50, percentile(other, 0.99) - percentile(own, 0.99)
