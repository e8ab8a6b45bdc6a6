"""Recover: trains what pruning left, under the masks, towards the dense model.

Every mask stays exactly what it is, unless `regrow` moves it: a pruned weight has no gradient and no moment in the optimiser, and
is zero after every step.
Sources: distillation with hidden states (arXiv:2310.06927), block by block (arXiv:2402.12419), norms alone and low-rank products
under the mask (arXiv:2312.15230).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsec.calibrate import CalibrationData
from sparsec.calibrate.dataflow import varying
from sparsec.cost.phase import Phase
from sparsec.errors import PipelineError, RecoverError, SparsecWarning, SpecError
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_choice, check_number, check_positive, check_whole
from sparsec.pipeline.pruning import NO_CALIBRATION
from sparsec.pipeline.trained import TrainingFigures
from sparsec.ranks import ALONE
from sparsec.recover.blocks import BlockByBlock, Going
from sparsec.recover.figures import Figures, Looking, told
from sparsec.recover.kept import COUNTED, Trainings
from sparsec.recover.loop import OPTIMIZERS, SAVED, SCHEDULES, Progressed, Settings, Training, resume, training_state
from sparsec.recover.phases import ACTIVATIONS, is_out_of_memory, training_phases
from sparsec.recover.precision import DTYPES, Compute, dtype_of, loss_scale, precision
from sparsec.recover.regrow import WAYS, Regrowth
from sparsec.recover.rounding import check_values, likes_of, round_rest, take_likes, whole_student
from sparsec.recover.sharded import ShardedWhole, to_be_shared, told_sharing
from sparsec.recover.state import StateFolder
from sparsec.recover.stretches import Read, Stretches
from sparsec.recover.student import LowRank, Student, trained_names, write_trained
from sparsec.recover.teacher import dense_reader
from sparsec.recover.text import LENGTH, Call, TrainingText, training_text
from sparsec.recover.whole import Towards, WholeModel

METHODS = ("distill", "blocks", "norms", "lora")
RATES = {"distill": 2e-4, "blocks": 2e-4, "norms": 1e-3, "lora": 5e-4}
MINUTES = 10.0


@dataclass(frozen=True)
class Recover(Pass):
    """Trains the masked weights, norms and biases towards the dense model, on the calibration text.

    method: `distill` trains the whole model towards the dense one's logits; `blocks` each block's attention and MLP towards the
    dense one's outputs, one after the other, in little memory; `norms` trains norms and biases alone, towards the logits; `lora`
    low-rank products under the masks, merged in the end. steps or minutes: how long (10 minutes; of `blocks`, steps are those of
    each half of a block). learning_rate: at its highest, after a short warm-up; schedule: how it falls. batch: pieces of a step;
    of several ranks each takes its share, one at least; length: sequences are cut into pieces of at most so many tokens, None
    leaves them whole. cross_entropy: share of what comes next in the text beside the dense model's logits; hidden: weight of the
    hidden states' relative error; temperature: of both distributions. rank, alpha: of `lora`. regrow: masks move while training
    (`distill` alone): every regrow_every steps the weakest weights go and others come, where the gradient is largest (`rigl`) or
    at random (`set`); regrow_share of the kept ones at first, fewer later. dtype: to compute products in; auto: bfloat16 where
    that is faster here. recompute: activations are computed twice instead of kept; None: those beyond 0.4 GB. shard: each rank
    has a share of every weight and its moments (torch's FSDP2); None: where no rank has room for all of them. checkpoint: a folder
    that keeps the state; a run that was stopped goes on from it. values: of `lower`; weights are rounded to them in every forward
    pass, and in the end.
    """

    name: ClassVar[str] = "recover"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[frozenset[str]] = frozenset({"mask", "frozen"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    trains: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = (
        "magnitude(0.5),freeze,recover(steps=2)",
        "wanda(0.5),freeze,recover(method='blocks', steps=2)",
        "magnitude(0.5),freeze,recover(steps=2, batch=2, optimizer='sgd')",
        "magnitude(0.5),freeze,recover(method='lora', rank=2, alpha=4.0, steps=2, schedule='linear', weight_decay=0.1)",
        "magnitude(0.5),freeze,recover(minutes=0.001, length=8, seed=1, temperature=2.0, dtype='fp32', recompute=True)",
        "magnitude(0.5),freeze,recover(steps=2, learning_rate=0.001, cross_entropy=0.5, hidden=0.1)",
        "magnitude(0.5),freeze,recover(steps=2, regrow='rigl', regrow_share=0.1, regrow_every=9)",
        "magnitude(0.5),freeze,recover(steps=2, values='int4g64')",
        "magnitude(0.5),freeze,recover(steps=2, shard=True)",
    )
    wants: ClassVar[str] = "a text to train on"

    method: str = "distill"
    steps: int | None = field(default=None, kw_only=True)
    minutes: float | None = field(default=None, kw_only=True)
    learning_rate: float | None = field(default=None, kw_only=True)
    schedule: str = field(default="cosine", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    length: int | None = field(default=LENGTH, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    optimizer: str = field(default="adamw", kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)
    cross_entropy: float = field(default=0.0, kw_only=True)
    hidden: float = field(default=0.0, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    rank: int = field(default=16, kw_only=True)
    alpha: float = field(default=32.0, kw_only=True)
    regrow: str | None = field(default=None, kw_only=True)
    regrow_share: float = field(default=0.3, kw_only=True)
    regrow_every: int = field(default=20, kw_only=True)
    dtype: str = field(default="auto", kw_only=True)
    recompute: bool | None = field(default=None, kw_only=True)
    shard: bool | None = field(default=None, kw_only=True)
    checkpoint: str | None = field(default=None, kw_only=True)
    values: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        check_choice(self.method, "method", METHODS)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_choice(self.dtype, "dtype", DTYPES)
        check_choice(self.recompute, "recompute", (None, True, False))
        check_choice(self.shard, "shard", (None, True, False))
        check_choice(self.regrow, "regrow", (None, *WAYS))
        if self.regrow is not None and self.method != "distill":
            raise SpecError(
                f"regrow={self.regrow!r} moves masks while the whole model trains: method='distill', got {self.method!r}"
            )
        check_number(self.regrow_share, "regrow_share", above=0.0, most=1.0)
        for name in ("batch", "rank", "regrow_every"):
            check_positive(getattr(self, name), name)
        for name in ("steps", "length"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        if self.length == 1:
            raise SpecError("length must be at least 2 tokens, got 1: each token is learned from those before it")
        if self.steps is not None and self.minutes is not None:
            raise SpecError(f"steps={self.steps} and minutes={self.minutes} both say how long to train; leave one out")
        if self.minutes is not None:
            check_number(self.minutes, "minutes", above=0.0)
        if self.learning_rate is not None:
            check_number(self.learning_rate, "learning_rate", above=0.0)
        check_number(self.weight_decay, "weight_decay")
        check_number(self.cross_entropy, "cross_entropy", most=1.0)
        check_number(self.hidden, "hidden")
        check_number(self.temperature, "temperature", above=0.0)
        check_number(self.alpha, "alpha", above=0.0)
        check_whole(self.seed, "seed")
        object.__setattr__(self, "values", check_values(self.values, self.method, self.regrow))
        self._check_unused()
        if self.shard and not self.shardable:
            raise SpecError(
                "shard=True is for method='distill' without regrow=, values=, checkpoint=; leave those or it out"
            )
        if self.checkpoint is not None and (not isinstance(self.checkpoint, str) or not self.checkpoint):
            raise SpecError(f"checkpoint must be the path of a folder, got {self.checkpoint!r}")

    def _check_unused(self) -> None:
        """Raises SpecError for an option that would do nothing."""
        whole = ("cross_entropy", "hidden", "temperature", "recompute")
        for options, used, way_out in (
            (whole, self.method != "blocks", "take another method than 'blocks'"),
            (("rank", "alpha"), self.method == "lora", "take method='lora'"),
            (("regrow_share", "regrow_every"), self.regrow is not None, "give regrow='rigl' or regrow='set'"),
        ):
            for option in () if used else options:
                if getattr(self, option) != self.__dataclass_fields__[option].default:
                    raise SpecError(f"{option} does nothing in this training; leave it out, or {way_out}")

    @property
    def shardable(self) -> bool:
        """Whether weights may be shared out over ranks."""
        return self.method == "distill" and self.regrow is None and not self.values and self.checkpoint is None

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def needs_dense(self) -> bool:
        """Unless it only learns what comes next in the text."""
        return self.method == "blocks" or self.cross_entropy < 1 or self.hidden > 0

    @property
    def keeps_state_in(self) -> str | None:
        """The folder of `checkpoint`."""
        return self.checkpoint

    @property
    def settings(self) -> Settings:
        """For the loop."""
        return Settings(
            steps=self.steps,
            minutes=None if self.steps is not None else float(MINUTES if self.minutes is None else self.minutes),
            learning_rate=RATES[self.method] if self.learning_rate is None else self.learning_rate,
            schedule=self.schedule,
            batch=self.batch,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            seed=self.seed,
            regrowth=Regrowth(self.regrow, self.regrow_share, self.regrow_every, self.seed) if self.regrow else None,
        )

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """One for each stretch of `blocks`, else one; of `lora` as of the weights that it is for."""
        yield from training_phases(self, graph, foreseen, trained_names(graph, self.method))

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises PipelineError without calibration data or a dense model, DataError, RecoverError."""
        if context.calibration is None:
            raise PipelineError(f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}")
        if torch.is_inference_mode_enabled():
            raise RecoverError(
                "recover trains, and torch.inference_mode() lets nothing be trained; call sparsec outside of it"
            )
        device = next(graph.module.parameters()).device.type
        # The caller's own autocast would compute in another dtype than the one that is told.
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            return self._run(graph, context, context.calibration)

    def _run(self, graph: Graph, context: Context, data: CalibrationData) -> PassResult:
        teacher = dense_reader(graph, context) if self.needs_dense else None
        names = trained_names(graph, self.method)
        text = training_text(graph, data, self.length, max(self.batch, context.ranks.count))
        stretches = Stretches(graph)
        self._check_head(stretches, context)
        begun = None if self.checkpoint is None else StateFolder.begun_with(self.checkpoint, "dtype")
        dtype = context.ranks.told(dtype_of(self.dtype, graph, begun))[0]
        work = _Work(self, graph, context, text, teacher, names, stretches, dtype, precision(dtype, graph))
        try:
            return work.run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RecoverError(
                f"recover ran out of memory: {str(error).splitlines()[0]}; take a smaller batch= (now {self.batch}), a shorter "
                "length=, recompute=True, or method='blocks', which holds one block's activations"
            ) from error

    def _check_head(self, stretches: Stretches, context: Context) -> None:
        """RecoverError for options of logits where there are none, or none of what comes next."""
        head = stretches.head() is not None
        if self.cross_entropy > 0 and not (head and context.generates):
            raise RecoverError(
                "recover: cross_entropy is the loss of the text's next token, which this model does not predict; leave it out, and "
                "the dense model's outputs are what is learned"
            )
        if self.temperature != 1 and not head:
            raise RecoverError(
                "recover: temperature is of distributions over a vocabulary, and this model has no such head; leave it out"
            )


@dataclass
class _Work:
    """One run of the pass."""

    options: Recover
    graph: Graph
    context: Context
    text: TrainingText
    teacher: Read | None
    names: list[str]
    stretches: Stretches
    dtype: str
    compute: tuple[str, Compute]

    def run(self) -> PassResult:
        options, text = self.options, self.text
        folder = None
        if options.checkpoint is not None and self.context.ranks.first:
            given = f"{replace(options, checkpoint=None)} {self.compute[0]}"
            folder = StateFolder.open(options.checkpoint, self.graph, self.teacher, text, given)
        looking = Looking(
            self._model(self.graph.read, (*text.held, *text.second), Towards()), text, self.context.generates
        )
        before = looking.figures()
        kept = Trainings(self.graph, self.context, options.values, options.regrow is not None)
        if options.method != "blocks":
            at = kept.made(self.names, lambda: self._whole(folder))
        elif options.checkpoint is not None:
            at = self._blocks(self._stretchwise(folder))
        else:
            at = kept.made_by_stretch(len(self.stretches.stretches), self._blocks)
        round_rest(self.graph, self.names, options.values, self.context)
        after: Figures = ({}, {})
        try:
            after = looking.figures()
        except KeyboardInterrupt:
            if not self.context.ranks.alone:
                raise
            at.notes.append("interrupted while the figures after the training were taken; the trained weights stay")
        how = f"{at.steps} steps, {at.tokens:,} tokens, {at.seconds / 60:.1f} min, {self.compute[0]}"
        held, second = looking.on_texts(before, after)
        notes = [f"recover: {note}" for note in (*at.notes, *looking.missing(self.options.length))]
        trained = TrainingFigures(options.method, at.steps, at.tokens, at.seconds, self.compute[0], held, second)
        summary = f"{options.method}: {told(held, second)}; {how}"
        return PassResult(changed=True, summary=summary, notes=tuple(notes), training=trained)

    def _whole(self, folder: StateFolder | None) -> Progressed:
        options, ranks = self.options, self.context.ranks
        shared = options.shardable and to_be_shared(options.shard, self.graph, self.names, ranks)
        student = ShardedWhole(self.graph, self.names, ranks, self.stretches) if shared else self._student(self.names)
        gc.collect()  # tracing leaves modules in circles, which would hold the weights as they were
        model = self._model(student.read, (*self.text.trained, *self.text.held))
        model.around, model.ranks = student.run, ranks if shared else ALONE
        count = len(self.text.trained)
        held = range(count, count + len(self.text.held))
        model.recompute = self._recomputed(model) if options.recompute is None else float(options.recompute)
        own = (student, self._settings, count, model.gradients, lambda: model.loss(held), self._tell)
        training = Training(*own, ranks=ranks)
        training.at.notes.extend(told_sharing(shared, options.shard, ranks))
        if (found := self._loaded(folder, *SAVED)) is not None:
            with nullcontext() if folder is None else folder.fitting():
                resume(training, *found)
            training.at.notes.append(f"went on from step {training.at.steps}, from {options.checkpoint}")
        if folder is not None:
            training.keep = lambda now: self._save(folder, *training_state(now), now.at)
        at = training.run()
        student.settle(self.context)
        return at

    def _blocks(self, going: Going) -> Progressed:
        return BlockByBlock(
            self.stretches,
            self.text,
            self.names,
            self._student,
            lambda student: student.settle(self.context),
            self.graph.read,
            self._teaching(),
            self._settings,
            self.compute[1],
            varying(self.stretches.steps, CalibrationData((*self.text.trained, *self.text.held), ""), set()),
            self._tell,
            going,
            self.context.store,
            self.context.ranks,
        ).run()

    def _stretchwise(self, folder: StateFolder | None) -> Going:
        """What a state folder tells of an earlier training, and what keeps this one there. None: the first rank alone has it."""

        def keep(done: int, names: Sequence[str], at: Progressed) -> None:
            if folder is None or at.stopped:  # in the middle of a stretch, which is trained anew the next time
                return
            weights = {name: self.graph.tensor(name) for name in self.names} | likes_of(self.graph, self.options.values)
            self._save(folder, weights, {"stretches": done, **{name: getattr(at, name) for name in COUNTED}}, at)

        found = self._loaded(folder, "stretches", *COUNTED)
        if found is None:
            return Going(keep=keep)
        tensors, numbers = found
        with nullcontext() if folder is None else folder.fitting():
            write_trained(self.graph, {name: tensors[name] for name in self.names}, self.context)
            take_likes(self.graph, tensors, self.options.values)
        at = Progressed(**{name: numbers[name] for name in COUNTED})
        at.notes.append(f"went on from stretch {numbers['stretches']}, from {self.options.checkpoint}")
        return Going(numbers["stretches"], at, keep)

    def _loaded(self, folder: StateFolder | None, *needed: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """As of `StateFolder`, which the first rank alone has."""
        return next(self.context.ranks.each([1], lambda _: None if folder is None else folder.load(*needed)))

    def _save(
        self, folder: StateFolder, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], at: Progressed
    ) -> None:
        """A state that cannot be saved costs the state, and not the training; it is said at once and in the end."""
        try:
            folder.save(tensors, {**numbers, "dtype": self.dtype})
        except RecoverError as error:
            note = f"{error}; training goes on, and a stop now loses it"
            if note not in at.notes:
                at.notes.append(note)
                warnings.warn(note, SparsecWarning, stacklevel=2)

    def _student(self, names: Sequence[str]) -> Student:
        if self.options.method == "lora":
            return LowRank(self.graph, names, self.options.rank, self.options.alpha, self.options.seed)
        return whole_student(self.graph, names, self.context, self.options.values)

    @property
    def _settings(self) -> Settings:
        batch = max(self.options.batch, self.context.ranks.count)  # something to do for every rank
        return replace(self.options.settings, scale=loss_scale(self.graph), batch=batch)

    def _teaching(self) -> Read:
        assert self.teacher is not None
        return self.teacher

    def _model(self, student: Read, sequences: Sequence[Call], towards: Towards | None = None) -> WholeModel:
        options, text, compute = self.options, self.text, self.compute[1]
        wanted = towards or Towards(options.cross_entropy, options.hidden, options.temperature)
        return WholeModel(self.stretches, sequences, student, self.teacher, wanted, compute, stackable=text.stackable)

    def _recomputed(self, model: WholeModel) -> float:
        """So much that about ACTIVATIONS bytes are kept at once."""
        wanted = model.activations(0) * min(self.options.batch, model.together(0))
        return max(0.0, 1 - ACTIVATIONS / wanted) if wanted else 0.0

    def _tell(self, share: float, text: str) -> None:
        self.context.step(f"recover {self.options.method}", round(1000 * share), 1000, text)
