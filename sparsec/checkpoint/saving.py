"""Ways out of a compiled or a loaded model: a packed folder, a dense one, a dense model, the hub."""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from sparsec.arguments import checked
from sparsec.checkpoint.dense import dense_copy, save_dense
from sparsec.checkpoint.options import usable
from sparsec.checkpoint.pretrained import save_packed
from sparsec.checkpoint.record import History
from sparsec.checkpoint.upload import Repository, label, written_at
from sparsec.errors import CheckpointError
from sparsec.ir.groups import of_peft
from sparsec.report.collect import Report
from sparsec.report.schema import document


class Saveable(ABC):
    """Base of what `.sparsec` holds."""

    @abstractmethod
    def whole(self) -> nn.Module:
        """The model. CheckpointError where there is none."""

    @abstractmethod
    def history(self, report: Report | None = None) -> History:
        """What a saved model tells of how it came to be. report: one to tell in place of its own."""

    @property
    @abstractmethod
    def lowered(self) -> bool:
        """Whether the pass lower ran: then it is saved packed."""

    def to_dense(self) -> nn.Module:
        """A model of the same class with dense linears, which hold the zeros; shares no memory with this one."""
        return dense_copy(self.whole())

    @checked
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dense: bool = False,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Saves the model into a folder, for `sparsec.load` and transformers.

        dense: as an ordinary checkpoint with zeros, which loads without sparsec. options: `tokenizer`, `max_shard_size`, `report`
        (one that was measured, to be kept in place of what is counted), `name` (by which the card loads the model, else that of the
        folder) and those of transformers; CheckpointError for one that cannot be honoured. A model that transformers gave adapters
        saves those alone.
        """
        model: Any = self.whole()
        if getattr(model, "_hf_peft_config_loaded", False) and not dense:
            given = {**options, "is_main_process": is_main_process, "push_to_hub": push_to_hub}
            type(model).save_pretrained(model, folder, **given)
            return
        refuse_adapters(model)
        if "repo_id" in options and not push_to_hub:
            raise CheckpointError("save_pretrained: repo_id is given, and push_to_hub=True is not")
        repository = Repository.taken_from(options, Path(os.path.abspath(folder)).name)
        options = usable(model, options, dense or not self.lowered)
        if not is_main_process:
            return
        if not push_to_hub:
            self._write(folder, dense, options)
            return
        repository, before = repository.made(), written_at(folder)
        self._write(folder, dense, options, repository.repo_id)
        repository.upload(folder, [name for name, when in written_at(folder).items() if when != before.get(name)])

    @checked
    def push_to_hub(self, repo_id: str, *, tags: Any = None, dense: bool = False, **options: Any) -> Any:
        """Uploads what `save_pretrained` writes; returns what the hub says of the commit. options: as transformers has them."""
        model: Any = self.whole()
        if getattr(model, "_hf_peft_config_loaded", False) and not dense:
            return type(model).push_to_hub(model, repo_id, tags=tags, **options)
        refuse_adapters(model)
        repository = Repository.taken_from(options, repo_id)
        options = usable(model, options, dense or not self.lowered)
        labels = [*(getattr(model, "model_tags", None) or ()), *([tags] if isinstance(tags, str) else tags or ())]
        repository = repository.made()
        with tempfile.TemporaryDirectory() as folder:
            self._write(folder, dense, options, repository.repo_id)
            if labels:
                label(folder, labels)
            return repository.upload(folder, list(written_at(folder)))

    def _write(self, folder: Any, dense: bool, options: dict[str, Any], name: str | None = None) -> None:
        if dense or not self.lowered:
            save_dense(self.whole(), folder, **options)
        else:
            history = self.history(options.pop("report", None))
            options = {"name": name, **options}
            save_packed(self.whole(), folder, history=history, **options)


def encoded(report: Report) -> bytes:
    """A report as it stands in a file."""
    return json.dumps(document(report), indent=1, allow_nan=False).encode()


def refuse_adapters(model: nn.Module) -> None:
    """CheckpointError where peft put its layers into a model: nobody could load those from the model's own folder."""
    if (inside := next((path for path, m in model.named_modules() if path and of_peft(m)), None)) is not None:
        raise CheckpointError(
            f"{inside} is a layer of peft: save the adapter by its own save_pretrained, and the model before the adapter is "
            "added or after it is taken off (unload) or merged (merge_and_unload)"
        )
