"""Names on the Hugging Face hub: `org/name` or `org/name@revision`, and in plain words why one did not come.

Every part of huggingface_hub that is used here is imported by its own module: what the package itself shows is loaded on
demand, and differs from release to release.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsec.errors import DataError

TINY, PACKAGED = "tiny", "smollm2"
"""Names of models that are on no hub."""
_NAME = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_PROBE_SECONDS = 5
WEIGHTS = ("*.safetensors", "*.json")
"""Files of a model, without its tokenizer."""


@dataclass(frozen=True)
class HubName:
    """A model on the hub; revision: a branch, tag or commit, None for the newest."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def hub_name(spec: str) -> HubName | None:
    """What a specification names, None for what cannot be a name on the hub."""
    found = _NAME.fullmatch(spec)
    return None if found is None else HubName(found["id"], found["revision"])


def near(spec: str) -> str:
    """A question with the name that was meant, where it is one of those; else nothing."""
    found = difflib.get_close_matches(spec, (TINY, PACKAGED), n=1, cutoff=0.7)
    return f"did you mean `{found[0]}`? " if found else ""


def fetched(name: HubName, files: Sequence[str]) -> Path:
    """The folder of the hub's cache that holds what a model has of these files, named by patterns. Raises DataError."""
    from huggingface_hub import _snapshot_download

    reason = unreachable()
    try:
        found = _snapshot_download.snapshot_download(
            name.id, revision=name.revision, allow_patterns=list(files), local_files_only=bool(reason)
        )
    except Exception as error:  # of the hub's library, and of whichever HTTP client it uses
        said = reason or fault(name, error) or str(error)
        raise DataError(f"{name}: it cannot be had from the hub: {said}") from error
    return Path(found)


def unreachable() -> str:
    """Why the hub is not asked, "" where it answers: its own client would try for half a minute, file by file."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    try:
        session = utils.get_session()  # type: ignore[attr-defined]
        session.head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception as error:  # whichever HTTP client the hub's library uses, in its version, has its own errors
        return f"the hub, {constants.ENDPOINT}, does not answer ({type(error).__name__})"
    return ""


def fault(name: HubName, error: BaseException) -> str:
    """What the hub's answer means and the way out; "" where an error is not the hub's."""
    from huggingface_hub import errors

    kinds = [type(link) for link in _chain(error)]

    def is_a(kind: type[Exception]) -> bool:
        return any(issubclass(found, kind) for found in kinds)

    if is_a(errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return (
            "this model is gated: its owner gives access on request; ask for it on the model's page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if is_a(errors.RevisionNotFoundError):
        return (
            f"the hub has this model, but no branch, tag or commit {name.revision or 'main'!r} of it; correct what follows "
            "the @, or leave it out"
        )
    if is_a(errors.RepositoryNotFoundError):
        return (
            "the hub has no such model, or it is private; check the spelling (org/name), or log in with "
            "`hf auth login` for a private one"
        )
    if is_a(errors.LocalEntryNotFoundError):
        return f"not whole in the hub's local cache; with a network, `hf download {name.id}` brings it"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
