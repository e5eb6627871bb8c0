"""An export opened for use: a folder, or an archive unpacked for a while; its files are judged before it is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvlm_core.errors import UserError
from mvlm_core.export.archive import MANIFEST, extract_archive
from mvlm_core.export.file_checks import Checks, check_files


def check_export(folder: Path, sources: Path, place: Path | None = None) -> None:
    """Judge an export folder's files.

    Args:
        sources: the folder with the repository's own modelling files: no other code is run.
        place: what the user calls it, where that is not the folder.
    Raises:
        UserError: it is no finished export, or not what its manifest says, every problem named.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: holds no finished export (no {MANIFEST})")
    checks = Checks()
    check_files(folder, checks, sources)
    if failed := [f"{place or folder}: {check.name}: {check.detail}" for check in checks if not check.passed]:
        raise UserError(failed)


@contextmanager
def checked_export(place: Path, sources: Path) -> Iterator[Path]:
    """The export folder at ``place``, which may be a ``.tar.gz``; what that held is gone afterwards.

    Raises:
        UserError: no such folder or archive, or as ``check_export``.
    """
    if not place.exists():
        raise UserError(f"{place}: no such folder or archive; train a model first, or name where one is")
    with tempfile.TemporaryDirectory(prefix="mvlm-open-") as scratch:
        folder = place if place.is_dir() else extract_archive(place, Path(scratch))
        check_export(folder, sources, place)
        yield folder
