"""An export that is a folder of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from exporters.atomic import staged_folder, writing
from xent_quant.checkpoint.reader import check_free_space


@contextmanager
def exported_folder(target: Path, files: Mapping[str, bytes], nbytes: int, *, force: bool) -> Iterator[Path]:
    """Yield the hidden folder that becomes `target` when the block ends well, with `files` (name to content) in it; `nbytes`
    more will be written. Raises ExportError where the target exists without `force`, cannot be written or does not fit; after
    any error the folder is as it was before.
    """
    with writing([target], force=force):
        check_free_space(target.parent, nbytes + sum(map(len, files.values())))
        with staged_folder(target) as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            yield folder
