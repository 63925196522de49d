"""Budgets end runs; phases stay apart."""

import pytest

from alignbench.errors import BudgetError
from alignbench.ledger import Budget, Ledger


def test_evaluation_costs_the_method_nothing() -> None:
    ledger = Ledger()
    with ledger.during("rollout"):
        ledger.count(nfe=5, flops=10.0, images=2)
        with ledger.during("evaluation"):
            ledger.count(nfe=100, flops=1000.0)
    with ledger.during("training"):
        ledger.count(nfe=7, backward=3, flops=4.0)
    row = ledger.row()
    assert (row["nfe"], row["backward"], row["flops"], row["images"]) == (12, 3, 14.0, 2)
    assert row["phases"]["evaluation"]["nfe"] == 100


def test_state_round_trip() -> None:
    ledger, restored = Ledger(), Ledger()
    with ledger.during("training"):
        ledger.count(nfe=7, flops=1.5)
    ledger.optimizer_steps = 4
    restored.load_state_dict(ledger.state_dict())
    assert restored.row() == ledger.row()


def test_counts_of_all_processes_add_up() -> None:
    ledger = Ledger()
    ledger.count(nfe=3, flops=2.0)
    row = ledger.row(lambda values: {name: 2 * value for name, value in values.items()})
    assert (row["nfe"], row["flops"]) == (6, 4.0)


def test_the_first_limit_ends_the_run() -> None:
    budget = Budget({"nfe": 100, "images": 10, "flops": None})
    assert budget.fraction({"nfe": 20, "images": 5, "flops": 1e20}) == 0.5
    with pytest.raises(BudgetError, match=r"budget.nfe is 0: it must be positive"):
        Budget({"nfe": 0})
    with pytest.raises(BudgetError, match="the run would never end"):
        Budget({"nfe": None})
