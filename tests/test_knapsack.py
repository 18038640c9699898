"""The multiple-choice knapsack against trying everything, and what its bound is worth."""

import itertools
import random

import pytest

from svdq_compile import knapsack
from svdq_compile.knapsack import least_cost, solve


def instance(seed: int, groups: int, options: int) -> list[list[tuple[float, float]]]:
    """Whole costs, which may be equal, and any losses."""
    r = random.Random(seed)
    return [
        [(r.randint(0, 20), r.choice((0.0, r.random(), r.random() ** 4))) for _ in range(r.randint(1, options))]
        for _ in range(groups)
    ]


def layers(seed: int, count: int) -> list[list[tuple[float, float]]]:
    """As of linears: a few forms of each, whose bytes go with its size, and the more bytes the less is lost."""
    r = random.Random(seed)
    found = []
    for _ in range(count):
        size, matters = r.randint(10**5, 10**8), r.random() ** 4
        found.append([(int(size * b), matters * e) for b, e in ((0.5, 1), (0.52, 0.8), (0.56, 0.6), (1, 1e-2), (2, 0))])
    return found


def least_loss(groups: list[list[tuple[float, float]]], limit: float) -> float | None:
    """By trying everything."""
    losses = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*groups)
        if sum(cost for cost, _ in choice) <= limit
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(200))
def test_no_choice_is_better(seed: int) -> None:
    groups = instance(seed, seed % 6 + 1, 5)
    for limit in {least_cost(groups) - 1, least_cost(groups), least_cost(groups) + 5, 10 * seed % 70, 1000}:
        found, best = solve(groups, limit), least_loss(groups, limit)
        if best is None:
            assert found is None
            continue
        assert found is not None
        chosen = [options[pick] for options, pick in zip(groups, found.picks, strict=True)]
        assert found.cost == sum(cost for cost, _ in chosen) <= limit
        assert found.loss == pytest.approx(best, abs=1e-12)
        assert found.loss == pytest.approx(sum(loss for _, loss in chosen), abs=1e-12)
        assert found.bound <= best + 1e-12


def test_losses_as_limit() -> None:
    """As for target_error: the limit is of fractions, whose sums depend on the order."""
    groups = [[(loss, cost) for cost, loss in options] for options in instance(1, 6, 4)]
    for limit in (least_cost(groups), 0.5, 1.0, 2.0):
        found, best = solve(groups, limit), least_loss(groups, limit * (1 + 1e-12))
        assert (found and found.loss) == best


def test_of_many_layers_the_bound_is_near() -> None:
    groups = layers(0, 300)
    found = solve(groups, 0.7 * sum(options[3][0] for options in groups))
    assert found is not None
    assert found.bound <= found.loss <= 1.005 * found.bound


def test_where_sums_are_left_out_it_is_a_choice_still(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = layers(3, 60)
    limit = 0.7 * sum(options[3][0] for options in groups)
    best = solve(groups, limit)
    monkeypatch.setattr(knapsack, "MAX_SUMS", 2)
    found = solve(groups, limit)
    assert best is not None
    assert found is not None
    assert found.cost <= limit
    assert best.loss <= found.loss <= 1.2 * best.loss
    assert found.bound == best.bound


def test_bound_of_a_mixture() -> None:
    """Half of the step from (0, 4) to (4, 0) fits; an option above that line changes nothing."""
    found = solve([[(0, 4), (2, 3), (4, 0)]], 2)
    assert found is not None
    assert (found.picks, found.loss, found.bound) == ((1,), 3, pytest.approx(2))


def test_nothing_to_choose() -> None:
    found = solve([], 5)
    assert found is not None
    assert (found.picks, found.cost, found.loss, found.bound) == ((), 0, 0, 0)
