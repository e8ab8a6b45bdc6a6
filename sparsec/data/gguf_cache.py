"""GGUF files: de-quantised once into a folder that transformers loads in under a second.

transformers needs half a minute to de-quantise even a small file, and leaves a model that believes itself quantised.
So the result is made an ordinary model and kept in the user's cache folder, keyed by the file's hash and the dtype.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from sparsec import cache, files
from sparsec.data.quiet import quiet
from sparsec.errors import DataError, MissingExtraError
from sparsec.progress import Progress

_FACTS = "sparsec_source.json"
_LAYOUT = "2"  # of the cached folder; a change of what is written there takes the next number
_MAGIC = b"GGUF"
_SCRATCH = ".converting-"


def converted(file: Path, dtype: torch.dtype, progress: Progress | None = None) -> tuple[Path, str, tuple[str, ...]]:
    """The folder with the de-quantised model, in words what it was quantised as, and its tensors that no module owns.

    Converts on the first call.

    Raises DataError for a file that is no whole GGUF or a disk that is full, CacheError for a cache folder that cannot be used,
    MissingExtraError without gguf and accelerate.
    """
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise DataError(
                f"{file}: a GGUF file begins with the bytes GGUF, this one does not; is the download whole?"
            )
        stream.seek(0)
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache.folder("models") / f"{key}-{str(dtype).removeprefix('torch.')}-{_LAYOUT}"
    facts = _kept(folder)
    if facts is None:
        _convert(file, dtype, folder, progress)
        facts = _kept(folder) or ("unknown", ())
    return folder, *facts


def _kept(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """What a converted model was quantised as, and what of it no module owns; None where there is none, or one that is damaged,
    which is deleted."""
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / _FACTS).read_text("utf-8"))
        return str(facts["precision"]), tuple(map(str, facts["unowned"]))
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _convert(file: Path, dtype: torch.dtype, folder: Path, progress: Progress | None) -> None:
    say = progress or (lambda what, done, total: None)
    what = f"converting {file.name} (once)"
    say(what, 0, 3)
    precision, names = _tensors(file)
    say(what, 1, 3)
    with quiet():
        model, tokenizer, left = _read(file, dtype, names)
        say(what, 2, 3)
        facts = {"file": file.name, "precision": precision, "unowned": left}
        _keep(model, tokenizer, folder, facts)
    say(what, 3, 3)


def _keep(model: Any, tokenizer: Any, folder: Path, facts: dict[str, Any]) -> None:
    try:
        files.sweep(folder.parent, f"{_SCRATCH}*")
        # Written beside its place and then renamed: an interrupted conversion leaves nothing that looks whole.
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder.parent))
        try:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            (scratch / _FACTS).write_text(json.dumps(facts), "utf-8")
            for path in scratch.iterdir():
                files.to_disk(path)
            _move(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the converted model cannot be kept there ({error.strerror or error}); "
            f"make room, or {cache.WAY_OUT}"
        ) from error


def _move(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not (folder / _FACTS).is_file():  # else another process was faster, and its result is the same
            raise


def _tensors(file: Path) -> tuple[str, list[str]]:
    """In words what a file is quantised as, and the names of its tensors."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(f'{file}: GGUF files need the package gguf; `pip install "sparsec[gguf]"`') from error
    try:
        tensors = gguf.GGUFReader(file).tensors
    except Exception as error:  # the reader trusts the file: a damaged one ends in whatever its bytes lead to
        raise _damaged(file, error) from error
    types = Counter(t.tensor_type.name for t in tensors)
    precision = "de-quantised from " + ", ".join(f"{name} ({n} tensors)" for name, n in types.most_common())
    return precision, [str(t.name) for t in tensors]


def _unowned(model: Any, names: Iterable[str]) -> list[str]:
    """The tensors that transformers found no place for in the model."""
    from transformers import modeling_gguf_pytorch_utils as of_gguf

    kind = model.config.model_type
    processor = of_gguf.TENSOR_PROCESSORS.get(kind, of_gguf.TensorProcessor)(config=model.config.to_dict())
    known = of_gguf.get_gguf_hf_weights_map(model, processor)
    head = (
        () if model.get_output_embeddings() is None else ("output.weight",)
    )  # which GPT-2's way knows without the table
    return sorted(set(names) - {*known, *head})


def _read(file: Path, dtype: torch.dtype, names: Iterable[str]) -> tuple[Any, Any, list[str]]:
    """The model, its tokenizer, and those of the file's tensors that no module owns."""
    import transformers

    folder, name = str(file.parent), file.name
    try:
        # The progress bar of de-quantising heeds no setting: it writes to whatever sys.stderr is.
        with redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=dtype, trust_remote_code=False
            )
    except ImportError as error:
        raise MissingExtraError(f'{file}: {error}; `pip install "sparsec[gguf]"` brings what is needed') from error
    except Exception as error:
        if "accelerate is required" in str(error):  # a ValueError, though it is about a package
            raise MissingExtraError(f'{file}: GGUF files need accelerate; `pip install "sparsec[gguf]"`') from error
        raise _damaged(file, error) from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, tokenizer, _unowned(model, names)


def _damaged(file: Path, error: Exception) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{file}: this GGUF file cannot be read ({type(error).__name__}: {first}); "
        f"it may be damaged or cut off, or of an architecture that transformers does not read"
    )
