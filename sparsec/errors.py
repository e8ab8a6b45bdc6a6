"""The errors a user can meet. Each message names the thing, the rule, the value and the way out.

`assert` is kept for our own mistakes; everything that bad input can cause is one of these.
"""

from __future__ import annotations

from collections.abc import Iterable


class SparsecError(Exception):
    """Base of all errors that sparsec raises on purpose."""


class ArgumentError(SparsecError, TypeError):
    """An argument of a kind that the function does not take."""


class SpecError(SparsecError, ValueError):
    """A pass specification such as `magnitude(0.5),freeze` that cannot be read, or an option outside its range."""


class SelectionError(SparsecError, ValueError):
    """A pattern in `targets=` or `ignore=` that matches nothing."""


class PipelineError(SparsecError, ValueError):
    """A sequence of passes that is not legal: a pass needs a fact that no earlier pass produces."""


class TraceError(SparsecError):
    """A model that cannot be traced into a graph; says which rung of the ladder failed where."""


class MaskError(SparsecError, ValueError):
    """A mask of the wrong shape, dtype or name."""


class WeightError(SparsecError, ValueError):
    """A weight that cannot be pruned or packed, such as one that holds NaN, or a write to one that is packed."""


class ActivationError(SparsecError, ValueError):
    """Activations that nothing can be learned from, such as NaN while calibrating; names the block."""


class RecoverError(SparsecError, RuntimeError):
    """Training under masks that cannot go on: no masks, no teacher, no memory, a loss that is NaN, a state of another run."""


class RanksError(SparsecError, RuntimeError):
    """Several processes that cannot work as one: one is gone, hangs or failed, or they were started with different things."""


class FormatError(SparsecError, ValueError):
    """Packed tensors that do not form a valid matrix, or a matrix that a format cannot hold."""


class OfferedError(SparsecError, RuntimeError):
    """A format or a kernel of another package that does not keep what it promises; names it and what it did."""


class KernelError(SparsecError, RuntimeError):
    """No kernel serves the request; lists every kernel with its reasons."""


class CheckpointError(SparsecError, ValueError):
    """A saved model that is missing, damaged or of another version, or a folder that cannot be written; names the file."""


class SpillError(SparsecError, OSError):
    """Files that passes keep their work in cannot be written or read; names the folder."""


class ConstantsError(SparsecError, ValueError):
    """Constants of the cost model whose file is missing, damaged, or of another version."""


class BuildError(SparsecError, RuntimeError):
    """The native kernels could not be built; carries the compiler's own words."""


class CacheError(SparsecError):
    """The user's cache folder cannot be made, read or written."""


class UnsafeCacheError(CacheError):
    """A cache folder that is refused: there is no place for one, it is somebody else's, or others can put theirs in its place."""


class VerifyError(SparsecError, AssertionError):
    """A graph that breaks an invariant after a pass: a defect of that pass, not of the input."""


class EmitError(SparsecError):
    """A lowered graph that cannot be put back into the model."""


class CompileError(SparsecError):
    """A model that `compile` refuses, with the reason."""


class DataError(SparsecError):
    """A model or text that cannot be found or read."""


class TorchVersionError(SparsecError, ImportError):
    """The torch that is installed lacks something; names it, and the releases that are tested."""


class MissingExtraError(SparsecError, ImportError):
    """An optional package is needed; names the extra that installs it."""


class SparsecWarning(UserWarning):
    """What the caller of a function should know of its result; the commands show it as a notice."""


def briefly(error: BaseException) -> str:
    """An error of others in a line: torch adds the calls in C++ below its own."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def first_words(error: BaseException) -> str:
    """The first line of what an error of others says, and the next one where that only announces it; its type where it is mute."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def some(names: Iterable[str]) -> str:
    """The first three of a list, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
