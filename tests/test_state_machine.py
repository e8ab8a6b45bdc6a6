"""Any sequence of passes: a legal one runs and agrees with the dense twin; an illegal one is refused and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pass_cases import EXAMPLES, last
from traces import traced as trace

from sparsec.calibrate import CalibrationData
from sparsec.errors import PipelineError
from sparsec.ir.verifier import problems, snapshot
from sparsec.passes import ADMM, Freeze, Lower, Magnitude, Mask, SparseGPT, Wanda, Zeros
from sparsec.patterns import prune_count
from sparsec.pipeline import Context, Effect, Pass, Pipeline
from sparsec.testing import ModelCase, assert_untouched, masks, small_models, state_of


class PassSequences(RuleBasedStateMachine):
    """A graph under passes, and beside it a plain dense model in which every pruned weight is set to zero by hand."""

    @initialize(case=small_models())
    def start(self, case: ModelCase) -> None:
        self.case = case
        self.untouched = state_of(case.model)
        self.graph = trace(case.model, case.inputs)
        calls = CalibrationData((tuple(self.graph.bind(case.inputs, {})),), "the inputs")
        name = next(n for n, w in case.model.named_parameters() if w.dim() == 2)
        ones = torch.ones(case.model.get_parameter(name).shape, dtype=torch.bool)
        self.context = Context(probe=case.inputs, calibration=calls, masks={name: ones})
        self.twin = copy.deepcopy(case.model)
        self.pruned: dict[str, torch.Tensor] = {}  # weight -> what is zero
        self.facts: set[str] = set()

    def apply(self, p: Pass) -> bool:
        """Runs a pass where it is legal by its own words, else sees it refused."""
        if p.requires <= self.facts and not p.excludes & self.facts:
            Pipeline((p,)).run(self.graph, self.context, verify="probe")
            self.facts = (self.facts - p.invalidates) | p.produces
            assert self.graph.facts == self.facts
            return True
        before = snapshot(self.graph)
        with pytest.raises(PipelineError, match=f"pass 1 '{p.name}'"):
            Pipeline((p,)).run(self.graph, self.context)
        assert snapshot(self.graph) == before
        return False

    def prune_twin(self) -> None:
        """Takes the graph's new masks over; they only ever take away."""
        parameters = dict(self.twin.named_parameters())
        for weight in self.graph.masked():
            zero = ~weight.mask
            old = self.pruned.get(weight.name, torch.zeros_like(zero))
            assert not (old & ~zero).any()
            self.pruned[weight.name] = zero
            parameters[weight.name].data.masked_fill_(zero, 0)

    def take_over(self) -> None:
        """The same with weights that a pass has also changed, such as SparseGPT."""
        parameters = dict(self.twin.named_parameters())
        for weight in self.graph.masked():
            parameters[weight.name].data.copy_(self.graph.tensor(weight.name).detach())
        self.prune_twin()

    @rule(share=st.sampled_from([0.0, 0.3, 0.5]), p=st.sampled_from([Wanda, SparseGPT, ADMM]))
    def calibrated(self, share: float, p: type[Wanda | SparseGPT | ADMM]) -> None:
        if self.apply(p(share)):
            self.take_over()

    @rule(share=st.sampled_from([0.0, 0.2, 0.5, 0.9]), scope=st.sampled_from(["global", "layer", "row"]))
    def magnitude(self, share: float, scope: str) -> None:
        if self.apply(Magnitude(share, scope=scope)):
            self.prune_twin()
            zeros = [~mask for w in self.graph.masked() if (mask := self.graph.mask_matrix(w.name)) is not None]
            pools = {"global": [torch.cat([z.flatten() for z in zeros])], "layer": zeros}
            for pool in pools.get(scope, [row for z in zeros for row in z]):
                assert int(pool.sum()) >= prune_count(share, pool.numel())

    @rule()
    def zeros(self) -> None:
        if self.apply(Zeros()):
            self.prune_twin()

    @rule(data=st.data())
    def mask(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n, w in self.case.model.named_parameters() if w.dim() == 2]))
        shape = self.case.model.get_parameter(name).shape
        self.context.masks = {name: data.draw(masks(*shape))}
        if self.apply(Mask()):
            self.prune_twin()

    @rule(example=st.sampled_from([example for _, example in EXAMPLES]))
    def any_pass(self, example: str) -> None:
        """Those without a rule of their own too."""
        p = last(example)
        if self.apply(p) and p.effect in (Effect.EXACT, Effect.LOSSY):
            self.take_over()

    @precondition(lambda self: "mask" in self.facts)
    @rule()
    def freeze_and_lower(self) -> None:
        """As people do; by chance alone few sequences get this far."""
        self.apply(Freeze())
        self.apply(Lower())

    @rule(layout=st.sampled_from(["csr", "csr32"]))
    def lower(self, layout: str) -> None:
        self.apply(Lower(layout))

    @invariant()
    def graph_is_whole_and_means_what_the_twin_computes(self) -> None:
        if not hasattr(self, "graph"):
            return
        assert problems(self.graph, recompute=True) == []
        assert_untouched(self.case.model, self.untouched)
        with torch.no_grad():
            torch.testing.assert_close(
                self.graph.run(*self.case.inputs), self.twin(*self.case.inputs), rtol=1e-4, atol=1e-4, equal_nan=True
            )
        for weight in self.graph.weights.values():
            if weight.packed is not None:
                zero = self.pruned[weight.name]
                assert weight.packed.nnz == int((~zero).sum())
                assert torch.equal(weight.packed.unpack(), dict(self.twin.named_parameters())[weight.name])


# A sequence of passes takes ten times as long as another example.
PassSequences.TestCase.settings = settings(max_examples=settings().max_examples // 4, stateful_step_count=12)
TestPassSequences = PassSequences.TestCase
