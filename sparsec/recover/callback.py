"""RegrowCallback: masks that move while transformers' Trainer trains a model (regrow.py says how and whence).

The dense gradient is added up in the steps in which masks are due to move, and in no others. Each checkpoint gets a file with the
masks that belong to its weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from sparsec import files, serial
from sparsec.errors import RecoverError, SparsecWarning, SpecError, briefly, some
from sparsec.pipeline.options import check_choice, check_number, check_positive, check_whole
from sparsec.recover.holding import Holding, holding_of
from sparsec.recover.regrow import WAYS, Regrowth, forget, receive

MASKS = "sparsec_masks.safetensors"
"""Beside the weights of a checkpoint: bool tensors, True where a weight is kept, by the weights' names."""


class RegrowCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Moves the masks of a model that `sparsec.masked` gave back, while Trainer trains it: `Trainer(callbacks=[RegrowCallback()])`.

    way: every `every` steps, 2 or more, the weakest of the kept weights go, and as many others come: where the gradient is largest
    (`'rigl'`, Evci et al. 2020, arXiv:1911.11134), or at random (`'set'`, Mocanu et al. 2018, arXiv:1707.04780; `seed`). share: of
    the kept weights, at first; it falls as a cosine and is zero after three quarters of the steps. The count of every matrix stays,
    N:M groups and blocks stay legal. What comes begins at zero and learns from the next step on, with the mean of the second
    moments of what stayed, where the optimiser has such (Adam).

    A checkpoint gets its masks in `sparsec_masks.safetensors`; resuming from it, and `load_best_model_at_end`, read them. Several
    processes of DistributedDataParallel have the same masks. Where a gradient is not finite, a mask stays and a SparsecWarning says
    so. Afterwards `sparsec.extend(model, "lower(auto)")` goes on.

    Raises SpecError for a wrong option; while training RecoverError: a model that is not masked, of which no masked weight is
    trained, or a checkpoint without masks or with those of other weights.
    """

    def __init__(self, way: str = "rigl", share: float = 0.3, every: int = 20, seed: int = 0) -> None:
        check_choice(way, "way", WAYS)
        check_number(share, "share", above=0.0, most=1.0)
        check_positive(every, "every")
        if every == 1:
            raise SpecError(
                "every must be at least 2 steps, got 1: what comes begins at zero and learns from the next step on, so that it "
                "would be the weakest and go again before it learned; in a real run take 20 or more"
            )
        check_whole(seed, "seed")
        self.regrowth = Regrowth(way, share, every, seed)
        self._moving = False  # in the step that began

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """A state that is loaded from now on belongs to other masks than those that are held."""
        holding_of(model).waits = True

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Reads the masks of the checkpoint that the training goes on from."""
        holding = holding_of(model)
        if not any(parameter.requires_grad for _, parameter, _ in holding.held()):
            raise RecoverError(
                "no masked weight of this model is trained, so that no mask can move: RegrowCallback needs weights with "
                "requires_grad=True, and not adapters alone"
            )
        if state.global_step > 0:
            if not holding.waits:
                raise RecoverError(
                    "the checkpoint was loaded before RegrowCallback was there, and what its masks keep is lost: give the callback "
                    "to the Trainer when that is made, Trainer(callbacks=[RegrowCallback()]), and no model_init"
                )
            read_masks(holding, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        holding.waits = True
        self._moving = False

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Has the dense gradients added up where masks move by them."""
        before, self._moving = (
            self._moving,
            self.regrowth.due(state.global_step, state.global_step / max(1, state.max_steps)),
        )
        if before or self._moving:
            holding_of(model).record(self._moving and self.regrowth.way == "rigl")

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        """Moves the masks."""
        if not self._moving:
            return
        holding = holding_of(model)
        gradients = holding.record(on=False)
        self._moving = False
        step, done = state.global_step, state.global_step / max(1, state.max_steps)
        numbers = {weight.name: number for number, weight in enumerate(holding.graph.masked())}
        moved, broken = dict[str, Tensor](), list[str]()
        for name, parameter, mask in list(holding.held()):
            if name in moved:  # a tie that broke: another parameter under the same mask
                forget(parameter, moved[name], optimizer)
                receive(parameter, mask, moved[name], optimizer)
                continue
            if not parameter.requires_grad:
                continue
            gradient: Tensor | None = parameter.detach()
            if self.regrowth.way == "rigl":
                gradient = _over_processes(gradients.pop(name, None), parameter)
            if gradient is None:
                continue
            if not bool(gradient.isfinite().all()):
                broken.append(name)
                continue
            moved[name] = self.regrowth.move(
                holding.graph.weights[name],
                mask,
                parameter,
                gradient,
                optimizer,
                step=step,
                number=numbers[name],
                done=done,
            )
            holding.graph.update(name, mask=moved[name])
        if broken:
            text = (
                f"the gradient was not finite in step {step + 1}, so that these masks stay as they are: {some(broken)}"
            )
            warnings.warn(text, SparsecWarning, stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Writes the masks into the checkpoint."""
        if state.is_world_process_zero:
            write_masks(holding_of(model), Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Reads the masks of the best model, where that was loaded."""
        holding = holding_of(model)
        holding.record(on=False)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            read_masks(holding, Path(state.best_model_checkpoint))


def write_masks(holding: Holding, folder: Path) -> None:
    """Writes the masks that are held beside the weights of a checkpoint. RecoverError where that fails."""
    made = folder / f".{MASKS}.tmp"
    try:
        save_file({name: mask.cpu().contiguous() for name, _, mask in holding.held()}, made)
        files.put_in_place(made, folder / MASKS)
    except (OSError, SafetensorError) as error:
        made.unlink(missing_ok=True)
        raise RecoverError(f"{folder / MASKS}: the masks cannot be written: {briefly(error)}") from error


def read_masks(holding: Holding, folder: Path) -> None:
    """Takes the masks of a checkpoint whose weights the model has. RecoverError where they are missing or of other weights."""
    path = folder / MASKS
    if _processes() > 1:
        dist.barrier()  # the first process may still be writing
    if not path.is_file():
        raise RecoverError(
            f"{path}: this file is missing. RegrowCallback writes it, and it says which weights the checkpoint keeps. "
            "Resume from a checkpoint that has one, with the output_dir= that holds it; or load the weights into the dense model "
            "and begin anew from its zeros: sparsec.masked(sparsec.compile(model, 'zeros,freeze'))"
        )
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecoverError(f"{path}: cannot be read: {briefly(error)}; resume from another checkpoint") from error
    held = list(holding.held())
    for name, parameter, _ in held:
        mask = found.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != parameter.shape:
            got = "none" if mask is None else f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise RecoverError(
                f"{path}: these masks are of another model: {name} needs a mask of bool {list(parameter.shape)}, got {got}; "
                "resume from a checkpoint of this model"
            )
        if lost := int(serial.grown(parameter, mask.to(parameter.device))):
            raise RecoverError(
                f"{path}: these masks are not of the weights that were loaded: they prune {lost:,} values of {name} that are not "
                "zero; resume with the output_dir= that holds the checkpoint"
            )
    for name, parameter, _ in held:
        # A copy: what was loaded is the file itself, mapped into memory.
        holding.graph.update(name, mask=found[name].to(parameter.device, copy=True))


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_processes(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The sum of all processes' gradients, the same in each; None where there is none."""
    if _processes() == 1:
        return gradient
    total = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    dist.all_reduce(total)
    return total
