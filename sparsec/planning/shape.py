"""A model from its config alone, on torch's device meta: no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsec.counts import MOST_PARTS, counts_asked
from sparsec.data import hub
from sparsec.data.folders import check_file, check_folder, local_path
from sparsec.data.kinds import check_kind, kind_of
from sparsec.data.models import PACKAGED, packaged
from sparsec.data.quiet import quiet
from sparsec.data.tiny import tiny_model
from sparsec.errors import DataError, first_words

WIDEST = 1 << 24
"""Columns of a weight."""
SPECS = "give a folder with a config.json, that file, a .gguf file, a hub id, or `tiny`"


def shape_of_model(spec: str, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """(the model, its name) of a folder with a config.json, of such a file, of a .gguf file, of a hub id, or `tiny`.

    dtype: None is that of the config, where it names one, else bfloat16. Raises DataError for what is no config of a model.
    """
    import transformers

    if spec == "tiny":
        with torch.device("meta"):
            return tiny_model(dtype=dtype or torch.float32), spec
    path = packaged() if spec == PACKAGED and local_path(spec) is None else local_path(spec)
    where, options, name, away = spec, dict[str, Any](), spec, ""
    if path is not None:
        name = path.resolve().stem
        if path.is_dir():
            check_folder(path)
            where, name = str(path), path.resolve().name
        elif path.suffix == ".json":
            where, name = str(path), path.resolve().parent.name
        else:
            check_file(path)
            where, options = str(path.parent), {"gguf_file": path.name}
    elif Path(spec).suffix == ".json" or spec.startswith((".", "/", "~")):
        raise DataError(f"{spec}: there is no such file; give a config.json, or the folder that holds it")
    else:
        away = hub.unreachable()
        options = {"local_files_only": bool(away)}
    with quiet():
        try:
            content = transformers.PreTrainedConfig.get_config_dict(where, **options)[0]
            for count, number, most in counts_asked(content, MOST_PARTS):
                raise DataError(f"{spec}: {count} is {number:,}, and a plan takes {most:,} at most")
            if "gguf_file" in options:  # read once: it takes seconds, since the vocabulary is in it
                config = transformers.AutoConfig.for_model(**content)
            else:
                config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
            kind = kind_of(where, config)
            with torch.device("meta"):
                model: Any = kind.empty(config)
        except DataError:
            raise
        except Exception as error:  # transformers has its own errors for each thing that may be wrong
            asked = hub.hub_name(spec) if path is None else None
            if asked is not None and (said := away or hub.fault(asked, error)):
                raise DataError(
                    f"{spec}: {hub.near(spec)}There is no folder or file of this name here, and {said}; {SPECS}"
                ) from error
            first = first_words(error)
            raise DataError(
                f"{spec}: this is no config of a model that transformers knows ({first}); {SPECS}"
            ) from error
    check_kind(where, model)
    for weight, parameter in model.named_parameters():
        if not parameter.numel() or parameter.shape[-1:] > (WIDEST,):
            raise DataError(
                f"{spec}: this config makes {weight} {list(parameter.shape)}; a plan takes sizes from 1 to {WIDEST:,} columns"
            )
    named = getattr(config, "dtype", None)
    known = named if isinstance(named, torch.dtype) and named.is_floating_point else torch.bfloat16
    return model.to(dtype or known).eval(), name
