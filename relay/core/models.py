"""What is configured by model: under its own name, or under a pattern in which ``*`` is any text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByModel(Generic[T]):
    """Looks up what is configured for a model: its own name comes first, then the first pattern that fits."""

    def __init__(self, items: Iterable[tuple[str, T]]) -> None:
        self._by_name: dict[str, T] = {}
        self._by_pattern: list[tuple[re.Pattern[str], T]] = []
        for name, item in items:
            if "*" in name:
                self._by_pattern.append((_compiled(name), item))
            else:
                self._by_name[name] = item

    def __repr__(self) -> str:
        return f"<ByModel names={len(self._by_name)} patterns={len(self._by_pattern)}>"

    def get(self, model: str) -> T | None:
        """What is configured for a model; None: nothing."""
        named = self._by_name.get(model)
        if named is not None:
            return named
        return next((item for pattern, item in self._by_pattern if pattern.fullmatch(model)), None)


def _compiled(glob: str) -> re.Pattern[str]:
    """The pattern of a glob with at least one star.

    Names come from clients, so each piece between two stars is sought once only, behind the piece before it: where that
    fails, no later place for an earlier one would help. With a plain ``.*`` each such piece costs another power of the
    name's length.
    """
    first, *middle, last = map(re.escape, glob.split("*"))
    between = "".join(f"(?>.*?{piece})" for piece in middle)
    return re.compile(f"{first}{between}.*{last}", re.DOTALL)
