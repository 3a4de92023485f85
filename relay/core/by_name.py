"""What is configured by name, of models and of keys: under the name itself, or a pattern in which ``*`` is any text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ByName(Generic[T]):
    """Looks up what is configured for a name: that itself comes first, then the first pattern that fits."""

    def __init__(self, items: Iterable[tuple[str, T]]) -> None:
        self._by_name: dict[str, T] = {}
        self._by_pattern: list[tuple[re.Pattern[str], T]] = []
        for name, item in items:
            if "*" in name:
                self._by_pattern.append((_compiled(name), item))
            else:
                self._by_name[name] = item

    @classmethod
    def longest_first(cls, items: Mapping[str, T]) -> Self:
        """With the longest pattern that fits, and of two the first in the alphabet."""
        return cls((name, items[name]) for name in sorted(items, key=lambda name: (-len(name), name)))

    def __repr__(self) -> str:
        return f"<ByName names={len(self._by_name)} patterns={len(self._by_pattern)}>"

    def get(self, name: str) -> T | None:
        """What is configured for a name; None: nothing."""
        named = self._by_name.get(name)
        if named is not None:
            return named
        for pattern, item in self._by_pattern:
            if pattern.fullmatch(name):
                return item
        return None


def _compiled(glob: str) -> re.Pattern[str]:
    """The pattern of a glob with at least one star.

    Names come from clients, so each piece between two stars is sought once only, behind the piece before it: where that
    fails, no later place for an earlier one would help. With a plain ``.*`` each such piece costs another power of the
    name's length.
    """
    first, *middle, last = map(re.escape, glob.split("*"))
    between = "".join(f"(?>.*?{piece})" for piece in middle)
    return re.compile(f"{first}{between}.*{last}", re.DOTALL)
