"""From what a person typed to a folder on disk: a path, a Hub id, or nothing for the bundled miniature."""

import re
from importlib import resources
from pathlib import Path

from xent_quant.errors import CheckpointError

PATTERNS = ["*.json", "*.jinja", "merges.txt", "*.safetensors", "pytorch_model*.bin", "*.model", "README.md", "LICENSE*"]
UNREAD = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]
"""Weights that `files.locate` passes over."""


def miniature() -> Path:
    """The checkpoint that ships with the package: xent-mini, see its README.md."""
    return Path(str(resources.files("xent_quant") / "data" / "xent-mini"))


def snapshot(path: Path) -> Path:
    """The snapshot that a folder of the Hub's cache stands for, `models--owner--name` or its `snapshots`: the one that refs/main
    names, or the only one. Any other path as it is. Raises CheckpointError where none can be told."""
    folder = path.parent if path.name == "snapshots" and path.parent.name.startswith("models--") else path
    inside = folder / "snapshots"
    if not folder.name.startswith("models--") or not inside.is_dir():
        return path
    there = sorted(each.name for each in inside.iterdir() if each.is_dir())
    main = folder / "refs" / "main"
    wanted = main.read_text("utf-8", errors="replace").strip() if main.is_file() else None
    if wanted is None and len(there) == 1:
        wanted = there[0]
    if wanted not in there:
        what = f"{', '.join(there[:3])}: give one of them" if there else "no snapshot: download it again"
        raise CheckpointError(
            f"{inside}: {'refs/main does not name one' if wanted else 'no refs/main to choose by'}; it holds {what}"
        )
    return inside / wanted


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the Hub cannot be reached, or a download breaks off: its own errors, those of files, and
    those of its HTTP library, which HfHubHTTPError is one of."""
    from huggingface_hub import errors

    own = [getattr(errors, name) for name in ("HfHubHTTPError", "XetDownloadError") if hasattr(errors, name)]
    return (*own, *errors.HfHubHTTPError.__bases__, OSError)


def reason(error: BaseException) -> str:
    """The first line of what was raised, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def expanded(path: str | Path) -> Path:
    """The path with a home folder for its ~; as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_hub_id(text: str) -> bool:
    """Whether a repository on the Hub could be called so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text, re.ASCII) is not None


def _twice(model: str) -> list[str]:
    """Patterns of weights that a repository has in another form too, which is the one that is read."""
    from huggingface_hub import HfApi

    try:
        names = [file.rfilename for file in HfApi().model_info(model).siblings or []]
    except failures():  # then what is in the cache will do, or the download says why not
        return []
    return ["pytorch_model*.bin"] if {"model.safetensors", "model.safetensors.index.json"} & {*names} else []


def resolve(model: str | Path | None) -> Path:
    """The checkpoint folder; downloads a Hub id through huggingface_hub's cache. Raises CheckpointError."""
    if model is None:
        return miniature()
    path = expanded(model)
    if path.is_dir():
        return snapshot(path)
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the checkpoint's folder")
    if isinstance(model, Path) or not is_hub_id(model):
        raise CheckpointError(f"{model}: no such folder, and not a Hub id such as xverse/XVERSE-Ent-A4.2B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS, ignore_patterns=[*UNREAD, *_twice(model)]))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{model}: no such folder here, and no such public model on the Hub") from error
    except failures() as error:
        raise CheckpointError(f"{model}: no such folder here, and the Hub could not be reached ({reason(error)})") from error
