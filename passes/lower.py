"""Lower: linear ops over frozen masks become sparse ops over packed weights. The one place where formats meet kernels."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from sparsec.arguments import shown
from sparsec.cost.choice import OWN, Choice, Setting, choose
from sparsec.cost.phase import Looked, Phase
from sparsec.errors import FormatError, KernelError, SpecError, some
from sparsec.formats.layout import Layout
from sparsec.formats.parts import DENSE
from sparsec.formats.quantised import DIGITS, Quantised
from sparsec.formats.values import EXAMPLES, Codec
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import Problem
from sparsec.kernels import select as select_kernel
from sparsec.kernels.gpu import semi_structured as gpu_semi_structured
from sparsec.lowering import lower_weight, never_packed, use_dense_kernel
from sparsec.lowering.packing import Wanted
from sparsec.lowering.rounded import check_rounded
from sparsec.lowering.rounding import BOUND, admitted, digits_said
from sparsec.lowering.setting import constants_for, dense_kernels, measuring, no_own_kernel
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_choice, check_ignore, check_number, check_patterns, check_positive
from sparsec.pipeline.selection import matches, select_weights
from sparsec.pipeline.spec import unparse_one

AUTO = "auto"
OBJECTIVES = ("latency", "bytes")
TRIED = 1 << 20
"""Weights of the piece that tells how long packing takes."""
LARGE = 1 << 26
"""Bytes of weights to be packed from which on a collection of garbage (0.1 to 0.4 s) is worth the memory."""


@dataclass(frozen=True)
class Lower(Pass):
    """Packs every weight that has a frozen mask and rewrites its ops; the dense weight and the mask leave the graph.

    layout: `auto` lets the cost model choose for every weight among all layouts and dense, for `tokens` rows at a time, by
    predicted time (objective="latency") or by bytes, and lets what stays dense run on an own kernel where that is predicted
    to be faster; the reason stands in the weight's record. tokens: by default one for a transformers model that generates, 4096
    (32 sequences of 128) for one that does not, such as an encoder, and one for any other module. prompt_tokens and new_tokens, in
    place of tokens: a prompt that is read at once, and the tokens that are decoded after it one by one; the time of both counts.
    A layout by name packs
    everything in it: `csr` (16-bit columns where they reach, else 32), `csr8`, `csr16`, `csr32`, `bitmap`, `bsr16x16` and other
    blocks, `nm` (N and M as the mask has them), `'nm2:4'`; on a GPU `wcsr8` and `wcsr16`, which CSR becomes there too. `dense`
    packs nothing and needs no mask: every selected weight stays what it is, zeros included, and runs on sparsec's own dense
    kernel where that serves it (with `fuse` before it, several in one call).

    values: how values are stored: "" as they are, "int8" in 8 bits with a scale for every row, "int8g64" with one for every row and
    group of 64 columns, "int4g64" in 4 bits, "int4mg64" in 4 bits about a middle of its own for every row and group; other groups
    are of a multiple of 32 columns. `lower('bitmap:int8')` says the same as `lower(bitmap, values='int8')`. With `dense` every
    selected weight is packed whole, masked or not. Weights are rounded to the nearest value.
    "auto" takes the fewest bits, with lower(auto) the best layout and values together. bound: on |rounded - weight| / |weight| of
    the kept weights of a matrix, the error that random activations see. A matrix that 4 bits would spoil more is kept in 8, one
    that 8 would in plain values, and the reason is said.
    digits: native kernels multiply integers. A number of x becomes a fixed-point one of so many digits of seven bits, scaled by
    token and group of 64 columns. Two err less than rounding x to bf16 does; one, as other tools quantise x, a hundred times
    as much.
    """

    name: ClassVar[str] = "lower"
    examples: ClassVar[tuple[str, ...]] = (
        "magnitude(0.5),freeze,fuse,lower(csr)",
        "magnitude(0.5),freeze,lower(csr8)",
        "magnitude(0.5),freeze,lower(bitmap)",
        "magnitude(0.5),freeze,lower(auto)",
        "magnitude(0.5),freeze,lower(objective='bytes', tokens=64)",
        "magnitude(0.5),freeze,lower(prompt_tokens=64, new_tokens=16)",
        "lower(dense)",
        "lower(dense, values='int8')",
        "magnitude(0.5),freeze,lower(bitmap, values='int4g64', digits=3)",
        "magnitude(0.5),freeze,lower(values='auto', bound=0.1, objective='bytes')",
    )
    effect: ClassVar[Effect] = Effect.NUMERIC
    requires: ClassVar[frozenset[str]] = frozenset({"mask", "frozen"})
    produces: ClassVar[frozenset[str]] = frozenset({"lowered"})

    gone: ClassVar[Mapping[str, str]] = {
        "index_bits": "the layout says it, lower(csr8), lower(csr16) or lower(csr32)",
        "block": "the layout says it, as in lower(bsr16x16)",
        "format": "it is called layout, and stands first: lower(bitmap)",
    }

    layout: str = AUTO
    values: str = field(default="", kw_only=True)
    bound: float = field(default=BOUND, kw_only=True)
    digits: int = field(default=2, kw_only=True)
    objective: Literal["latency", "bytes"] = field(default="latency", kw_only=True)
    tokens: int | None = field(default=None, kw_only=True)
    prompt_tokens: int | None = field(default=None, kw_only=True)
    new_tokens: int | None = field(default=None, kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.values, str):
            raise SpecError(f"values must be the name of a codec, such as 'int8', got {shown(self.values)}")
        quantised = self.values == AUTO or bool(Codec.parse(self.values).bits)
        if self.layout != AUTO:
            layout = self._layout()
            object.__setattr__(self, "layout", str(layout))
            if self.values != AUTO:
                object.__setattr__(self, "values", "")  # one spelling
            quantised = quantised or bool(layout.values)
        check_number(self.bound, "bound", 0.0, 1.0)
        if self.bound != BOUND and not quantised:
            raise SpecError(
                f"bound is an option of quantised values, as in lower(bitmap, values='int4g64', bound={self.bound})"
            )
        if quantised:
            object.__setattr__(self, "effect", Effect.LOSSY)  # of this instance: weights are rounded
        if self.layout == DENSE or self.layout.startswith(f"{DENSE}:"):
            object.__setattr__(self, "requires", frozenset())  # of this instance: masks mean nothing to it
        check_choice(self.digits, "digits", DIGITS)
        if self.digits != 2 and not quantised:
            raise SpecError(
                f"digits is an option of quantised values, as in lower(bitmap, values='int8', digits={self.digits})"
            )
        check_choice(self.objective, "objective", OBJECTIVES)
        for option in ("tokens", "prompt_tokens", "new_tokens"):
            if getattr(self, option) is not None:
                check_positive(getattr(self, option), option)
        for option, default in (
            ("objective", "latency"),
            ("tokens", None),
            ("prompt_tokens", None),
            ("new_tokens", None),
        ):
            if getattr(self, option) != default and self.layout != AUTO:
                got = f"lower({self.layout}, {option}={getattr(self, option)!r})"
                raise SpecError(f"{option} is an option of lower(auto), got {got}; leave it out")
        workload = (self.prompt_tokens, self.new_tokens)
        if (self.prompt_tokens is None) != (self.new_tokens is None) or (
            self.tokens is not None and workload != (None, None)
        ):
            raise SpecError(
                "a workload is prompt_tokens and new_tokens, both, in place of tokens, as in "
                "lower(auto, prompt_tokens=512, new_tokens=128)"
            )
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    def _layout(self) -> Layout:
        """The one that was asked for, its values among it. SpecError where these are said twice, and not the same."""
        layout = Layout.parse(self.layout)
        if not self.values or layout.values == self.values or (self.values == AUTO and not layout.values):
            return layout
        if layout.values:
            raise SpecError(
                f"lower('{self.layout}', values='{self.values}') names two kinds of values; leave values out, or write "
                f"lower({replace(layout, values='')}, values='{self.values}')"
            )
        return Layout.parse(f"{layout}:{self.values}")

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """One weight after the other is packed, where need be once the machine is measured."""
        if self.layout == AUTO and self.objective == "latency":
            yield from measuring(graph)
        whole = self.layout.split(":")[0] == DENSE
        chosen = select_weights(graph, self.targets, self.ignore) if whole else self._masked(graph)
        layout = Layout.parse("csr" if self.layout == AUTO else self.layout)  # auto may take any of them
        each = Quantised.packing if self.values else 0.0 if layout.stays else layout.kind.packing
        for weight in chosen:
            if each and not never_packed(graph, weight):
                name, pieces = str(layout), weight.numel / TRIED
                sample = Looked(f"pack {name} {self.values}", partial(_tried, layout, weight.dtype), pieces)
                taken = {"a packed weight and what it takes to pack it": int(each * weight.numel)}
                yield Phase("packing", weight.name, taken, sample=sample)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises KernelError or FormatError, naming the weight, for what the format that was asked for cannot serve."""
        if self.layout == DENSE and not self.values:
            return self._on_dense_kernel(graph, context)
        whole = self.layout.split(":")[0] == DENSE
        chosen = select_weights(graph, self.targets, self.ignore) if whole else self._masked(graph)
        chosen = [w for w in chosen if w.packed is None]
        reasons = {w.name: context.keep_dense.get(w.name) or never_packed(graph, w) for w in chosen}
        packable = [w for w in chosen if not reasons[w.name]]
        notes: list[str] = [] if chosen else ["no selected weight has a mask, so nothing was packed"]
        check_rounded(packable, self.values or ("" if self.layout == AUTO else Layout.parse(self.layout).values))
        if self.layout == AUTO:
            plans, said = self._choices(graph, context, packable)
            notes += said
            for name, plan in plans.items():
                if plan.best.layout.stays:
                    reasons[name] = "; ".join(filter(None, (reasons.get(name), plan.reason)))
        else:
            for weight in packable:  # what will be refused is refused before any dense weight is gone
                self._check(graph, weight, self._rows(context), whole)
            plans = {}
        if sum(w.nbytes_dense for w in packable if context.owns(w.name)) >= LARGE:
            gc.collect()  # tracing leaves cycles that hold the weights: SmolLM2's peak lies 419 MB above the model, so 184
        done = []
        told: dict[str, list[str]] = {}
        dense: dict[str, list[str]] = {}
        for weight in context.each_of("lower", chosen):
            if reason := reasons[weight.name]:
                graph.update(weight.name, reason=reason)
                dense.setdefault(reason, []).append(weight.name)
                continue
            done.append(self._lower(graph, weight, plans.get(weight.name), context, told))
        notes += [f"{some(names)}: {said}" for said, names in told.items()]
        done = [w for w in done if w.packed is not None]
        notes += self._on_digits(done, context)
        notes += [
            f"{some(names)} {'stay' if names[1:] else 'stays'} dense: {reason}" for reason, names in dense.items()
        ]
        own = _own_dense_kernels(graph, plans)
        graph.module.graph.lint()
        graph.module.recompile()
        return _result(self.layout, done, own, notes)

    def _on_digits(self, done: list[Weight], context: Context) -> list[str]:
        """What is to be said of the digits that kernels make of x: the same of all, so one small matrix tells."""
        packed = [w.packed for w in done if isinstance(w.packed, Quantised) and w.nnz]
        if not packed:
            return []
        least = min(packed, key=lambda p: p.nbytes)
        said = digits_said(least, select_kernel(Problem.of(least, self._rows(context))))
        return [said] if said else []

    def _on_dense_kernel(self, graph: Graph, context: Context) -> PassResult:
        linears = [w for w in graph.weights.values() if w.packed is None and graph.is_linear(w.name)]
        everything = self.targets or tuple(dict.fromkeys(w.group for w in linears))
        chosen = {w.name for w in select_weights(graph, everything, self.ignore)}
        selected = [w.name for w in linears if w.name in chosen]
        refused: dict[str, list[str]] = {}
        for name in selected:
            if reason := no_own_kernel(graph, name, context.unswappable):
                refused.setdefault(reason, []).append(name)
                continue
            use_dense_kernel(graph, name, OWN)
            graph.update(name, reason="lower(dense) keeps it as it is, on sparsec's dense kernel")
        graph.module.graph.lint()
        graph.module.recompile()
        left = sum(map(len, refused.values()))
        notes = [
            f"{some(names)}: torch's kernel serves {'them' if names[1:] else 'it'}, since {reason}"
            for reason, names in refused.items()
        ]
        summary = f"{len(selected) - left} of {len(selected)} dense weights on sparsec's dense kernel, nothing packed"
        return PassResult(changed=left < len(selected), summary=summary, notes=tuple(notes))

    def _masked(self, graph: Graph) -> list[Weight]:
        masked = {w.name for w in graph.masked()}
        if self.targets is None and not self.ignore:
            return list(graph.masked())
        everything = self.targets or tuple(dict.fromkeys(w.group for w in graph.masked()))
        return [w for w in select_weights(graph, everything, self.ignore) if w.name in masked]

    def _choices(self, graph: Graph, context: Context, packable: list[Weight]) -> tuple[dict[str, Choice], list[str]]:
        """The best way for every weight that is multiplied by: packed where it may be, else by the better dense kernel."""
        may_pack = {w.name for w in packable}
        dense = [w for w in graph.weights.values() if w.packed is None and graph.is_linear(w.name)]
        weights = [w for w in dense if self._selected(graph, w)]
        rows = self._rows(context)
        setting = Setting(self.objective, rows, prompt_tokens=self.prompt_tokens or 0, new_tokens=self.new_tokens or 1)
        notes: list[str] = []
        if self.objective == "latency":
            constants, notes = constants_for(graph, weights, context.progress)
            working_set = sum(w.nbytes for w in graph.weights.values() if graph.is_linear(w.name))
            setting = replace(setting, constants=constants, working_set=working_set)
            if self.tokens is None and rows > 1:
                notes.append(
                    f"formats are chosen for {rows} tokens at a time, since the model does not generate; for another workload "
                    "say lower(auto, tokens=...)"
                )
        found = {}
        for weight in context.each_of("choosing formats", weights):
            mask = graph.mask_matrix(weight.name) if weight.name in may_pack else None
            kernels = dense_kernels(graph, weight, context.unswappable)
            if mask is not None or OWN in kernels:
                fused = any(op.members for op in graph.products_of(weight.name))
                matrix = graph.matrix(weight.name)
                own = replace(setting, fused=fused, device=matrix.device.type)
                if mask is not None:
                    own = replace(own, values=admitted(self.values, self.bound, matrix, mask, weight.rounded)[0])
                found[weight.name] = choose(matrix, mask, own, kernels)
        return found, notes

    def _selected(self, graph: Graph, weight: Weight) -> bool:
        """Masked or not; what has no mask is never packed, but its dense kernel may be another."""
        wanted = self.targets is None or any(matches(graph, weight, pattern) for pattern in self.targets)
        return wanted and not any(matches(graph, weight, pattern) for pattern in self.ignore)

    def _lower(
        self, graph: Graph, weight: Weight, plan: Choice | None, context: Context, told: dict[str, list[str]]
    ) -> Weight:
        layout = Layout.parse(self.layout) if plan is None else plan.best.layout
        wanted = Wanted(layout, (self.values or layout.values) if plan is None else "", self.bound, self.digits)
        packed, facts = wanted.packed(graph, weight, context.store)
        for said in facts["told"]:
            told.setdefault(said, []).append(weight.name)
        reason = plan.reason if plan is not None else facts["reason"]
        if reason:
            graph.update(weight.name, reason=reason)
        if packed is None:
            return graph.weights[weight.name]
        kernel = select_kernel(Problem.of(packed, self._rows(context)))
        if context.owns(weight.name):
            context.put(weight, graph.tensor(weight.name).detach().new_empty(0))
        return lower_weight(graph, weight.name, packed, kernel.name)

    def _check(self, graph: Graph, weight: Weight, rows: int, whole: bool) -> None:
        """Whether format and kernel serve this weight, asked of the mask alone. whole: where all of it is stored."""
        tensor = graph.tensor(weight.name)
        mask, device = graph.mask_matrix(weight.name), tensor.device.type
        if whole:
            mask = torch.ones(1, 1, dtype=torch.bool, device=tensor.device).expand(weight.matrix_shape)
        assert mask is not None
        wanted = Layout.parse(self.layout)
        if self.values:  # which ones is settled by the weight; none holds other masks than another
            wanted = replace(wanted, values=EXAMPLES[0])
        if wanted.kind.devices is not None and device not in wanted.kind.devices:
            twin = wanted.kind.twins.get(device)
            moved = (
                f"use lower({twin}), which becomes {wanted.format} when the compiled model is moved, or "
                if twin
                else ""
            )
            places = " and ".join(wanted.kind.devices)
            raise KernelError(
                f"{weight.name}: {wanted.format} is laid out for {places}, and this weight is on {device}; {moved}move the model "
                "first"
            )
        try:
            layout, _ = wanted.planned(mask, weight.dtype)
            problem = Problem(layout.kind.format, *weight.matrix_shape, rows, weight.dtype, device, layout=str(layout))
            select_kernel(problem)
        except (FormatError, KernelError) as error:
            owner = weight.owners[0] if weight.owners else weight.name
            way_out = f"or leave it dense with {unparse_one(replace(self, ignore=(*self.ignore, owner)))}"
            if weight.grown:
                way_out = f"{weight.grown:,} of its pruned values came back after freeze, so prune again, {way_out}"
            raise type(error)(f"{weight.name}: {error}; {way_out}") from error

    def _rows(self, context: Context) -> int:
        return 1 if self.new_tokens else self.tokens or context.rows


def _tried(layout: Layout, dtype: torch.dtype) -> object:
    """Packs a piece of a weight, half of it kept where the layout leaves that free."""
    mask = layout.sample_mask((1024, TRIED // 1024), 0.5, torch.Generator().manual_seed(0))
    return layout.pack(torch.randn(mask.shape).to(dtype), mask)


def _own_dense_kernels(graph: Graph, plans: dict[str, Choice]) -> list[str]:
    """Weights that stay dense, but not with F.linear."""
    names = [n for n, plan in plans.items() if plan.best.layout.stays and plan.best.kernel == OWN]
    for name in names:
        use_dense_kernel(graph, name, OWN)
    return names


def _result(layout: str, done: list[Weight], own: list[str], notes: list[str]) -> PassResult:
    dense, packed = sum(w.nbytes_dense for w in done), sum(w.nbytes for w in done)
    if packed > dense:
        notes.append(
            f"the packed weights are larger than the dense ones, {packed / 1e6:.1f} MB against {dense / 1e6:.1f} MB: at "
            "this sparsity the column numbers cost more than the zeros save; prune further or keep these layers dense"
        )
    second = sum(gpu_semi_structured.held_bytes(w.packed) for w in done if w.packed is not None)
    if second:
        notes.append(
            f"{gpu_semi_structured.MANY} rows of x and more are multiplied by 2:4 weights through cuSPARSELt, whose form of them "
            f"takes {second / 1e6:.1f} MB beside the packed one from the first such product on; "
            f"{gpu_semi_structured.SWITCH}=0 keeps it out"
        )
    formats = Counter(w.format for w in done)
    chosen = ", ".join(f"{n} {name}" for name, n in formats.most_common()) if layout == AUTO else ""
    # Not always what was asked for: lists are laid out for the device that they are on.
    names = sorted({w.packed.format for w in done if w.packed is not None}) or [layout]
    count = f"{len(done)} weights packed" + ("" if layout == AUTO else f" as {', '.join(names)}")
    summary = f"{count}{f' ({chosen})' if chosen else ''}: {dense / 1e6:.1f} MB -> {packed / 1e6:.1f} MB"
    summary += f", {packed / dense:.2f}x of dense" if dense else ""
    if own:
        summary += f"; {len(own)} stay dense, on sparsec's dense kernel"
    return PassResult(changed=bool(done or own), summary=summary, notes=tuple(notes))
