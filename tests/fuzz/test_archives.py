"""Malicious and damaged archives: each is refused with its name and a reason, or harmless.

The members are written byte by byte, because libraries refuse to write most of them.
"""

import gzip
import hashlib
import io
import json
import struct
import tarfile
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_core.export import archive as packaging
from mvlm_core.export.archive import check_archive, opened, write_archive
from mvlm_core.export.manifest import ArchiveError
from tests.export.exports import make_export
from tests.export.test_archive import FILES, members, repack
from tests.helpers import ANY_JSON, cases, damaged, within

SAFE_NAMES = [f"mvlm_gpt2/{name}" for name in (*FILES, "manifest.json", "other.json", "a/b.json")] + ["mvlm_gpt2"]
KINDS = [bytes([kind]) for kind in b"0\x001234567SLKxgXDMV?"]
ODD_NAMES = [
    *("", "/", ".", "..", "./", "../", "/etc/passwd", "//host/x", "~/x", "C:\\x", "c:x", "mvlm_gpt2\\..\\x"),
    *("mvlm_gpt2/..", "mvlm_gpt2/../x", "mvlm_gpt2/./config.json", "mvlm_gpt2//config.json", "mvlm_gpt2/config.json/"),
    *("mvlm_gpt2/config.json/x", "mvlm_gpt2/con", "mvlm_gpt2/NUL.txt", "mvlm_gpt2/com1.json", "mvlm_gpt2/LPT9"),
    *("mvlm_gpt2/x ", "mvlm_gpt2/ x", "mvlm_gpt2/x.", "mvlm_gpt2/-rf", "mvlm_gpt2/.bashrc", "mvlm_gpt2/x\n", "\x1b[2J"),
    *("MVLM_GPT2/config.json", "mvlm_gpt2/CONFIG.JSON", "mvlm_gpt2/ReadMe.md", "mvlm_gpt2/Manifest.json"),
    *("mvlm_gpt2/conﬁg.json", "mvlm_gpt2/config.jſon", "mvlm_gpt2/cönfig.json", "mvlm_gpt2/co\u0308nfig.json"),
    *("mvlm_gpt2/\u202egnp.exe", "mvlm_gpt2/config\u200b.json", "mvlm_gpt2/K.json", "mvlm_gpt2/x:stream", "other"),
    *("mvlm_gpt2/" + "a/" * 40 + "x", "mvlm_gpt2/%2e%2e/x", "mvlm_gpt2/$HOME", "mvlm_gpt2/`id`", "mvlm_gpt2/a|b"),
]


def header(name, kind=b"0", size=0, mode=0o644, link=b"", prefix=b"", magic=b"ustar\x0000", size_field=None):
    """A 512-byte tar header with a valid checksum, whatever else it holds."""
    block = bytearray(512)
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    block[0:100] = raw[:100].ljust(100, b"\0")
    block[100:136] = b"%07o\0%07o\0%07o\0" % (mode & 0o7777777, 0, 0) + (size_field or b"%011o\0" % size)[:12].ljust(12)
    block[136:148] = b"%011o\0" % 0
    block[156:157], block[157:257] = kind, link[:100].ljust(100, b"\0")
    block[257:265], block[345:500] = magic[:8].ljust(8, b"\0"), prefix[:155].ljust(155, b"\0")
    return with_checksum(block)


def with_checksum(block):
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data=b"x", **fields):
    fields.setdefault("size", len(data))
    return header(name, **fields) + data + bytes(-len(data) % 512)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A valid archive: its bytes, and its members as raw tar blocks."""
    folder = tmp_path_factory.mktemp("good")
    write_archive(make_export(folder / "export", FILES), folder / "good.tar.gz")
    packed = (folder / "good.tar.gz").read_bytes()
    entries = []
    with tarfile.open(folder / "good.tar.gz") as tar:
        for info in tar:
            data = tar.extractfile(info).read() if info.isreg() else b""
            entries.append(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    return packed, entries


@pytest.fixture
def place(tmp_path):
    return tmp_path / "hostile.tar.gz"


def judge(path, refused=None):
    """Check and extract an archive; returns the problems. With problems nothing may be written, without any exactly
    the manifest's files.

    Args:
        refused: True where the archive must be refused.
    """
    with within(30):
        problems = check_archive(path)
    assert all(problem.startswith(f"{path.name}: ") and len(problem) > len(path.name) + 5 for problem in problems)
    assert all(problem.isprintable() for problem in problems), problems
    if problems:
        nowhere = patch("tempfile.tempdir", "/nowhere")
        with nowhere, pytest.raises(ArchiveError), opened(path):
            pass
    else:
        with opened(path) as top:
            found = {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
            found.pop("manifest.json")
            assert found == FILES and [p.name for p in top.parent.iterdir()] == ["mvlm_gpt2"]
            assert not any(p.is_symlink() or p.stat().st_mode & 0o7000 for p in top.rglob("*"))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    assert refused is None or bool(problems) == refused, problems
    return problems


def tar_gz(path, blocks, tail=bytes(1024)):
    path.write_bytes(gzip.compress(b"".join(blocks) + tail, 1, mtime=0))
    return path


@cases(500)
@given(
    place_in=st.integers(0, 6),
    name=st.sampled_from(SAFE_NAMES + ODD_NAMES) | st.binary(max_size=120),
    kind=st.sampled_from(KINDS) | st.binary(min_size=1, max_size=1),
    mode=st.sampled_from([0o644, 0o755, 0o4755, 0o2755, 0o1777, 0, 0o7777777]),
    link=st.sampled_from([b"", b"/etc/passwd", b"../../x", b"mvlm_gpt2/config.json", b"mvlm_gpt2"]),
    prefix=st.sampled_from([b"", b"/", b"..", b"mvlm_gpt2", b"a" * 155, b"\xff"]),
    magic=st.sampled_from([b"ustar\x0000", b"ustar  \0", b"\0" * 8, b"evil"]),
    data=st.binary(max_size=700),
)
def test_extra_members_are_refused(good, place, place_in, name, kind, mode, link, prefix, magic, data):
    """A member of any name, kind, mode and header format, anywhere in a valid archive."""
    extra = member(name, data, kind=kind, mode=mode, link=link, prefix=prefix, magic=magic)
    blocks = list(good[1])
    blocks.insert(min(place_in, len(blocks)), extra)
    judge(tar_gz(place, blocks), refused=True)


@pytest.mark.parametrize("kind", [b"0", b"5", b"1", b"2"], ids=["file", "folder", "hard link", "symbolic link"])
@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_extra_members_with_unsafe_names_are_refused(good, place, name, kind):
    """Each name as a file, folder, hard link and symbolic link."""
    data = b"x" if kind == b"0" else b""
    judge(tar_gz(place, [*good[1], member(name, data, kind=kind, link=b"/etc/passwd")]), refused=True)


@pytest.mark.parametrize("kind", range(256))
def test_only_regular_file_type_flags_are_accepted(good, place, kind):
    """Every type flag in the header of a listed file; only the two of regular files are accepted."""
    blocks = list(good[1])
    number = next(n for n, block in enumerate(blocks) if block.startswith(b"mvlm_gpt2/config.json\0"))
    block = bytearray(blocks[number][:512])
    block[156] = kind
    blocks[number] = with_checksum(block) + blocks[number][512:]
    problems = judge(tar_gz(place, blocks), refused=bytes([kind]) not in (b"0", b"\0"))
    assert not problems or any("config.json" in problem for problem in problems)


@pytest.mark.parametrize(
    "size_field",
    [
        *(b"77777777777\0", b"7" * 12, b"-0000000001\0", b"0x000000100\0", b"00000000009\0", b"1e9\0", b"\0" * 12),
        *(b" " * 12, b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + bytes(10) + b"\x01", b"\xff" + b"\0" * 11),
        *(b"00000000001\0", b"00000000777\0", b"+0000000024\0", "²".encode() * 6, b"0 0 0 0 0 0 "),
    ],
)
@pytest.mark.parametrize("name", [b"mvlm_gpt2/config.json\0", b"mvlm_gpt2/\0"], ids=["file", "folder"])
def test_wrong_member_sizes_are_refused(good, place, size_field, name):
    """Sizes that are not numbers, negative, too large, or different from the content's."""
    blocks = list(good[1])
    number = next(n for n, block in enumerate(blocks) if block.startswith(name))
    block = bytearray(blocks[number])
    block[124:136] = size_field
    blocks[number] = with_checksum(block[:512]) + bytes(block[512:])
    is_zero = not size_field.strip(b" \0")
    judge(tar_gz(place, blocks), refused=not (is_zero and name == b"mvlm_gpt2/\0"))


@cases(300)
@given(number=st.integers(0, 5), field=st.integers(0, 511), data=st.binary(min_size=1, max_size=40))
def test_fuzzed_headers_are_refused_or_harmless(good, place, number, field, data):
    """Random bytes in a header whose checksum is then recomputed, so that it is valid."""
    blocks = list(good[1])
    block = bytearray(blocks[number % len(blocks)])
    block[field : min(field + len(data), 512)] = data[: 512 - field]
    blocks[number % len(blocks)] = with_checksum(block[:512]) + bytes(block[512:])
    judge(tar_gz(place, blocks))


@cases(200)
@given(
    keys=st.dictionaries(
        st.sampled_from(
            ["path", "linkpath", "size", "mode", "uid", "mtime", "hdrcharset", "comment", "SCHILY.xattr.x"]
            + ["GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.map", "GNU.sparse.realsize"]
        ),
        st.sampled_from(["../../evil", "/etc/cron.d/x", "mvlm_gpt2/config.json", "0", "-1", "9" * 30, "1,2,3", "é"])
        | st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), max_size=20),
        min_size=1,
    ),
    globally=st.booleans(),
)
def test_pax_headers_are_refused(good, place, keys, globally):
    """PAX headers that rename, resize, link or sparsify the next member."""
    place.write_bytes(good[0])
    entries = members(place)
    buffer = io.BytesIO()
    try:
        with tarfile.open(
            fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=keys if globally else {}
        ) as tar:
            for info, data in entries:
                info.pax_headers = {} if globally else keys
                tar.addfile(info, io.BytesIO(data) if data is not None else None)
    except ValueError:  # tarfile refuses to write this one
        return
    place.write_bytes(gzip.compress(buffer.getvalue(), 1))
    judge(place, refused=True)


@cases(250)
@given(seed=st.integers(0, 2**40), packed=st.booleans(), zeros=st.sampled_from([64, 512]))
def test_corrupted_archives_are_refused_or_extract_unchanged(good, place, seed, packed, zeros):
    """A flipped bit, truncation, insertion, zeros or repetition, in the packed or the unpacked bytes."""
    whole = good[0] if packed else gzip.decompress(good[0])
    data = damaged(whole, seed, zeros)  # 512: up to a whole tar block
    place.write_bytes(data if packed else gzip.compress(data, 1))
    judge(place)


@cases(300)
@given(data=st.binary(max_size=3000), packed=st.booleans())
def test_random_bytes_are_refused(place, data, packed):
    """Arbitrary bytes, as they are or gzipped."""
    place.write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)
    judge(place, refused=True)


@cases(150)
@given(share=st.floats(0, 1, exclude_max=True), packed=st.booleans())
def test_truncated_archives_are_refused(good, place, share, packed):
    """An archive, or the tar file in it, truncated at any point."""
    whole = good[0] if packed else b"".join(good[1]) + bytes(512)
    data = whole[: int(share * len(whole))]
    place.write_bytes(data if packed else gzip.compress(data, 1))
    judge(place, refused=True)


@cases(100)
@given(tail=st.binary(min_size=1, max_size=600).filter(lambda tail: tail.strip(b"\0")), where=st.integers(0, 2))
def test_trailing_data_is_refused(good, place, tail, where):
    """Data after the end-of-archive blocks, after the gzip stream, or in a second stream."""
    if where == 0:
        tar_gz(place, good[1], bytes(1024) + tail)
    else:
        place.write_bytes(good[0] + (tail if where == 1 else gzip.compress(tail)))
    judge(place, refused=True)


@cases(150)
@given(data=st.data())
def test_invalid_or_mismatched_manifests_are_refused(good, place, data):
    """Manifests with extra, missing or wrong entries, and values of any type."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    manifest = {"format": 1, "name": "mvlm_gpt2", "files": files}
    match data.draw(st.integers(0, 4)):
        case 0:
            value = data.draw(ANY_JSON.filter(lambda value: value not in (1, True)))
            manifest[data.draw(st.sampled_from(list(manifest)))] = value
        case 1:
            files[data.draw(st.sampled_from(list(files)))] = data.draw(ANY_JSON)
        case 2:
            files[data.draw(st.sampled_from([*ODD_NAMES, "other.json", "CONFIG.json"]))] = "0" * 64
        case 3:
            files.pop(data.draw(st.sampled_from(list(files))))
        case 4:
            manifest["name"] = data.draw(st.sampled_from(["..", "a/b", "/", "", ".", "con", "Mvlm_gpt2", "x" * 300]))
    blocks = [block for block in good[1] if b"manifest.json\0" not in block[:100]]
    judge(tar_gz(place, [*blocks, member("mvlm_gpt2/manifest.json", json.dumps(manifest).encode())]), refused=True)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("what", ["zeros in a file", "only end marks", "many members", "empty streams", "long name"])
def test_decompression_bombs_are_refused(good, place, monkeypatch, what, layers):
    """Small files that unpack to large ones."""
    monkeypatch.setattr(packaging, "SIZE_ALLOWANCE", 4 << 20)
    zeros = bytes(32 << 20)
    content = {
        "zeros in a file": [*good[1], member("mvlm_gpt2/zeros", zeros)],
        "only end marks": [zeros],
        "many members": [header(f"mvlm_gpt2/{n}") for n in range(11_000)],
        "empty streams": [b""],
        "long name": [header("././@LongLink", kind=b"L", size=len(zeros)), zeros],
    }[what]
    packed = gzip.compress(b"".join(content), 6)
    if what == "empty streams":
        packed = gzip.compress(b"") * 20_000
    place.write_bytes(packed if layers == 1 else gzip.compress(packed * 3))
    judge(place, refused=True)


GZIP_FLAGS = {"name without an end": 8, "comment without an end": 16, "extra field beyond the end": 4, "reserved": 224}


@pytest.mark.parametrize("flag", GZIP_FLAGS.values(), ids=GZIP_FLAGS)
@pytest.mark.parametrize("fill", [b"a", b"\xff"])
def test_malformed_gzip_headers_are_refused(place, flag, fill):
    """Unterminated optional fields and reserved flags in the gzip header."""
    place.write_bytes(b"\x1f\x8b\x08" + struct.pack("<BIBB", flag, 0, 0, 255) + fill * 200_000)
    judge(place, refused=True)


def test_archives_by_the_test_writer_are_accepted(good, place):
    """The control: the archives above are not refused because of how the tests write them."""
    judge(tar_gz(place, good[1]), refused=False)
    entries = members(place)
    judge(repack(place, entries), refused=False)
    blocks = [member(info.name, data or b"", kind=b"0" if info.isreg() else b"5") for info, data in entries]
    judge(tar_gz(place, blocks), refused=False)
