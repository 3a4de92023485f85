"""The values of the metrics, in a block of memory that one process writes and any number of others read, without locks.

Each worker counts into a block of its own and a scrape adds all blocks up, so a worker that dies takes nothing with it,
and its successor goes on counting in the same block. The usual way of the Prometheus libraries, a file per process, is
the same idea with system calls; here it is memory that is passed in, so that it can be an anonymous shared mapping.

    word 0   `_MAGIC`, which names the layout
    word 1   bytes in use, these 16 included
    then     entries, only ever appended:
             word   CRC-32 of the key << 32 | length of the key << 16 | number of cells
             key    the JSON array [name, label values…], padded to 8 bytes
             cells  float64 each: one, or a histogram's counts by bound and its sum

A word and a cell are aligned, and CPython stores either by one 8-byte move, so a reader finds the old value or the new
one. An entry is written before word 1 tells of it. x86 shows stores in that order to everybody; ARM promises that only
behind a barrier, which Python does not have, so an entry also carries a sum of its key, and a reader stops at one that
does not match: the next scrape finds it. All cells are float64, as they are in Prometheus: counts are exact to 2**53.

What is open: a histogram's cells are read one after the other while the writer may be between two of them, so for one
scrape its sum can be one value behind its counts. And what was folded into a histogram but not flushed dies with its
writer: the gaps of the last second, where the caller flushes every second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar
from zlib import crc32

import msgspec

from relay.core import histogram, metrics
from relay.core.metrics import CounterFamily, Family, GaugeFamily, HistogramFamily

if TYPE_CHECKING:
    from mmap import mmap

    Block = bytearray | memoryview | mmap

#: A family's name and the values of its labels.
Key = tuple[str, ...]

#: Enough for 100 models in each of three pools (a kilobyte each), 1,500 upstreams (as much) and 500 keys (half of it);
#: pages not used cost nothing.
BOARD_BYTES: Final = 1 << 21
#: Models are what clients write into requests. Beyond so many different ones, and for longer names, `metrics.OTHER`
#: stands: first come, first counted.
MOST_MODELS: Final = 100
#: Keys are an operator's, but there may be one for each employee. Each is up to nine series.
MOST_KEYS: Final = 500
MOST_NAME_CHARACTERS: Final = 128

#: Labels whose values are bounded in number.
_MOST: Final = {"model": MOST_MODELS, "key": MOST_KEYS}

_MAGIC: Final = int.from_bytes(b"relay\0\0\1", "big")
_MAGIC_WORD, _USED_WORD, _FIRST_WORD = range(3)
_WORD: Final = 8
_LONGEST_KEY: Final = 0xFFFF

_encode_key = msgspec.json.Encoder().encode
_decode_key = msgspec.json.Decoder(Key).decode

_Series = TypeVar("_Series")


class Counter:
    """One series of a counter."""

    __slots__ = ("_at", "_cells")

    def __init__(self, cells: memoryview[float], at: int) -> None:
        self._cells = cells
        self._at = at

    def add(self, amount: float = 1.0) -> None:
        """Counts `amount` more."""
        self._cells[self._at] += amount


class Gauge(Counter):
    """One series of a gauge; `add` goes both ways."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Says what it is now."""
        self._cells[self._at] = value

    def clear(self) -> None:
        """Is shown no more, as its subject is gone. `Board.gauge` gives it anew, at 0."""
        self.set(math.nan)


class Buckets:
    """One series of a histogram, as Prometheus has them."""

    __slots__ = ("_at", "_bounds", "_cells", "_pending")

    def __init__(self, cells: memoryview[float], at: int, bounds: tuple[float, ...]) -> None:
        self._cells = cells
        self._at = at
        self._bounds = bounds
        self._pending: dict[int, int] = {}  # gaps, by bucket of their histograms

    def observe(self, seconds: float) -> None:
        """Counts one value."""
        self._cells[self._at + bisect_left(self._bounds, seconds)] += 1.0
        self._cells[self._at + len(self._bounds) + 1] += seconds

    def fold(self, gaps: histogram.Histogram) -> None:
        """Takes over what `gaps` has counted since the last fold.

        The values are in the board after `flush`. Whether a value is below a bound is known within the 6.25 % of
        `gaps`.
        """
        histogram.add_to(self._pending, gaps.take())

    def flush(self) -> None:
        """Puts into the board what has been folded in."""
        if not self._pending:
            return
        total, places = 0.0, _places(self._bounds)
        for index, number in self._pending.items():
            self._cells[self._at + places[index]] += number
            total += number * _MIDDLES[index]
        self._pending.clear()
        self._cells[self._at + len(self._bounds) + 1] += total


#: What a value in each bucket of `histogram.Histogram` is taken for, in seconds.
_MIDDLES: Final = tuple(histogram.middle(index) / 1e9 for index in range(histogram.BUCKETS))


@cache
def _places(bounds: tuple[float, ...]) -> tuple[int, ...]:
    """For each of `_MIDDLES` the index of its bound."""
    return tuple(bisect_left(bounds, middle) for middle in _MIDDLES)


class Board:
    """The writer of a block. Where a block was written before, its counts go on and its gauges are gone.

    `block` is writable, of zeros at first, begins at a multiple of 8 bytes and stays where it is. A series that finds
    the block full is counted (`metrics.METRICS_DROPPED`) and what is added to it leads nowhere. Hold on to a series
    that is used often: finding it costs more than counting.
    """

    def __init__(self, block: Block) -> None:
        self._bytes = _whole_words(block)
        self._words = self._bytes.cast("Q")
        self._cells = self._bytes.cast("d")
        self._nowhere = memoryview(bytearray(_WORD * max(family.cells for family in metrics.FAMILIES))).cast("d")
        self._counters: dict[Key, Counter] = {}
        self._gauges: dict[Key, Gauge] = {}
        self._histograms: dict[Key, Buckets] = {}
        retire(block)
        self._places = {key: at for key, at, _ in _entries(self._bytes)}
        self._names = {
            label: {key[at] for key in self._places if (at := _label_at(key[0], label)) is not None} for label in _MOST
        }
        if self._words[_MAGIC_WORD] != _MAGIC:
            self._words[_USED_WORD] = _FIRST_WORD * _WORD
            self._words[_MAGIC_WORD] = _MAGIC
        for family in metrics.FAMILIES:
            if not family.labels and self._place((family.name,), family.cells) is None:
                raise ValueError(f"a board of {len(self._bytes)} bytes is too small for its fixed metrics")
        self._dropped = self.counter(metrics.METRICS_DROPPED)

    def __repr__(self) -> str:
        return f"<Board series={len(self._places)} bytes={self._words[_USED_WORD]}/{len(self._bytes)}>"

    def counter(self, family: CounterFamily, *labels: str) -> Counter:
        """The series of `family` with these values, in the order of its labels."""
        try:
            return self._counters[(family.name, *labels)]
        except KeyError:
            return self._find(self._counters, family, labels, Counter)

    def gauge(self, family: GaugeFamily, *labels: str) -> Gauge:
        """The series of `family` with these values; at 0 if it is new or was cleared."""
        gauge = self._gauges.get((family.name, *labels)) or self._find(self._gauges, family, labels, Gauge)
        if math.isnan(gauge._cells[gauge._at]):
            gauge.set(0.0)
        return gauge

    def histogram(self, family: HistogramFamily, *labels: str) -> Buckets:
        """The series of `family` with these values, in the order of its labels."""
        try:
            return self._histograms[(family.name, *labels)]
        except KeyError:
            return self._find(self._histograms, family, labels, lambda cells, at: Buckets(cells, at, family.bounds))

    def flush(self) -> None:
        """Puts into the block what the histograms hold back; call before a scrape, or every second."""
        for series in self._histograms.values():
            series.flush()

    def _find(
        self,
        known: dict[Key, _Series],
        family: Family,
        labels: tuple[str, ...],
        make: Callable[[memoryview[float], int], _Series],
    ) -> _Series:
        if len(labels) != len(family.labels):
            raise TypeError(f"{family.name} has the labels {family.labels}, not {len(labels)} values")
        key = (family.name, *self._bounded(family, labels))
        if key not in known:
            at = self._place(key, family.cells)
            if at is None:
                self._dropped.add()
                return make(self._nowhere, 0)
            known[key] = make(self._cells, at)
        return known[key]

    def _bounded(self, family: Family, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The values with a model or key that is one too many replaced."""
        for label, most in _MOST.items():
            if label in family.labels:
                at, known = family.labels.index(label), self._names[label]
                name = labels[at]
                if name not in known:
                    if len(known) >= most or len(name) > MOST_NAME_CHARACTERS:
                        return (*labels[:at], metrics.OTHER, *labels[at + 1 :])
                    known.add(name)
        return labels

    def _place(self, key: Key, cells: int) -> int | None:
        """The index of a series' first cell, in a new entry if there is none; None if that has no room."""
        if key in self._places:
            return self._places[key]
        text = _encode_key(key)
        entry = self._words[_USED_WORD]
        first = entry + _WORD + _padded(len(text))
        end = first + _WORD * cells
        if end > len(self._bytes) or len(text) > _LONGEST_KEY:
            return None
        self._bytes[entry + _WORD : entry + _WORD + len(text)] = text
        for cell in range(first // _WORD, end // _WORD):
            self._cells[cell] = 0.0  # a writer that died just here may have left something
        self._words[entry // _WORD] = crc32(text) << 32 | len(text) << 16 | cells
        self._words[_USED_WORD] = end
        self._places[key] = first // _WORD
        return first // _WORD


def retire(block: Block) -> None:
    """Clears the gauges of a writer that is gone: nothing is in flight there any more. Its counts stay."""
    view = _whole_words(block)
    values = view.cast("d")
    for key, at, _ in _entries(view):
        if isinstance(_FAMILY.get(key[0]), GaugeFamily):
            values[at] = math.nan


def read(block: Block) -> dict[Key, list[float]]:
    """All series of a block, each with its cells; none of a block that nobody has written yet."""
    view = _whole_words(block)
    values = view.cast("d")
    found = ((key, [*values[at : at + cells]]) for key, at, cells in _entries(view))
    return {key: cells for key, cells in found if not math.isnan(cells[0])}


def total(blocks: Iterable[Block]) -> dict[Key, list[float]]:
    """All series of all blocks: added up, or the greatest where the family says so."""
    totals: dict[Key, list[float]] = {}
    for block in blocks:
        for key, cells in read(block).items():
            others = totals.get(key)
            if others is not None:
                family = _FAMILY.get(key[0])
                both = zip(others, cells, strict=True)
                cells = [*map(max if isinstance(family, GaugeFamily) and family.is_max else sum, both)]
            totals[key] = cells
    return totals


_FAMILY: Final = {family.name: family for family in metrics.FAMILIES}


def _label_at(name: str, label: str) -> int | None:
    """Where in the keys of a family a label's value stands, if it has the label."""
    family = _FAMILY.get(name)
    return 1 + family.labels.index(label) if family and label in family.labels else None


def _entries(view: memoryview[int]) -> Iterator[tuple[Key, int, int]]:
    """Of each entry its key, the index of its first cell, and how many those are."""
    words = view.cast("Q")
    if words[_MAGIC_WORD] != _MAGIC:
        return
    entry, used = _FIRST_WORD * _WORD, words[_USED_WORD]
    while entry < used:
        head = words[entry // _WORD]
        length, cells = head >> 16 & 0xFFFF, head & 0xFFFF
        text = bytes(view[entry + _WORD : entry + _WORD + length])
        if not length or crc32(text) != head >> 32:
            return
        first = entry + _WORD + _padded(length)
        yield _decode_key(text), first // _WORD, cells
        entry = first + _WORD * cells


def _whole_words(block: Block) -> memoryview[int]:
    view = memoryview(block)
    return view[: len(view) - len(view) % _WORD]


def _padded(length: int) -> int:
    """`length` rounded up to whole words."""
    return -(-length // _WORD) * _WORD
