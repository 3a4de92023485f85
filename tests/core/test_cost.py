"""Money: exact in decimals, by the model's own prices."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.cost import Cost, PriceList, Prices
from relay.core.usage import Usage

PRICES = Prices(Decimal("0.10"), Decimal("0.02"), Decimal("0.40"))
CHEAP, DEAR, OWN = (Prices(Decimal(n), Decimal(n), Decimal(n)) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("usage", "prompt", "completion"),
    [
        (Usage(1_000_000, None, 1_000_000), "0.1", "0.4"),
        (Usage(1_000_000, 1_000_000, 0), "0.02", "0"),
        (Usage(10, 4, 3), "6.8E-7", "0.0000012"),
        (Usage(10, 400, 3), "2E-7", "0.0000012"),  # no engine can have cached more than there was
        (Usage(10, 0, None), "0.000001", "0"),  # cut before a token came
        (Usage(None, None, 3), "0", "0.0000012"),  # an estimate
    ],
)
def test_what_tokens_cost(usage: Usage, prompt: str, completion: str) -> None:
    cost = PRICES.cost(usage)
    assert cost == Cost(Decimal(prompt), Decimal(completion))
    assert cost.total == Decimal(prompt) + Decimal(completion)
    assert cost.members() == {
        "prompt_total_cost": Decimal(prompt),
        "completion_total_cost": Decimal(completion),
        "total_cost": cost.total,
    }


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=30))
def test_sums_are_exact(tokens: list[tuple[int, int]]) -> None:
    total = sum((PRICES.cost(Usage(prompt, 0, completion)).total for prompt, completion in tokens), Decimal(0))
    assert total * 10_000_000 == sum(prompt + 4 * completion for prompt, completion in tokens)


@pytest.mark.parametrize(
    ("model", "prices"),
    [
        ("qwen3", OWN),
        ("qwen3-32b", DEAR),
        ("qwen2", CHEAP),
        ("qwen\n2", CHEAP),
        ("Qwen2", None),
        ("my-qwen2", None),
        ("a+b", OWN),
        ("aab", None),  # a name is no regular expression
        ("x-mini-2", DEAR),
        ("", None),
        (None, None),
    ],
)
def test_a_models_prices(model: str | None, prices: Prices | None) -> None:
    found = PriceList({"qwen*": CHEAP, "qwen3": OWN, "qwen3-*": DEAR, "a+b": OWN, "*-mini-*": DEAR})
    assert found.of(model) is prices
    assert PriceList({}).of(model) is None
