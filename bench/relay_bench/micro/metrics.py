"""``relay-bench micro metrics``: what counting costs the relay.

Counters are moved once per request or less, and the gaps between frames are folded in, each second, from histograms
that the pump keeps anyway. Each figure is the best of several rounds, since a round can only be disturbed upwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from relay.core import metrics
from relay.core.board import BOARD_BYTES, Board, total
from relay.core.histogram import Histogram
from relay_bench.micro.pure import best_ns
from relay_bench.micro.table import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

#: Folded together, as a worker would.
STREAMS: Final = 1000
#: What the blocks of a scrape hold: so many workers, pools and models.
WORKERS: Final = 4
POOLS: Final = 3
MODELS: Final = 5


class MetricsCost(msgspec.Struct, frozen=True):
    """What one step of metrics costs."""

    step: str
    ns: float


def _counter(times: int) -> None:
    series = Board(bytearray(BOARD_BYTES)).counter(metrics.FRAMES)
    for _ in range(times):
        series.add()


def _find(times: int) -> None:
    board = Board(bytearray(BOARD_BYTES))
    for _ in range(times):
        board.counter(metrics.REQUESTS, "chat", "chat", "200", "--")


def _observe(times: int) -> None:
    series = Board(bytearray(BOARD_BYTES)).histogram(metrics.FIRST_TOKEN, "chat", "m")
    for _ in range(times):
        series.observe(0.084)


def _fold(times: int) -> None:
    series = Board(bytearray(BOARD_BYTES)).histogram(metrics.INTER_FRAME, "chat", "m")
    streams = [Histogram() for _ in range(STREAMS)]
    for _ in range(times // len(streams)):
        for gaps in streams:
            for ns in _SECOND_NS:
                gaps.add(ns)
            series.fold(gaps)


def _flush(times: int) -> None:
    series = Board(bytearray(BOARD_BYTES)).histogram(metrics.INTER_FRAME, "chat", "m")
    gaps = Histogram()
    for _ in range(times):
        for ns in _SECOND_NS:
            gaps.add(ns)
        series.fold(gaps)
        series.flush()


def _blocks() -> list[bytearray]:
    """The boards of some workers that have served every model of every pool."""
    blocks = [bytearray(BOARD_BYTES) for _ in range(WORKERS)]
    for board in map(Board, blocks):
        for pool in range(POOLS):
            for route in ("chat", "completions"):
                board.counter(metrics.REQUESTS, f"pool-{pool}", route, "200", "--").add()
            for model in range(MODELS):
                labels = f"pool-{pool}", f"model-{model}"
                board.histogram(metrics.FIRST_TOKEN, *labels).observe(0.08)
                board.histogram(metrics.INTER_FRAME, *labels).observe(0.02)
                for kind in metrics.TOKEN_KINDS:
                    board.counter(metrics.TOKENS, *labels, kind).add(100)
    return blocks


def _total(times: int) -> None:
    for _ in range(times):
        total(_ALL_BLOCKS)


#: The gaps of a second at 40 tokens/s.
_SECOND_NS: Final = [15_000_000 + 500_000 * (frame * 7 % 40) for frame in range(40)]
_ALL_BLOCKS: Final = _blocks()

#: Each step, and how often a round does it.
STEPS: Final[dict[str, tuple[Callable[[int], None], int]]] = {
    "a counter's increment": (_counter, 200_000),
    "finding a counter by five values": (_find, 100_000),
    "observing a value in a histogram": (_observe, 100_000),
    "counting and folding 40 gaps of a stream": (_fold, 5 * STREAMS),
    "counting, folding and flushing 40 gaps of one stream": (_flush, 2_000),
    f"adding up {WORKERS} boards of {POOLS * MODELS} models": (_total, 20),
}


def shown(*, quick: bool = False) -> dict[str, Any]:
    """Measures, prints the table, and answers what is in it."""
    rounds, share = (1, 0.01) if quick else (5, 1.0)
    costs = [
        MetricsCost(step, round(best_ns(work, max(1, int(times * share)), rounds), 1))
        for step, (work, times) in STEPS.items()
    ]
    print_table("Metrics", ("step", "ns"), [(cost.step, f"{cost.ns:,.0f}") for cost in costs])
    return {"metrics": costs}
