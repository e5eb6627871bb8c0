"""Archives of the finished models, and the files next to them: checksums, summary and download instructions."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from mvlm_core.errors import describe_os_error
from mvlm_core.export.archive import check_archive, write_archive
from mvlm_core.export.formats import NO_GGUF, formats_of, supported
from mvlm_core.export.manifest import ArchiveError
from mvlm_core.files import sha256_file, template, write_atomic
from mvlm_core.pipeline.child_process import SignalForwarder, run_optional
from mvlm_core.pipeline.job import Job
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout

INSTRUCTIONS = Path(__file__).with_name("download_instructions.md")
log = logging.getLogger("mvlm")


def pack_models(job: Job, summary: Summary, signals: SignalForwarder) -> None:
    """Pack every finished model; keep an archive that already holds exactly its export."""
    log.info("=== archives")
    layout = job.layout
    layout.downloads.mkdir(parents=True, exist_ok=True)
    for name in summary.with_status("finished"):
        signals.check()
        archive = layout.archive(name)
        try:
            pack(layout, layout.export(name), archive)
        except ArchiveError as error:
            log.error("%s: not packed: %s", name, error)
            summary.update(name, status="failed", error=f"not packed: {error}", archive=None)
            continue
        summary.update(name, archive=str(archive.relative_to(layout.root)))


def pack(layout: Layout, folder: Path, archive: Path) -> None:
    """Pack a folder, unless the archive already holds exactly its files.

    Raises:
        ArchiveError: it cannot be packed; neither an old archive nor a SHA256SUMS that lists it remains.
    """
    if not check_archive(archive, folder):
        log.info("%s: kept, already up to date", archive.name)
        return
    try:
        for outdated in (layout.checksums, archive):
            outdated.unlink(missing_ok=True)
        write_archive(folder, archive)
    except OSError as error:
        raise ArchiveError(describe_os_error(error)) from None
    log.info("%s: written, %.1f MB", archive.name, archive.stat().st_size / 1e6)


def pack_formats(job: Job, summary: Summary, signals: SignalForwarder) -> bool:
    """Convert every finished model to the requested formats that it supports, and pack them.

    Keeps files made from the same export by an earlier run. Returns whether all succeeded; a failure does not mark the
    model as failed.
    """
    layout, good = job.layout, True
    if job.formats:
        log.info("=== other formats: %s", ", ".join(job.formats))
    for name in summary.with_status("finished"):
        export, folder, archive = layout.export(name), layout.formats(name), layout.formats_archive(name)
        formats = supported(export, job.formats)
        if formats != sorted(job.formats):
            log.info("%s: no GGUF: %s", name, NO_GGUF)
        existing = formats_of(folder, export)
        if not existing or not set(formats) <= set(existing):
            shutil.rmtree(folder, ignore_errors=True)
            archive.unlink(missing_ok=True)
            if not formats:
                continue
            command = [sys.executable, str(job.scripts["formats"]), str(export), "--output", str(folder)]
            if not run_optional(f"{name} as {', '.join(formats)}", [*command, *(f"--{f}" for f in formats)], signals):
                good = False
                continue
        try:
            pack(layout, folder, archive)
        except ArchiveError as error:
            log.error("%s: not packed: %s", folder.name, error)
            good = False
    write_download_notes(job, summary)
    return good


def write_download_notes(job: Job, summary: Summary) -> None:
    """Write SHA256SUMS, the summary and the download instructions next to the archives."""
    layout, instructions = job.layout, job.layout.downloads / "DOWNLOAD_INSTRUCTIONS.md"
    offered = [name for name in summary.with_status("finished") if layout.archive(name).is_file()]
    known = {*summary.models, *filter(summary.was_in_earlier_run, job.trainers)}  # not archives copied from elsewhere
    for name in sorted(known - {*offered}):
        for archive in (layout.archive(name), layout.formats_archive(name)):
            if archive.exists():
                log.warning("%s: removed, as this run does not offer its model", archive.name)
                archive.unlink()
    for file in (layout.checksums, instructions):  # a full disk then leaves none, not those of other archives
        file.unlink(missing_ok=True)
    if offered:
        archives = [layout.archive(name) for name in offered]
        archives += [other for name in offered if (other := layout.formats_archive(name)).is_file()]
        write_atomic(layout.checksums, "".join(f"{sha256_file(archive)}  {archive.name}\n" for archive in archives))
        write_atomic(instructions, download_instructions(offered, layout, job.prompt))
    summary.copy_to_downloads()


def download_instructions(names: list[str], layout: Layout, prompt: str) -> str:
    """Render the download instructions; their commands work as written in the folder with the archives."""
    return template(INSTRUCTIONS).render(
        folder=layout.downloads,
        archives=[layout.archive(name).name for name in names],
        formats=[path.name for name in names if (path := layout.formats_archive(name)).is_file()],
        folders=json.dumps([f"./{name}" for name in names]),
        prompt=json.dumps(prompt),
        coded=[name for name in names if list(layout.export(name).glob("*.py"))],
        transformers=version("transformers"),
    )
