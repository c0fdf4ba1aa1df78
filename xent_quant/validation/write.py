"""The report's files: written under a temporary name, renamed when complete."""

import os
from contextlib import suppress
from pathlib import Path

from xent_quant.errors import ValidationError
from xent_quant.plain import readable_json
from xent_quant.validation.html import page
from xent_quant.validation.report import Report


def write(report: Report, folder: Path | None, json_file: Path | None = None) -> None:
    """report.html and report.json in `folder`, the JSON in `json_file` too. Raises ValidationError where they cannot be
    written."""
    text = readable_json(report.to_json(), indent=1, allow_nan=False) + "\n"
    if json_file:
        _write(json_file, text)
    if folder:
        _write(folder / "report.json", text)
        _write(folder / "report.html", page(report))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValidationError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
