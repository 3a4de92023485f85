"""What a worker holds of requests' bodies."""

from __future__ import annotations

from functools import partial

import trio
import trio.testing

from relay.net.budget import BodyBudget


def test_what_is_half_read_leaves_room_for_what_is_complete() -> None:
    budget = BodyBudget(800)
    assert budget.take_now(700, is_half_read=True)
    assert not budget.take_now(1, is_half_read=True)
    assert not budget.take_now(101)
    assert budget.take_now(60)
    assert budget.take_now(40, held=700)
    assert not budget.take_now(1)
    assert budget.used == 800


def test_what_is_alone_may_be_larger() -> None:
    budget = BodyBudget(800)
    assert budget.take_now(790, is_half_read=True)
    assert budget.take_now(50, held=790, is_half_read=True)
    assert not budget.take_now(1)
    budget.give_back(840)
    assert budget.take_now(1000)


async def test_who_waits_is_let_in_by_what_is_given_back(nursery: trio.Nursery) -> None:
    budget = BodyBudget(800)
    assert budget.take_now(800)
    nursery.start_soon(partial(budget.take, 100, is_half_read=True))
    nursery.start_soon(budget.take, 100)
    await trio.testing.wait_all_tasks_blocked()
    assert budget.used == 800
    budget.give_back(100)
    await trio.testing.wait_all_tasks_blocked()
    assert budget.used == 800  # the one that is complete
    budget.give_back(200)
    await trio.testing.wait_all_tasks_blocked()
    assert budget.used == 700
