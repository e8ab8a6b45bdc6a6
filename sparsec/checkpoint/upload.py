"""A folder that was just written, as a commit in a repository of the Hugging Face hub."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Repository:
    """Where to upload, and what the commit says. Fields as in transformers' push_to_hub."""

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any], repo_id: str) -> Self:
        """From options, which keep what is not for the hub. repo_id: where they name none."""
        known = {f.name for f in fields(cls)}
        return cls(**{"repo_id": repo_id, **{name: options.pop(name) for name in list(options) if name in known}})

    def made(self) -> Self:
        """The same, once it is there, under its whole name."""
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        found = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None and not self.revision.startswith("refs/pr") and not self.create_pr:
            api.create_branch(found, branch=self.revision, exist_ok=True)
        return replace(self, repo_id=found)

    def upload(self, folder: str | os.PathLike[str], names: list[str]) -> Any:
        """Commits these files and folders of a folder; returns what the hub says of the commit."""
        from huggingface_hub import HfApi

        inside = [f"{glob.escape(name)}/*" if (Path(folder) / name).is_dir() else glob.escape(name) for name in names]
        return HfApi(token=self.token).upload_folder(
            repo_id=self.repo_id,
            folder_path=Path(folder),
            allow_patterns=inside,
            commit_message=self.commit_message or "Upload model",
            commit_description=self.commit_description,
            revision=self.revision,
            create_pr=self.create_pr,
        )


def written_at(folder: str | os.PathLike[str]) -> dict[str, int]:
    """When each file and folder in a folder was written; nothing where there is none."""
    place = Path(folder)
    return {path.name: path.stat().st_mtime_ns for path in place.iterdir()} if place.is_dir() else {}


def label(folder: str | os.PathLike[str], tags: list[str]) -> None:
    """Adds tags to the card in a folder, or makes one of nothing else."""
    from huggingface_hub import ModelCard

    path = Path(folder) / "README.md"
    card: Any = ModelCard(path.read_text("utf-8") if path.exists() else "---\nlibrary_name: transformers\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
    card.save(path)
