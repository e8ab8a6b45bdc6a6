"""recover: training under the masks keeps every zero, helps, goes on after a stop, and says what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
import sparsec.passes.recover as recover_pass
import sparsec.recover.blocks as blocks
from sparsec.errors import CompileError, DataError, PipelineError, RecoverError, SpecError
from sparsec.recover.loop import OPTIMIZERS, Training
from sparsec.recover.whole import WholeModel

PATTERNS = ("0.5", "0.9", "pattern='2:4'", "pattern='4:8'", "0.5, pattern='block:4x4'")
METHODS = recover_pass.METHODS


def text(sequences: int = 8, length: int = 16) -> Tensor:
    """Token ids that repeat themselves, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, VOCABULARY, (sequences, 1), generator=generator)
    return (start + 5 * torch.arange(length)) % (VOCABULARY - 3) + 3


def recovered(spec: str, model: nn.Module | None = None, **options: Any) -> Any:
    """A tiny Llama, or another model, pruned by half and recovered."""
    given = tiny_model("llama")[0] if model is None else model
    passes = spec if "," in spec and "freeze" in spec else f"magnitude(0.5),freeze,{spec}"
    return sparsec.compile(given, passes, calibration=options.pop("calibration", text()), **options)


def told(compiled: Any) -> str:
    """What the pass said."""
    record = next(r for r in compiled.sparsec.records if r.name == "recover")
    return " ".join((record.summary, *record.notes))


def figures(compiled: Any) -> tuple[float, float]:
    """The first figure before and after."""
    words = told(compiled).split(" -> ")
    return float(words[0].split()[-1]), float(words[1].split(",")[0].split()[0])


def masks_of(compiled: Any) -> dict[str, Tensor]:
    return {w.name: w.mask.clone() for w in compiled.sparsec.graph.masked()}


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(PATTERNS),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([0.0, 0.1]),
    st.integers(1, 3),
)
def test_zeros_and_moments_of_pruned_weights_are_zero_after_every_step(
    method: str, pattern: str, optimizer: str, decay: float, batch: int
) -> None:
    looked = 0

    class Watched(Training):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.changed = self.look

        def look(self, step: int, share: float) -> None:
            nonlocal looked
            looked += 1
            for name, leaf in self.student.leaves.items():
                mask = self.student.masks.get(name)
                if mask is None:
                    continue
                assert not leaf.detach()[~mask].any(), name
                moments = [v for v in self.optimizer.state[leaf].values() if v is not None and v.shape == mask.shape]
                assert moments, name
                assert all(not moment[~mask].any() for moment in moments), name

    before = sparsec.compile(tiny_model("llama")[0], f"magnitude({pattern}),freeze")
    spec = (
        f"magnitude({pattern}),freeze,recover('{method}', steps=3, batch={batch}, optimizer='{optimizer}', "
        f"weight_decay={decay}, learning_rate=0.01)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_pass, "Training", Watched)
        patch.setattr(blocks, "Training", Watched)
        after = recovered(spec, verify="facts")
    assert looked >= 3
    old, new = masks_of(before), masks_of(after)
    assert old.keys() == new.keys()
    changed = False
    for name, mask in new.items():
        assert torch.equal(mask, old[name])
        weight = after.sparsec.graph.tensor(name).detach()
        assert not weight[~mask].any(), name
        changed |= not torch.equal(weight, before.sparsec.graph.tensor(name))
    assert changed or method == "norms"


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_nearer_to_the_dense_model(method: str) -> None:
    dense = tiny_model("llama")[0]
    rate = {"norms": 0.02, "lora": 0.001}.get(method, 0.003)
    compiled = recovered(f"recover('{method}', steps=30, batch=4, learning_rate={rate})", dense)
    before, after = figures(compiled)
    assert after < 0.9 * before
    # Told on sequences that were held out: it holds on others too.
    ids = text(12)[8:]
    masked = sparsec.compile(dense, "magnitude(0.5),freeze")
    with torch.no_grad():
        wanted = dense(ids).logits.log_softmax(-1)
        apart = [(wanted.exp() * (wanted - m(ids).logits.log_softmax(-1))).sum(-1).mean() for m in (masked, compiled)]
    assert apart[1] < apart[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_recovered(name: str) -> None:
    model, example = tiny_model(name)
    given: Any = text() if name != "mlp" else [(example(2, 4 + i)["x"],) for i in range(6)]
    inputs = example() if name == "mlp" else None
    for method in ("distill", "blocks"):
        spec = f"magnitude(0.5),freeze,recover('{method}', steps=6, batch=2, dtype='fp32'),lower(bitmap)"
        compiled = sparsec.compile(model, spec, calibration=given, example_inputs=inputs)
        before, after = figures(compiled)
        assert math.isfinite(after), method
        assert after <= before * 1.001, (method, before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_stays_one(dtype: torch.dtype) -> None:
    compiled = recovered("recover(steps=8, batch=4, learning_rate=0.003)", tiny_model("llama")[0].to(dtype))
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    assert figures(compiled)[1] <= figures(compiled)[0]


def test_autocast_and_recomputing_are_the_same_training() -> None:
    plain = recovered("recover(steps=4, dtype='fp32', recompute=False)")
    again = recovered("recover(steps=4, dtype='fp32', recompute=True)")
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    half = recovered("recover(steps=4, dtype='bf16')")
    assert "bfloat16" in told(half)
    assert figures(half)[1] <= figures(half)[0]


def test_the_given_model_is_the_teacher_and_stays_what_it_is() -> None:
    model = tiny_model("llama")[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for copy in (True, "changed"):
        recovered("recover(steps=3)", model, copy=copy)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    consumed = recovered("recover(steps=3)", tiny_model("llama")[0], copy=False)
    kept = recovered("recover(steps=3)", tiny_model("llama")[0])
    for a, b in zip(consumed.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)


def test_extend_recovers_with_a_teacher() -> None:
    dense = tiny_model("llama")[0]
    pruned = sparsec.compile(dense, "wanda(0.5),freeze", calibration=text())
    made = sparsec.extend(pruned, "recover(steps=3),lower(bitmap)", calibration=text(), teacher=dense)
    whole = recovered("wanda(0.5),freeze,recover(steps=3),lower(bitmap)", dense)
    ids = text(2)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, whole(ids).logits)
    with pytest.raises(CompileError, match="give it as teacher="):
        sparsec.extend(pruned, "recover(steps=3)", calibration=text())
    with pytest.raises(PipelineError, match="calibration"):
        sparsec.extend(pruned, "recover(steps=3)", teacher=dense)
    alone = sparsec.extend(pruned, "recover(steps=3, cross_entropy=1.0)", calibration=text())
    assert "perplexity" in told(alone)
    assert "KL" not in told(alone)


def test_a_teacher_of_other_shapes_is_refused() -> None:
    dense = tiny_model("llama")[0]
    pruned = sparsec.compile(dense, "magnitude(0.5),freeze")
    config = dense.config.to_dict() | {"vocab_size": VOCABULARY * 2}
    other = type(dense)(type(dense.config)(**config)).eval()
    with pytest.raises(CompileError, match=r"embed_tokens.*another vocabulary"):
        sparsec.extend(pruned, "recover(steps=1)", calibration=text(), teacher=other)
    lowered = sparsec.compile(dense, "magnitude(0.5),freeze,lower(csr)")
    with pytest.raises(CompileError, match="lowered"):
        sparsec.extend(pruned, "recover(steps=1)", calibration=text(), teacher=lowered)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("recover(minutes=0)", SpecError, "minutes must be a number above 0"),
        ("recover(steps=0)", SpecError, "steps must be a whole number above 0"),
        ("recover(steps=2, minutes=1)", SpecError, "leave one out"),
        ("recover('distil')", SpecError, "method must be one of"),
        ("recover(learning_rate=-1.0)", SpecError, "learning_rate"),
        ("recover(cross_entropy=1.5)", SpecError, "from 0 to 1"),
        ("recover(length=1)", SpecError, "at least 2 tokens"),
        ("recover(steps=1, batch=100)", DataError, "a batch of 100 sequences is more than"),
    ],
)
def test_options_outside_their_range_are_refused(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        recovered(spec)


def test_what_cannot_be_recovered_says_so() -> None:
    model = tiny_model("llama")[0]
    with pytest.raises(PipelineError, match=r"'recover' needs 'mask' and 'frozen'|needs 'frozen' and 'mask'"):
        sparsec.compile(model, "recover(steps=1)", calibration=text())
    with pytest.raises(PipelineError, match="'frozen'"):
        sparsec.compile(model, "magnitude(0.5),recover(steps=1)", calibration=text())
    with pytest.raises(PipelineError, match="cannot follow"):
        sparsec.compile(model, "magnitude(0.5),freeze,lower(csr),recover(steps=1)", calibration=text())
    with pytest.raises(PipelineError, match="needs calibration data"):
        sparsec.compile(model, "magnitude(0.5),freeze,recover(steps=1)")
    with pytest.raises(DataError, match="at least 2"):
        recovered("recover(steps=1)", calibration=text(1))


def _poisoned(steps: set[int]) -> Any:
    """Training whose loss is NaN in some attempts."""

    class Poisoned(Training):
        def __post_init__(self) -> None:
            super().__post_init__()
            fine, count = self.gradients, 0

            def gradients(numbers: Any, scale: float) -> tuple[float, int]:
                nonlocal count
                count += 1
                loss, tokens = fine(numbers, scale)
                return (math.nan if count in steps else loss), tokens

            self.gradients = gradients

    return Poisoned


def test_a_loss_of_nan_lowers_the_rate_once_and_keeps_the_last_good_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_pass, "Training", _poisoned({4}))
    compiled = recovered("recover(steps=10, learning_rate=0.002)")
    assert "NaN or inf in step 4: back to the last good weights, and on with a learning rate of 0.001" in told(compiled)
    assert "10 steps" in told(compiled)
    monkeypatch.setattr(recover_pass, "Training", _poisoned({4, 7}))
    compiled = recovered("recover(steps=10, learning_rate=0.002)")
    assert "again: training ended" in told(compiled)
    assert figures(compiled)[1] <= figures(compiled)[0]


def test_an_interrupt_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Training):
        def _step(self, batch: Any) -> bool:
            if self.at.steps == 5:
                raise KeyboardInterrupt
            return super()._step(batch)

    monkeypatch.setattr(recover_pass, "Training", Interrupted)
    compiled = recovered("recover(steps=50, batch=4, learning_rate=0.003),lower(bitmap)")
    assert "interrupted after 5 steps" in told(compiled)
    assert figures(compiled)[1] < figures(compiled)[0]


class KilledError(Exception):
    """As if the process had gone."""


@contextmanager
def killed_after(saves: int) -> Iterator[None]:
    """A training ends within as if the process had gone, once its state was saved so often."""
    saved, left = recover_pass.StateFolder.save, saves

    def save(self: Any, *given: Any) -> None:
        nonlocal left
        saved(self, *given)
        left -= 1
        if not left:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_pass.StateFolder, "save", save)
        with pytest.raises(KilledError):
            yield


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on_to_the_same_result(method: str, after: int, tmp_path: Path) -> None:
    spec = f"recover('{method}', steps=8, batch=2, learning_rate=0.003, checkpoint={str(tmp_path / 'state')!r})"
    whole = recovered(spec.replace(f", checkpoint={str(tmp_path / 'state')!r}", ""))
    with killed_after(after):
        recovered(spec)
    again = recovered(spec)
    assert "went on from" in told(again)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert figures(again) == figures(whole)


def test_a_killed_run_goes_on_after_a_loss_of_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(Training):
        def __post_init__(self) -> None:
            super().__post_init__()
            fine = self.gradients

            def gradients(numbers: Any, scale: float) -> tuple[float, int]:
                loss, tokens = fine(numbers, scale)
                return (math.nan if (self.at.steps, self.at.skipped) == (2, 0) else loss), tokens

            self.gradients = gradients

    monkeypatch.setattr(recover_pass, "Training", Poisoned)
    at = f", checkpoint={str(tmp_path / 'state')!r}"
    whole = recovered("recover(steps=8, batch=2, learning_rate=0.003)")
    with killed_after(5):
        recovered(f"recover(steps=8, batch=2, learning_rate=0.003{at})")
    again = recovered(f"recover(steps=8, batch=2, learning_rate=0.003{at})")
    assert "NaN or inf in step 3" in told(again)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_run_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    at = str(tmp_path / "state")
    recovered(f"recover(steps=2, checkpoint={at!r})")
    with pytest.raises(RecoverError, match="the state of another training"):
        recovered(f"recover(steps=3, checkpoint={at!r})")
    with pytest.raises(RecoverError, match="the state of another training"):
        recovered(f"recover(steps=2, checkpoint={at!r})", calibration=text(9))
    state = tmp_path / "state" / "recover.json"
    whole = json.loads(state.read_text())
    state.write_text(json.dumps({key: value for key, value in whole.items() if key != "skipped"}))
    with pytest.raises(RecoverError, match="it has no 'skipped'"):
        recovered(f"recover(steps=2, checkpoint={at!r})")
    state.write_text("{")
    with pytest.raises(RecoverError, match="no state of a training"):
        recovered(f"recover(steps=2, checkpoint={at!r})")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecoverError, match="cannot be made"):
        recovered(f"recover(steps=2, checkpoint={str(tmp_path / 'file' / 'x')!r})")


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, numbers: Any, scale: float) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(WholeModel, "gradients", fail)
    with pytest.raises(RecoverError, match=r"smaller batch=.*recompute=True.*method='blocks'"):
        recovered("recover(steps=2)")
