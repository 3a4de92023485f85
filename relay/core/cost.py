"""What an exchange costs, by prices per million tokens of the model that was asked for.

Money is decimal. A price is taken as it is written in the configuration, a count is whole, and the product is exact;
sums of them are, as long as they are made of decimals.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple

from relay.core.by_name import ByName
from relay.core.usage import Usage

if TYPE_CHECKING:
    from relay.core.board import Counter

_MILLION: Final = Decimal(1_000_000)


class Prices(NamedTuple):
    """Of one model, for a million tokens each."""

    prompt: Decimal
    cached_prompt: Decimal  #: for those of the prompt that came from the engine's prefix cache
    completion: Decimal

    def cost(self, usage: Usage) -> Cost:
        """What the tokens cost; those that the engine did not tell of are not charged."""
        prompt = usage.prompt_tokens or 0
        cached = min(usage.cached_tokens or 0, prompt)
        return Cost(
            ((prompt - cached) * self.prompt + cached * self.cached_prompt) / _MILLION,
            (usage.completion_tokens or 0) * self.completion / _MILLION,
        )


class Cost(NamedTuple):
    """What one exchange costs, in the prices' currency."""

    prompt: Decimal
    completion: Decimal

    @property
    def total(self) -> Decimal:
        """Both parts."""
        return self.prompt + self.completion

    def members(self) -> dict[str, Decimal]:
        """What `relay.core.rewrite.add_cost` puts into a usage object."""
        return {
            "prompt_total_cost": self.prompt,
            "completion_total_cost": self.completion,
            "total_cost": self.total,
        }


class Sum:
    """Money added up: exact here, while the counter that shows it has the nearest float."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._exact = Decimal(0)
        self._shown = 0.0

    def __repr__(self) -> str:
        return f"<Sum {self._exact}>"

    def add(self, amount: Decimal) -> None:
        """Counts `amount` more."""
        self._exact += amount
        gained = float(self._exact) - self._shown
        self._shown += gained
        self._counter.add(gained)


class PriceList:
    """Prices by model: the name itself, else the longest pattern that fits, where ``*`` is any text."""

    def __init__(self, prices: Mapping[str, Prices]) -> None:
        self._by_model = ByName.longest_first(prices)

    def __repr__(self) -> str:
        return f"<PriceList {self._by_model!r}>"

    def of(self, model: str | None) -> Prices | None:
        """A model's prices; None where it has none."""
        return None if model is None else self._by_model.get(model)
