"""transformers loads what sparsec saved: `AutoModel.from_pretrained(folder)` once sparsec is imported, through its own registries.

Who imports transformers first may be sparsec itself, half imported: so this file imports the rest of it when a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsec.transformers_hook import METHOD

if TYPE_CHECKING:
    from sparsec.checkpoint.record import Record
    from sparsec.formats.base import Packed


@register_quantization_config(METHOD)
class SparsecConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of a saved model, as transformers hands it on."""

    def __init__(self, **content: Any) -> None:
        self.quant_method = METHOD
        self.content = {"quant_method": METHOD, **content}

    @property
    def record(self) -> Record:
        """Read and checked. CheckpointError."""
        from sparsec.checkpoint.record import Record

        return Record.read(self.content, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        return dict(self.content)


def _base_prefix(model: Any, layers: Iterable[str]) -> str:
    """Under which the packed layers of a saved model hold this one, where it is their base without its head; else empty."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths, modules = list(layers), dict(model.named_modules())
    inside = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    if len(prefix) < 2 or not inside or any(path in modules for path in paths):
        return ""
    return prefix if all(path in modules for path in inside) else ""


def _look(record: Record, path: str, packed: Packed) -> None:
    """CheckpointError for a share that a kernel must not read."""
    from sparsec.checkpoint.reading import check_packed

    check_packed(path, record.layers[path], packed, "the files")


@register_quantizer(METHOD)
class SparsecQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes room for packed matrices before transformers loads, and checks them after."""

    requires_calibration = True  # a dense model is not pruned by loading it
    quantization_config: SparsecConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """CheckpointError for a record that cannot be used."""
        self.record = self.quantization_config.record

    def get_weight_conversions(self) -> list[Any]:
        """The names in the files to those of the model."""
        from sparsec.checkpoint.record import PREFIX

        return [WeightRenaming(rf"^{PREFIX.replace('.', '[.]')}", "")]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Ours come first: the model's own know names without the prefix."""
        return [*self.get_weight_conversions(), *weight_conversions]

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What was asked for, to which the whole model is converted once it is there; none asked for: that of the config."""
        self.dtype = dtype
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Nothing is cast: packed values go with their positions."""
        return None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from sparsec.checkpoint.embeddings import guard_embeddings
        from sparsec.checkpoint.folder import check_files, file_tensors
        from sparsec.checkpoint.reading import (
            by_name,
            check_packed,
            check_shape,
            dense_faults,
            joint_faults,
            layer_for,
            refuse,
            rest_faults,
            stored_matrix,
            take_dense_kernels,
        )
        from sparsec.checkpoint.record import BUFFERS, below
        from sparsec.errors import CheckpointError
        from sparsec.parallel.plan import processes_wanted, split_dims
        from sparsec.parallel.shares import await_shares

        files: Sequence[str] = kwargs.get("checkpoint_files") or ()
        folder = check_files(files, self.record, str(getattr(model.config, "_name_or_path", "")))
        self.folder = folder
        tensors = dict(file_tensors(folder, self.record))
        outside: list[str] = []
        if prefix := _base_prefix(model, self.record.layers):  # transformers itself finds the tensors of a base model
            outside = [name for name in tensors if not name.startswith((prefix, BUFFERS))]
            tensors, self.record = below(tensors, prefix), self.record.below(prefix)
        named, self.computed = by_name(self.record, tensors)
        refuse("config.json", joint_faults(model, self.record) + dense_faults(self.record, tensors))
        # What the files lack transformers would fill with noise.
        refuse(str(folder), rest_faults(model, self.record, self.record.unpacked(named)))
        self.processes, whole = processes_wanted(model), {}
        for path, stored in self.record.layers.items():
            try:
                old = model.get_submodule(path)
            except AttributeError as error:
                raise CheckpointError(
                    f"config.json: layers names {path!r}, and {type(model).__name__} has no such module; load it as the class that "
                    "was saved"
                ) from error
            packed = stored.on_meta()
            check_packed(path, stored, packed, "config.json")
            check_shape(path, packed, old, "config.json")
            whole[path], _ = stored_matrix(path, stored, named, str(folder), contents=False)
            bias = torch.empty(packed.shape[0], dtype=packed.dtype, device="meta") if stored.bias else None
            model.set_submodule(path, layer_for(old, path, packed, bias, "config.json"))
        take_dense_kernels(model, self.record)  # before transformers, or accelerate, wraps what they find
        guard_embeddings(model)
        self.whole = whole
        if self.processes > 1:  # transformers leaves packed tensors to us, of which each process reads its share
            self.dims = split_dims(model, whole, self.processes)
            await_shares(model.get_submodule(path) for path in whole)  # type: ignore[misc]
            outside += [f"{path}.{name}" for path, stored in self.record.layers.items() for name in stored.tensors]
        ignored: Any = model
        ignored._keys_to_ignore_on_load_unexpected = {
            *(ignored._keys_to_ignore_on_load_unexpected or ()),
            rf"^{BUFFERS}",
            *(rf"^{re.escape(name)}$" for name in outside),
        }
        ignored._keys_to_ignore_on_load_missing = {
            *(ignored._keys_to_ignore_on_load_missing or ()),
            *(rf"^{re.escape(name)}$" for name in self.record.tied),
        }
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from sparsec.checkpoint.folder import saved_report
        from sparsec.checkpoint.reading import check_packed, make_groups, put_computed, say_loaded, tie
        from sparsec.errors import CheckpointError
        from sparsec.kernels.modules.packed_layer import PackedLayer
        from sparsec.parallel.shares import take_shares, whole_groups

        whole = self.__dict__.pop("whole")
        offloaded = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        if self.processes > 1:
            take_shares(model, whole, self.dims, check=partial(_look, self.record))
            tie(model, self.record.without(self.dims), "config.json")
        else:
            tie(model, self.record, "config.json")
            for path, stored in self.record.layers.items():
                layer = model.get_submodule(path)
                assert isinstance(layer, PackedLayer)
                away = layer.packed.values.is_meta  # offloaded: what will come is what the files hold
                check_packed(path, stored, whole[path] if away else layer.packed, "the files")
                layer.lay_out(layer.packed.values.device.type)
        put_computed(model, self.computed, "the files")
        make_groups(model, whole_groups(model, self.record.groups))
        if self.dtype != (self.record.dtype or self.dtype):
            if offloaded:
                raise CheckpointError(
                    f"from_pretrained: dtype={self.dtype} with offloaded layers: {self.folder} holds {self.record.dtype}, and "
                    "what is offloaded is not converted; leave dtype out, or convert sparsec.load(folder).to(dtype) and save that"
                )
            model.to(self.dtype)
        name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
        say_loaded(model, self.record, name, saved_report(self.folder, self.record))
        return model

    def is_serializable(self) -> bool:
        """It is saved as it was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it; its packed weights cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes it."""
        return True
