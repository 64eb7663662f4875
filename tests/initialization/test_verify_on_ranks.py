"""What ranks tell each other after drawing: one collective, sums of the shards, or the first that differs."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_init import InitReport, Rule, initialize
from lightning_init.distributed.ranks import all_gather_object
from lightning_init.initialization.draw import Measured
from lightning_init.initialization.verify import agree
from tests.support.ranks import run_ranks

NAMES = ["a.weight", "a.bias", "b.weight"]


def sums() -> list[Measured]:
    rank = dist.get_rank()
    return agree(NAMES, [Measured(rank + 0.5, rank + 1, -7), Measured(), Measured(1.0, 2, 2**63 - 1, rank == 1)])


def test_agree_adds_up_what_ranks_hold() -> None:
    for measured in run_ranks(sums, 3):
        assert measured[0] == Measured(4.5, 6, -7)
        assert measured[1] == Measured()
        assert measured[2] == Measured(3.0, 6, 2**63 - 1, True)


def counts(number: int) -> tuple[list[Measured], int]:
    calls = []
    original = dist.all_gather_object
    dist.all_gather_object = lambda *args: (calls.append(1), original(*args))
    measured = [Measured(float(i), 1, i) for i in range(number)]
    return agree([f"p{i}" for i in range(number)], measured), len(calls)


@pytest.mark.parametrize("number", [1, 2000])
def test_agree_needs_one_collective(number: int) -> None:
    for totals, calls in run_ranks(counts, 2, number):
        assert calls == 1
        assert totals == [Measured(2.0 * i, 2, i) for i in range(number)]


def disagree(checksums: list[list[int]]) -> str:
    mine = checksums[dist.get_rank()]
    try:
        agree(NAMES, [Measured(1.0, 1, checksum) for checksum in mine])
    except RuntimeError as error:
        return str(error)
    return "agreed"


def test_agree_names_the_first_difference_on_every_rank() -> None:
    expected = (
        "parameter 'a.bias' was drawn differently on rank 1, 2 than on rank 0: "
        "all ranks need the same seed, scheme, rules and model"
    )
    assert run_ranks(disagree, 3, [[1, 2, 3], [1, 5, 4], [1, 6, 3]]) == [expected] * 3


def other_names(names: list[list[str]]) -> str:
    mine = names[dist.get_rank()]
    try:
        agree(mine, [Measured() for _ in mine])
    except RuntimeError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ([["a", "b"], ["a", "b", "c"]], "c"),
        ([["a", "b"], ["a"]], "b"),
        ([["a", "b", "c"], ["a", "c", "b"]], "c"),
        ([["a"], []], "a"),
    ],
)
def test_agree_names_other_parameters_on_every_rank(names: list[list[str]], first: str) -> None:
    expected = f"rank 1 has other parameters than rank 0; the first that differs: {first!r}"
    assert run_ranks(other_names, 2, names) == [expected] * 2


def answers() -> list[object]:
    return all_gather_object({"rank": dist.get_rank()})


def test_all_gather_object_keeps_rank_order() -> None:
    assert run_ranks(answers, 3) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def report_of_copies(scheme: str) -> InitReport:
    torch.manual_seed(dist.get_rank())
    return initialize(nn.Sequential(nn.Linear(30, 20), nn.LSTM(20, 7)), scheme, seed=5)


@pytest.mark.parametrize("scheme", ["he_normal", "orthogonal"])
def test_report_of_replicas_is_that_of_one(scheme: str) -> None:
    """The same values on every rank are no further proof: std and tolerance stay those of one copy."""
    expected = initialize(nn.Sequential(nn.Linear(30, 20), nn.LSTM(20, 7)), scheme, seed=5)
    for report in run_ranks(report_of_copies, 3, scheme):
        for entry, alone in zip(report.entries, expected.entries, strict=True):
            assert entry.measured_std == pytest.approx(alone.measured_std, rel=1e-12)
            assert (entry.target_std, entry.tolerance) == (alone.target_std, alone.tolerance)


def differ(by: str) -> str:
    rank = dist.get_rank()
    options: dict[str, object] = {
        "seed": {"seed": rank},
        "scheme": {"scheme": ["he_normal", "xavier_normal"][rank]},
        "rules": {"rules": [Rule("1.weight", ["zeros", "ones"][rank])]},
    }[by]
    try:
        initialize(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), **options)
    except RuntimeError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(("by", "first"), [("seed", "0.weight"), ("scheme", "0.weight"), ("rules", "1.weight")])
def test_ranks_asked_for_different_weights_raise(by: str, first: str) -> None:
    for message in run_ranks(differ, 2, by):
        assert message.startswith(f"parameter '{first}' was drawn differently on rank 1 than on rank 0")


def error_for(model: nn.Module) -> str:
    """What this rank raises."""
    try:
        initialize(model)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_on_rank_1() -> str:
    return error_for(nn.Linear(4, 4) if dist.get_rank() == 0 else nn.Linear(4, 4, device="meta"))


def test_failed_rank_is_named_by_the_others() -> None:
    """The rank that failed raises its own error, the others say which rank it was and why."""
    others, own = run_ranks(fail_on_rank_1, 2, timeout=60)
    assert own.startswith("ValueError: 2 parameters are on the meta device")
    assert others.startswith("RuntimeError: rank 1 could not initialise the model: ValueError: 2 parameters are on")


class Refusing(dict[str, int]):
    """Somebody's dictionary that does not say what it holds."""

    def items(self) -> NoReturn:
        raise ArithmeticError("not now")


def fail_to_find_copies_on_rank_1() -> str:
    model = nn.Linear(4, 4)
    if dist.get_rank() == 1:
        model.held = Refusing()
    return error_for(model)


def test_rank_that_cannot_look_for_copies_is_named_by_the_others() -> None:
    """Nobody waits for it."""
    others, own = run_ranks(fail_to_find_copies_on_rank_1, 2, timeout=60)
    assert own == "ArithmeticError: not now"
    assert others == "RuntimeError: rank 1 could not initialise the model: ArithmeticError: not now"
