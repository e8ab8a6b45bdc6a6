"""What each of several processes runs in the tests of ranks: `python ranks_cases.py CASE RANK COUNT PORT FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from architectures import VOCABULARY, tiny_model

import sparsec
from sparsec.errors import RanksError
from sparsec.ir.tracer import trace
from sparsec.pipeline import Context, Pipeline
from sparsec.ranks import together
from sparsec.recover.sharded import ShardedWhole
from sparsec.recover.stretches import Stretches
from sparsec.recover.student import trained_names

TOKENS = torch.randint(3, VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(0))


def compiled(name: str, passes: str, tokens: torch.Tensor = TOKENS, **options: Any) -> Any:
    """A tiny model of an architecture, calibrated in calls of two sequences."""
    from sparsec.calibrate import data

    data._TOKENS_PER_CALL = 24
    return sparsec.compile(tiny_model(name)[0], passes, calibration=tokens, **options)


def outcome(model: Any) -> dict[str, Any]:
    """All that passes left: masks, weights, what was recorded and noted."""
    weights = model.sparsec.graph.weights
    return {
        "masks": {w.name: w.mask for w in weights.values() if w.mask is not None},
        "tensors": {name: model.sparsec.graph.tensor(name) for name in weights},
        "errors": {w.name: w.pruned.error for w in weights.values() if w.pruned is not None},
        "notes": [note for record in model.sparsec.records for note in record.notes],
    }


def passes(rank: int, folder: Path) -> None:
    """Every pipeline of the file that the test wrote."""
    for number, (name, spec) in enumerate(torch.load(folder / "specs.pt")):
        torch.save(outcome(compiled(name, spec)), folder / f"{number}-{rank}.pt")


def recovered(rank: int, folder: Path) -> None:
    """Trainings of the file that the test wrote, each with a checkpoint of its own."""
    for number, (name, spec) in enumerate(torch.load(folder / "specs.pt")):
        for again in range(2 if "checkpoint" in spec else 1):
            model = compiled(name, spec.replace("CHECKPOINT", f"{folder}/state-{number}"))
            (told,) = (r for r in model.sparsec.records if r.training is not None)
            facts = {"summary": told.summary, "steps": told.training.steps, "tokens": told.training.tokens}
            torch.save(outcome(model) | facts, folder / f"{number}-{again}-{rank}.pt")


def shares(rank: int, folder: Path) -> None:
    """A share of every weight is where it is trained; all of it is what its stretch computes with, and what is written."""
    graph = trace(tiny_model("llama")[0])
    Pipeline.parse("magnitude(0.5),freeze").run(graph, Context(owns_weights=True))
    stretches, names = Stretches(graph), trained_names(graph, "distill")
    before = {name: graph.tensor(name).detach().clone() for name in names}
    with together() as ranks:
        student = ShardedWhole(graph, names, ranks, stretches)
        everywhere = ranks.told({name: leaf.numel() for name, leaf in student.leaves.items()})
        for name in names:
            assert sum(each[name] for each in everywhere) == before[name].numel(), name
            rows = before[name].shape[0]
            assert all(each[name] <= -(-rows // ranks.count) * (before[name].numel() // rows) for each in everywhere)
        with torch.no_grad():
            for leaf in student.leaves.values():
                leaf.mul_(2)
        seen: dict[str, torch.Tensor] = {}

        def run(start: int) -> Callable[[Any], Any]:
            def inner(values: Any) -> Any:
                for name in (n for n, (part, _) in student._home.items() if part is student._parts[start]):
                    seen[name] = student.read(name).detach().clone()
                return values

            return inner

        for start in student._parts:
            student.run(start, {}, run(start))
        assert seen.keys() == before.keys()
        assert all(torch.equal(seen[name], 2 * before[name]) for name in names)
        kept = student.kept()
        with torch.no_grad():
            for leaf in student.leaves.values():
                leaf.zero_()
        student.restore(kept)
        student.settle(Context(owns_weights=True))
        assert all(torch.equal(graph.tensor(name), 2 * before[name]) for name in names)
    (folder / f"{rank}.txt").write_text("done")


def other_text(rank: int, folder: Path) -> None:
    """Ranks that were given different things are told which, and with which rank."""
    given = {"text": TOKENS.flip(1) if rank == 1 else TOKENS, "passes": TOKENS}
    for what, tokens in given.items():
        share = 0.4 if what == "passes" and rank == 1 else 0.5
        try:
            compiled("llama", f"wanda({share})", tokens)
        except RanksError as error:
            (folder / f"{what}-{rank}.txt").write_text(str(error))


def failing(rank: int, folder: Path) -> None:
    """One fails in the middle; what it said is said by all."""
    try:
        with together() as ranks:
            list(ranks.each([1, 1, 1], lambda job: 1 // (1 - (job == 1))))
            ranks.told(None)
    except (RanksError, ZeroDivisionError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def by_itself(rank: int, folder: Path) -> None:
    """What one rank does alone waits for nobody."""
    if rank == 0:
        with sparsec.ranks.by_itself():
            compiled("llama", "wanda(0.5)")
    assert not compiled("llama", "magnitude(0.5)").sparsec.graph.weights["lm_head.weight"].mask
    (folder / f"{rank}.txt").write_text("done")


def sums(rank: int, folder: Path) -> None:
    """Sums, jobs and sayings, without a model."""
    with together() as ranks:
        assert (ranks.number, ranks.count, ranks.alone) == (rank, dist.get_world_size(), False)
        with together() as inner:
            assert inner is ranks
        count = ranks.count
        turned = torch.full((3, 5), float(rank + 1)).t()
        whole = torch.full((4,), rank + 1, dtype=torch.float64)
        total = count * (count + 1) / 2
        ranks.add_up([(turned, count - 1), (whole, 0)])
        assert rank != count - 1 or bool((turned == total).all())
        assert rank or bool((whole == total).all())
        assert ranks.told({"rank": rank}) == [{"rank": r} for r in range(count)]
        made = [torch.rand(3, 7) > 0.5, torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 3), torch.tensor(3.0)]
        torch.manual_seed(0)
        results = list(ranks.each([5, 1, 9, 2, 2], lambda job: (job, {"tensors": [made[job % 4], rank]})))
        assert [job for job, _ in results] == list(range(5))
        owners = [result["tensors"][1] for _, result in results]
        assert owners == sparsec.ranks.share_out([5, 1, 9, 2, 2], count)
        for job, result in results:
            found = result["tensors"][0]
            assert found.dtype == made[job % 4].dtype
            assert found.shape == made[job % 4].shape
            everywhere = ranks.told(found.tolist())
            assert all(each == everywhere[0] for each in everywhere)
    (folder / f"{rank}.txt").write_text("done")


def sharded_ends(rank: int, folder: Path) -> None:
    """One ends itself in a stretch that all compute together."""
    plain, calls = ShardedWhole.run, list[int]()

    def ending(self: ShardedWhole, *given: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given)

    ShardedWhole.run = ending  # type: ignore[method-assign]
    try:
        compiled("llama", "magnitude(0.5),freeze,recover(steps=30, batch=3, shard=True)")
    except RanksError as error:
        (folder / f"{rank}.txt").write_text(str(error))


CASES: dict[str, Callable[[int, Path], None]] = {
    each.__name__: each for each in (passes, recovered, shares, sharded_ends, other_text, failing, by_itself, sums)
}

if __name__ == "__main__":
    case, rank, count, port, folder = sys.argv[1:]
    os.environ["SPARSEC_CALIBRATION"] = str(Path(__file__).parent / "calibration.json")
    torch.set_num_threads(1)
    if int(count) > 1:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=int(rank), world_size=int(count))
    CASES[case](int(rank), Path(folder))
