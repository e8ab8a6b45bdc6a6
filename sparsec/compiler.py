"""compile(): trace -> passes -> emit. The one call that most users need."""

from __future__ import annotations

import copy as copying
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from sparsec.arguments import checked_but
from sparsec.calibrate import SELF, CalibrationData, Sequences
from sparsec.calibrate.data import takes_tokens
from sparsec.calibrate.draw import CalibrationInput, Draw
from sparsec.checkpoint.embeddings import guard_embeddings
from sparsec.checkpoint.loaded import Loaded
from sparsec.checkpoint.pretrained import guard_saving
from sparsec.compiled import Compiled
from sparsec.defaults import CALIBRATION_SEQUENCES, DEFAULT_PASSES
from sparsec.emitter import adopt, emit, put, unpackable, unswappable
from sparsec.errors import CompileError, MaskError, PipelineError
from sparsec.holders import elsewhere_text, held_elsewhere
from sparsec.ir.carry import rebind
from sparsec.ir.foreign import refusal
from sparsec.ir.graph import Graph
from sparsec.ir.parts import is_encoder, positions, usual_rows
from sparsec.ir.settle import settle
from sparsec.ir.tracer import trace
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.memory import computed, is_own, shared_copy
from sparsec.passes.mask import Mask
from sparsec.pipeline import Context, Instrument, Pass, PassRecord, Pipeline, Progress, Verify
from sparsec.pipeline.fingerprint import by_all_ranks, facts_of_run, going_on
from sparsec.pipeline.instruments import First
from sparsec.pipeline.pruning import NO_CALIBRATION
from sparsec.planning.memory import refuse_beyond
from sparsec.program.decoder import decode_natively
from sparsec.progress import stage
from sparsec.ranks import Ranks
from sparsec.recover.holding import Holding, strip
from sparsec.reference import ModelReference
from sparsec.spill import Keep, Spill
from sparsec.taught import parameters, taught_by
from sparsec.wrapped import nothing_to_prune, refuse_meta, refuse_wrapper, traced_again

DEFAULT_PASSES_WITH_MASKS = "mask,freeze,sparsity,flops,fuse,lower(auto)"

Model = TypeVar("Model", bound=nn.Module)


@checked_but("passes", "masks", "verify")
def compile(
    model: Model,
    passes: Pipeline | str | Pass | Iterable[str | Pass] | None = None,
    *,
    example_inputs: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    calibration: CalibrationInput = None,
    tokenizer: Any = None,
    calibration_sequences: int = CALIBRATION_SEQUENCES,
    calibration_length: int | None = None,
    bos: bool = True,
    seed: int = 0,
    copy: bool | Literal["changed"] = True,
    spill: str | os.PathLike[str] | None = None,
    max_memory: int | None = None,
    verify: Verify = "structure",
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Model:
    """A model of the same class whose pruned linear layers run on sparse kernels.

    passes: a specification (default `magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)`), a Pipeline, or a list of
    specifications and Pass objects.
    example_inputs: needed for models that are not from transformers: a tensor, a tuple or a dict of tensors, with sizes of at
    least 2 where sizes vary.
    masks: weight or module name -> bool tensor, True where kept; `passes` then defaults to
    `mask,freeze,sparsity,flops,fuse,lower(auto)`, and a pass `mask` is put first where `passes` has none.
    calibration: for passes that need it, such as `wanda`, in any form; the same sequences give the same masks. What a tokenizer
    returns, padded or not; token ids [sequences, length], alone or as a tuple with their attention mask; strings, with `tokenizer`;
    a list or an iterable of any of these, such as a DataLoader; a text file's path or `dataset:NAME[,...]`, with `tokenizer`, or
    `tokenizer` alone for the embedded text, of which `calibration_sequences` sequences of `calibration_length` tokens (1024, or
    what the model takes) are drawn by `seed`; "self" for as many that the model writes itself, which takes minutes and is kept for
    the next time (a file of that name is "./self"); what `sparsec.calibrate.windows` gives; for a plain module calls, each a tuple
    of tensors.
    bos: where the tokenizer begins texts with a BOS, so does every sequence drawn from a text; False is the papers' protocol.
    copy: True leaves `model` untouched; False consumes it: each dense weight is freed as soon as it is packed, unless another
    module or a state dict of the process holds it too: then theirs stays as it was, which is said. Who has the very Parameter, an
    optimiser say, keeps its memory alive, with the mask's zeros in it. "changed" leaves `model` untouched too, and copies nothing
    that the passes leave as it is: both models then share the memory of their tensors, so train neither.
    spill: a folder; what passes make is kept there in files and mapped, so that it takes no memory, and the result holds tensors
    of these files. A run that was killed, and is begun again with the same folder and the same arguments, goes on where it stopped;
    what another run kept there is refused, and the folder is the caller's to delete. Take copy=False with it.
    max_memory: bytes; passes that would hold more, by an upper bound from shapes alone, are refused before they run.
    verify: none, structure, facts or probe. progress: called with (what, done, total). instruments: see PrintIR and DumpIR.

    The result's `.sparsec` holds the graph, the records of the passes and `report()`.

    Raises a SparsecError: SpecError, PipelineError and CompileError before anything is changed; TraceError, SelectionError,
    WeightError, MaskError, FormatError, KernelError, EmitError.
    """
    _refuse(model)
    pipeline = _pipeline(passes, masks)
    pipeline.validate()
    draw = Draw(
        *(tokenizer, calibration_sequences, calibration_length, seed, bos, *_positions_and_pad(model)),
        model=model,
        progress=progress,
    )
    with by_all_ranks(pipeline) as ranks:
        unwanted = isinstance(calibration, str) and calibration == SELF and not pipeline.learning
        drawn = None if unwanted else draw.before_trace(calibration, plain=example_inputs is not None)
        if drawn is None and tokenizer is not None and pipeline.learning:
            drawn = draw.drawn()
        _require_calibration(pipeline, drawn)
        shares = copy == "changed"
        elsewhere = {} if copy else held_elsewhere(model)
        dense: Mapping[str, Tensor] = {}
        if copy:
            dense = parameters(model)  # the given model stays what it is: nothing is held twice
            model = _copied(model, shares)
        elif any(p.uses_dense for p in pipeline.passes):
            needed = any(p.needs_dense for p in pipeline.passes)
            lent = {
                name: tensor for name, tensor in parameters(model).items() if not is_own(tensor)
            }  # nobody writes to it
            dense = lent | {n: t.clone() for n, t in parameters(model).items() if n not in lent and needed}
        strip(model)
        start = perf_counter()
        with stage(progress, "tracing"):
            graph = trace(model, example_inputs)
            data = draw.calls(graph, drawn)
            if isinstance(drawn, Sequences) and data is not None and example_inputs is None and graph.rung != "dynamic":
                # It takes one length only: that of the calibration.
                graph = trace(model, dict(zip(graph.inputs, data.calls[0], strict=True)))
                data = draw.calls(graph, drawn)
        traced = perf_counter() - start
        if not any(graph.prunable(name) for name in graph.weights):
            raise CompileError(nothing_to_prune(graph))
        if calibration is not None and not pipeline.learning:
            graph.notes.append(f"calibration data was given, and none of {pipeline} learns from it")
        context = _context(
            model,
            graph,
            not shares,
            elsewhere=elsewhere,
            masks=masks or {},
            calibration=data,
            dense=dense,
            progress=progress,
            store=_store(spill, ranks),
            ranks=ranks,
        )
        ranks.agree(lambda: facts_of_run(pipeline, graph, data))
        folder = context.store.folder if isinstance(context.store, Spill) else None
        refuse_beyond(max_memory, folder, graph, pipeline, data, ranks=ranks)
        same = First(partial(going_on, context.store, pipeline, graph, data, context.masks))
        records = pipeline.run(graph, context, verify, (*instruments, same))
        learnt = _learnt(pipeline, data)
        return _emitted(model, graph, pipeline, records, traced, tuple(graph.notes), context, learnt)


@checked_but("passes", "verify")
def extend(
    compiled: Model,
    passes: Pipeline | str | Pass | Iterable[str | Pass],
    *,
    calibration: CalibrationInput = None,
    tokenizer: Any = None,
    calibration_sequences: int = CALIBRATION_SEQUENCES,
    calibration_length: int | None = None,
    bos: bool = True,
    seed: int = 0,
    teacher: nn.Module | None = None,
    copy: bool = True,
    verify: Verify = "structure",
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Model:
    """A copy of a compiled model that is not lowered yet, with more passes run on it; `compiled` stays what it is.

    calibration, tokenizer, calibration_sequences, calibration_length, bos, seed: as of `compile`, for passes that learn.
    teacher: the dense model, for passes such as `recover` that learn from it: the one that was compiled, or one of its shapes.
    copy: False consumes it: masks and dense weights are freed as they are packed.

    So one calibration serves several formats: `extend(pruned, "lower(bitmap)")`, `extend(pruned, "lower(csr)")`. Its `.sparsec`
    tells of all passes. Zeros that `sparsec.masked` holds are held in the copy too, unless it is lowered. Raises CompileError for a
    model that was not compiled or is lowered, and what `compile` raises.
    """
    path, before = inside(compiled, "extend")
    if "lowered" in before.graph.facts:
        raise CompileError(
            "this model is lowered already: its dense weights are gone; extend it before the pass lower runs"
        )
    more = Pipeline.of(passes)
    more.validate(before.graph.facts)
    limit, pad = _positions_and_pad(compiled)
    draw = Draw(tokenizer, calibration_sequences, calibration_length, seed, bos, limit, pad, teacher, progress)
    with by_all_ranks(more) as ranks:
        drawn = draw.before_trace(calibration, plain=not takes_tokens(before.graph))
        if drawn is None and tokenizer is not None and more.learning:
            drawn = draw.drawn()
        _require_calibration(more, drawn)
        dense = taught_by(more, before.graph, teacher)
        shares = before.shares
        elsewhere = {} if copy or shares else held_elsewhere(compiled)
        model = _copied(compiled, shares) if copy else compiled
        part = model.get_submodule(path)
        own: Compiled = vars(part).pop("sparsec")
        for name in ("save_pretrained", "push_to_hub"):
            vars(part).pop(name, None)
        graph, notes = own.graph, list(own.notes)
        if own.holding is not None:
            own.holding.release()
        if rebind(graph, part) or path:
            graph, said = traced_again(model, graph)
            notes += said
        notes += settle(graph)
        if teacher is not None and not dense and not (isinstance(calibration, str) and calibration == SELF):
            notes.append(f"teacher= was given, and none of {more} learns from it")
        again = [p for p in own.pipeline.passes if p.produces & (before.graph.facts - graph.facts)]
        more = Pipeline((*dict.fromkeys(again), *more.passes))
        data = draw.calls(graph, drawn)
        given = {"elsewhere": elsewhere, "calibration": data, "dense": dense, "progress": progress, "ranks": ranks}
        context = _context(model, graph, not shares, **given)
        ranks.agree(lambda: facts_of_run(more, graph, data))
        records = more.run(graph, context, verify, instruments, first=len(own.records) + 1)
        learnt = _learnt(more, data) or own.calibration
        whole = Pipeline((*own.pipeline.passes, *more.passes))
        said_once = tuple(dict.fromkeys(notes))
        done = (*own.records, *records)
        made = _emitted(model, graph, whole, done, own.trace_seconds, said_once, context, learnt)
    if own.holding is not None and "lowered" not in graph.facts:
        vars(made)["sparsec"].holding = Holding(graph, made)
    return made


def inside(model: nn.Module, call: str) -> tuple[str, Compiled]:
    """The path of what was compiled, "" where it is the model itself, and how; adapters and other modules may stand around it.

    call: the public function that needs it, for the errors.
    """
    refuse_wrapper(model, call)
    foreign = refusal(model)
    if foreign:
        raise CompileError(foreign)
    refuse_meta(model)
    found = [(path, m.sparsec) for path, m in model.named_modules() if isinstance(vars(m).get("sparsec"), Compiled)]
    loaded = [vars(m)["sparsec"] for m in model.modules() if isinstance(vars(m).get("sparsec"), Loaded)]
    if loaded and not any(each.lowered for each in loaded):
        raise CompileError(
            "this model comes from a pickle, which holds its zeros and not its masks; sparsec.compile(model, "
            "'zeros,freeze,lower(auto)') goes on from the zeros"
        )
    if loaded:
        raise CompileError(
            f"this model was loaded, and is lowered already: its dense weights are gone; {call} takes one before the pass lower "
            "runs"
        )
    if not found:
        raise CompileError(
            f"{call} takes what sparsec.compile gave back; compile the model first{_from_zeros(model, call)}"
        )
    if len(found) > 1:
        paths = ", ".join(path or "the root module" for path, _ in found)
        raise CompileError(
            f"this model holds several compiled ones ({paths}); give {call} each by itself and put it back"
        )
    return found[0]


def _from_zeros(model: nn.Module, call: str) -> str:
    return f": {call}(sparsec.compile(model, 'zeros,freeze')) keeps the zeros that it has" if call == "masked" else ""


def _store(spill: str | os.PathLike[str] | None, ranks: Ranks) -> Keep:
    """A place for what passes make; each of several ranks has its own, since each has seen a part of the text."""
    if spill is None:
        return Keep()
    store = Spill.of(spill)
    return store if ranks.alone else store.within(f"rank {ranks.number} of {ranks.count}")


def _context(model: nn.Module, graph: Graph, owns_weights: bool, **given: Any) -> Context:
    return Context(
        keep_dense=unpackable(model, graph),
        unswappable=unswappable(model, graph),
        owns_weights=owns_weights,
        put=partial(put, model),
        generates=not is_encoder(model),
        rows=usual_rows(model),
        probe=graph.example,
        **given,
    )


def _emitted(
    model: Model,
    graph: Graph,
    pipeline: Pipeline,
    records: tuple[PassRecord, ...],
    trace_seconds: float,
    notes: tuple[str, ...],
    context: Context,
    calibration: Mapping[str, str],
) -> Model:
    """The model with the graph put back into it, and its `.sparsec`."""
    start = perf_counter()
    made = adopt(model, graph, context.may_overwrite)
    spared = {name: place for name, place in context.elsewhere.items() if name in made}
    notes = (*notes, *([elsewhere_text(spared)] if spared else []), *emit(model, graph))
    seconds = perf_counter() - start
    compiled = Compiled(
        graph,
        pipeline,
        records,
        trace_seconds,
        seconds,
        notes,
        ModelReference(model),
        calibration=calibration,
        shares=not context.owns_weights,
    )
    object.__setattr__(model, "sparsec", compiled)
    guard_saving(model, compiled)
    guard_embeddings(model)
    if compiled.lowered:
        decode_natively(model)
    return model


def _learnt(pipeline: Pipeline, data: CalibrationData | None) -> dict[str, str]:
    """What a model was calibrated on, for those that it is given to."""
    return {"source": data.source, "sha256": data.sha256} if data is not None and pipeline.learning else {}


def _positions_and_pad(model: nn.Module) -> tuple[int | None, int | None]:
    return positions(model), getattr(getattr(model, "config", None), "pad_token_id", None)


def _require_calibration(pipeline: Pipeline, drawn: object) -> None:
    """Before anything slow runs."""
    if pipeline.learning and drawn is None:
        raise PipelineError(f"the pass {pipeline.learning[0]!r} needs calibration data; {NO_CALIBRATION}")


def _pipeline(
    passes: Pipeline | str | Pass | Iterable[str | Pass] | None, masks: Mapping[str, Tensor] | None
) -> Pipeline:
    if masks is not None and not isinstance(masks, Mapping):
        raise MaskError(f"masks must map weight or module names to bool tensors, got {type(masks).__name__}")
    if unnamed := [key for key in masks or () if not isinstance(key, str)]:
        raise MaskError(f"masks must map weight or module names to bool tensors, got the key {unnamed[0]!r}")
    if passes is None:
        return Pipeline.parse(DEFAULT_PASSES if masks is None else DEFAULT_PASSES_WITH_MASKS)
    pipeline = Pipeline.of(passes)
    if masks is not None and not any(isinstance(p, Mask) for p in pipeline.passes):
        return pipeline.with_first(Mask())
    return pipeline


def _copied(model: Model, share: bool = False) -> Model:
    """share: with the very same tensors, masks included."""
    try:
        return shared_copy(model) if share else copying.deepcopy(model, computed(model))
    except (RuntimeError, TypeError) as error:
        raise CompileError(f"the model cannot be copied: {error}; hand it over with copy=False") from error


def _refuse(model: nn.Module) -> None:
    refuse_wrapper(model, "compile")
    foreign = refusal(model)
    if foreign:
        raise CompileError(foreign)
    refuse_meta(model)
    inside = next((path for path, m in model.named_modules() if isinstance(vars(m).get("sparsec"), Compiled)), None)
    sparse = next((path for path, m in model.named_modules() if isinstance(m, PackedLayer)), None)
    if inside is not None or sparse is not None:
        held = model.get_submodule(inside) if inside is not None else model
        lowered = sparse is not None or "lowered" in vars(held)["sparsec"].graph.facts
        if not lowered:
            at = f" ({inside})" if inside else ""
            raise CompileError(
                f"this model is compiled already{at}, and not lowered yet; sparsec.extend goes on with it, for instance "
                "sparsec.extend(model, 'freeze,lower(auto)')"
            )
        where = f" ({sparse} is packed): its dense weights are gone" if sparse else f" ({inside})" if inside else ""
        raise CompileError(
            f"this model is compiled already and lowered{where}; compile the original again with all passes in one "
            "specification, for instance passes='magnitude(0.5),freeze,lower(csr)'"
        )
