"""Where the time of a command went: nothing is counted twice, and nothing is left out."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.console.account import Account, rate, told_shares
from sparsec.pipeline.base import Effect, PassRecord

STAGES = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


def played(account: Account, stages: list, names: count) -> None:
    for inner in stages:
        name = f"stage {next(names)}"
        account(name, 0, 1)
        played(account, inner, names)
        account(name, 1, 1)


@given(STAGES)
def test_every_outermost_stage_is_counted_once(stages: list) -> None:
    clock, told = count(), []
    account = Account(lambda *args: told.append(args), clock=lambda: float(next(clock)))
    played(account, stages, count())
    assert len(account.seconds) == len(stages)
    # Two calls a stage, the clock moves by one at each; an outermost stage of n inner ones lasts 2 n + 1.
    assert sum(account.seconds.values()) == len(told) - len(stages)


def record(name: str, spent: dict[str, float], index: int = 1) -> PassRecord:
    return PassRecord(index, name, name, Effect.LOSSY, sum(spent.values()), True, "", (), spent=spent)


@given(st.lists(st.tuples(st.sampled_from(["wanda", "round", "freeze"]), st.floats(0, 9), st.floats(0, 9))))
def test_kinds_of_work_add_up_to_the_stages(passes: list[tuple[str, float, float]]) -> None:
    account, records = Account(lambda *_: None), []
    account.seconds["writing"] = 1.0
    for i, (name, forward, rest) in enumerate(passes, 1):
        records.append(record(name, {} if name == "freeze" else {"forward": forward}, i))
        account.seconds[f"pass {i} {name}"] = forward + rest
    by_kind = account.by_kind(records)
    assert sum(by_kind.values()) == pytest.approx(1 + sum(f + r for _, f, r in passes))
    assert by_kind.get("forward", 0) == pytest.approx(sum(f for name, f, _ in passes if name != "freeze"))
    assert by_kind["writing"] == 1


def test_said_in_words() -> None:
    assert rate(3_556_000_000, 52.9) == "3,556 MB in 52.9 s, 67.2 MB/s"
    assert rate(0, 2.0) == "2.0 s"
    assert told_shares({"forward": 6.2, "pruning": 2.0, "fuse": 0.01}, 10.0) == "forward 62%, pruning 20%, rest 18%"
