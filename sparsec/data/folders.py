"""What a path that should hold a model holds instead, in words, and what to give in its place."""

from __future__ import annotations

from pathlib import Path

from sparsec.errors import DataError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx")


def local_path(spec: str) -> Path | None:
    """The folder or file that a specification names, None where there is none. Raises DataError for what may not be read."""
    try:
        path = Path(spec).expanduser()
        if path.is_dir():
            next(path.iterdir(), None)  # or a folder whose content is nobody's to see would be an empty one
            return path
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a name too long, no such user's home
        raise DataError(f"{spec}: this path cannot be read ({error})") from error


def check_folder(folder: Path) -> None:
    """Raises DataError for a folder that is no saved model of transformers."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: {_instead(folder)}")


def check_file(path: Path) -> None:
    """Raises DataError for a file that is no GGUF."""
    if path.suffix == ".gguf":
        return
    whole = path.parent if path.suffix in _WEIGHTS or path.name == "config.json" else None
    if whole is not None and (whole / "config.json").is_file():
        raise DataError(f"{path}: this is one file of a model; give its folder, {whole}")
    raise DataError(f"{path}: a model file must be GGUF and end in .gguf; other models are folders with a config.json")


def _instead(folder: Path) -> str:
    """What a folder without a config.json holds, and the way out."""
    rule = "this folder is no saved model: it holds no config.json"
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"{rule}, but {files[0].name}; give that file, {files[0]}"
    if (folder / "adapter_config.json").is_file():
        return f"{rule}, but an adapter; merge it into its base model (PEFT's merge_and_unload) and save that"
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        return f"{rule}, but one of its folders does; give {inner[0]}"
    if not any(folder.iterdir()):
        return f"{rule} and is empty; a saved model has config.json and *.safetensors, as save_pretrained writes them"
    return f"{rule}; a saved model has config.json and *.safetensors, as save_pretrained writes them"
