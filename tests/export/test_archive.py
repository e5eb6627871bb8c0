"""Archives: reproducible and complete; malformed ones are refused with a reason."""

import gzip
import io
import os
import tarfile
import tempfile

import pytest

from mvlm_core.export import archive as packaging
from mvlm_core.export.archive import check_archive, opened, write_archive
from mvlm_core.export.manifest import ArchiveError, verify_folder
from mvlm_core.files import sha256_file
from tests.export.exports import make_export

FILES = {
    "config.json": b'{"model_type": "gpt2"}\n',
    "model.safetensors": bytes(range(256)) * 40,
    "README.md": "# In the beginning — a model\n".encode(),
    "empty.txt": b"",
}


@pytest.fixture
def export(tmp_path):
    return make_export(tmp_path / "models" / "somewhere", FILES)


@pytest.fixture
def archive(export, tmp_path):
    path = tmp_path / "out" / "mvlm_gpt2_model.tar.gz"
    write_archive(export, path)
    return path


def members(archive):
    with tarfile.open(archive) as tar:
        return [(m, tar.extractfile(m).read() if m.isreg() else None) for m in tar.getmembers()]


def repack(path, entries, tar_format=tarfile.GNU_FORMAT, tail=b""):
    """An archive of `entries` = (TarInfo, data), written unchanged even if they are invalid."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for info, data in entries:
            if data is not None and info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    path.write_bytes(gzip.compress(buffer.getvalue() + tail, mtime=0))
    return path


def entry(name, data=b"x", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, data if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else None


def test_archive_contains_exactly_the_manifests_files_in_one_folder(export, archive, tmp_path):
    (export / "checkpoints").mkdir()
    (export / "checkpoints" / "state.bin").write_bytes(b"not for the archive")
    (export / "training_history.jsonl").write_text("{}\n")
    write_archive(export, archive)
    names = {m.name for m, _ in members(archive)}
    assert names == {"mvlm_gpt2", "mvlm_gpt2/manifest.json", *(f"mvlm_gpt2/{name}" for name in FILES)}
    assert check_archive(archive) == check_archive(archive, export) == []
    (export / "manifest.json").unlink()
    assert check_archive(archive, export) == [f"mvlm_gpt2_model.tar.gz: differs from {export}"]
    with opened(archive) as top:
        assert verify_folder(top) == []
        assert {p.name: p.read_bytes() for p in top.iterdir() if p.name != "manifest.json"} == FILES
        assert [p.name for p in top.parent.iterdir()] == [top.name] == ["mvlm_gpt2"]
    assert not top.parent.exists()


def test_archives_of_equal_exports_are_byte_identical(export, tmp_path):
    first = write_archive(export, tmp_path / "a.tar.gz")
    for path in export.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    other = make_export(tmp_path / "b" / "other", dict(reversed(FILES.items())))
    (other / "manifest.json").write_bytes((export / "manifest.json").read_bytes())
    assert write_archive(other, tmp_path / "renamed.tar.gz") == first == sha256_file(tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "renamed.tar.gz").read_bytes()


def test_member_times_owners_and_modes_are_normalized(archive):
    with tarfile.open(archive) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == (0o755 if member.isdir() else 0o644)


def test_nested_files_survive_a_round_trip(tmp_path):
    export = make_export(tmp_path / "e", {"a/b/c.json": b"{}", "a/d.json": b"1"})
    write_archive(export, tmp_path / "x.tar.gz")
    with opened(tmp_path / "x.tar.gz") as top:
        assert (top / "a" / "b" / "c.json").read_bytes() == b"{}" and verify_folder(top) == []


def test_damaged_exports_are_refused_and_the_old_archive_is_kept(export, archive, monkeypatch):
    before = archive.read_bytes()
    (export / "config.json").write_text("changed")
    assert [p for p in verify_folder(export) if "config.json" in p and "SHA-256" in p]
    with pytest.raises(ArchiveError, match="config.json"):
        write_archive(export, archive)
    monkeypatch.setattr(packaging, "verify_folder", lambda folder: [])  # changed between the check and the read
    with pytest.raises(ArchiveError, match="config.json"):
        write_archive(export, archive)
    assert archive.read_bytes() == before
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    "extra, reason",
    [
        (entry("mvlm_gpt2/config.json"), "duplicate"),
        (entry("mvlm_gpt2/CONFIG.json"), "only in case"),
        (entry("mvlm_gpt2/extra.json"), "not in the manifest"),
        (entry("mvlm_gpt2/../../evil"), "'..'"),
        (entry("../evil"), "'..'"),
        (entry("/etc/passwd"), "absolute"),
        (entry("mvlm_gpt2\\evil"), "backslash"),
        (entry("C:evil"), "drive"),
        (entry("mvlm_gpt2/aux.json"), "plain letters"),
        (entry("mvlm_gpt2/x\n.json"), "plain letters"),
        (entry("mvlm_gpt2/x."), "plain letters"),
        (entry("mvlm_gpt2/.hidden"), "plain letters"),
        (entry("mvlm_gpt2//x"), "plain letters"),
        (entry("mvlm_gpt2/x", kind=tarfile.SYMTYPE, link="/etc/passwd"), "symbolic link"),
        (entry("mvlm_gpt2/x", kind=tarfile.LNKTYPE, link="mvlm_gpt2/config.json"), "hard link"),
        (entry("mvlm_gpt2/x", kind=tarfile.FIFOTYPE), "named pipe"),
        (entry("mvlm_gpt2/x", kind=tarfile.CHRTYPE), "character device"),
        (entry("mvlm_gpt2/x", kind=tarfile.BLKTYPE), "block device"),
        (entry("mvlm_gpt2/x", kind=tarfile.CONTTYPE), "contiguous"),
        (entry("mvlm_gpt2/x", kind=b"S"), "sparse"),
        (entry("mvlm_gpt2/x", kind=b"?"), "unknown kind"),
        (entry("other", kind=tarfile.DIRTYPE), "none of the manifest's files"),
        (entry("mvlm_gpt2/" + "y" * 150), "long name"),
    ],
)
def test_invalid_entries_are_refused_with_a_reason_and_not_extracted(archive, monkeypatch, extra, reason):
    repack(archive, [*members(archive), extra])
    problems = check_archive(archive)
    assert any(reason in problem for problem in problems), problems
    assert all(problem.startswith(archive.name) for problem in problems)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ArchiveError), opened(archive):
        pass


def test_pax_headers_that_rename_an_entry_are_refused(archive):
    odd, data = entry("mvlm_gpt2/extra.json")
    odd.pax_headers = {"path": "../../evil"}
    repack(archive, [*members(archive), (odd, data)], tarfile.PAX_FORMAT)
    assert any("PAX" in problem for problem in check_archive(archive))


def test_setuid_bits_are_refused(archive):
    entries = members(archive)
    entries[-1][0].mode = 0o4755
    assert any("set-uid" in p for p in check_archive(repack(archive, entries)))


def test_missing_and_changed_files_are_reported(archive):
    entries = members(archive)
    repack(archive, [e for e in entries if not e[0].name.endswith("config.json")])
    assert any("config.json: in the manifest but not" in p for p in check_archive(archive))
    repack(archive, [(m, b"changed" if m.name.endswith("README.md") else d) for m, d in entries])
    assert any("README.md: SHA-256" in p for p in check_archive(archive))
    repack(archive, [e for e in entries if not e[0].name.endswith("manifest.json")])
    assert any("manifest.json: missing, or larger than" in p for p in check_archive(archive))


def test_decompression_bombs_are_refused(archive, monkeypatch):
    monkeypatch.setattr(packaging, "SIZE_ALLOWANCE", 1 << 20)
    repack(archive, [*members(archive), entry("mvlm_gpt2/zeros", bytes(64 << 20))])
    assert any("bomb" in p for p in check_archive(archive))
    archive.write_bytes(gzip.compress(bytes(64 << 20)))  # only end-of-archive blocks
    assert any("bomb" in p for p in check_archive(archive))


def test_trailing_data_is_refused(archive):
    entries = members(archive)
    assert any("after the end" in p for p in check_archive(repack(archive, entries, tail=b"evil")))
    repack(archive, entries)
    archive.write_bytes(archive.read_bytes() + b"evil")
    assert any("damaged" in p for p in check_archive(archive))


def test_paths_that_are_not_archives_are_refused(tmp_path):
    assert check_archive(tmp_path) and check_archive(tmp_path / "none.tar.gz")
    for data in (b"", b"\x1f\x8b", b"PK\x03\x04", gzip.compress(b""), gzip.compress(b"x" * 512)):
        (tmp_path / "bad.tar.gz").write_bytes(data)
        assert check_archive(tmp_path / "bad.tar.gz")
        with pytest.raises(ArchiveError), opened(tmp_path / "bad.tar.gz"):
            pass


def test_archive_changed_between_check_and_extraction_is_refused(archive, tmp_path, monkeypatch):
    real, calls = packaging._scan, []

    def scan(path, destination=None):
        calls.append(path)
        if len(calls) == 2:
            repack(path, [(m, b"changed" if m.name.endswith("README.md") else d) for m, d in members(path)])
        return real(path, destination)

    monkeypatch.setattr(packaging, "_scan", scan)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(ArchiveError, match="README.md"), opened(archive):
        pass
    assert list(scratch.iterdir()) == []
