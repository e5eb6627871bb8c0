"""A strict tar reader that supports only regular files and folders.

It has no code for links, devices, sparse files or extended headers, so it is not exposed to vulnerabilities such as
those of the standard library's reader (CVE-2024-6232, CVE-2025-4517, CVE-2025-8194). Headers that tar programs
interpret differently are rejected.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase

ENTRY_LIMIT = 10_000
PROBLEM_LIMIT = 50  # a malicious archive may hold millions of bad entries
BLOCK = 512
CHUNK = 1 << 20

SAFE_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+-]*[A-Za-z0-9_+-])?", re.ASCII)
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
FILE_KINDS, FOLDER_KIND = (b"0", b"\0"), b"5"
OTHER_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
    b"7": "contiguous file",
    b"S": "sparse file",
    b"L": "GNU long name",
    b"K": "GNU long link",
    b"x": "PAX extended header",
    b"g": "PAX global header",
    b"X": "extended header",
    b"D": "GNU dump folder",
    b"M": "continued file",
    b"V": "volume label",
}


class TarError(Exception):
    """The archive cannot be read any further."""


class BoundedStream:
    """Decompressed bytes of an archive, up to ``limit``."""

    def __init__(self, file: BufferedIOBase, limit: int) -> None:
        self._file, self._limit, self._seen = file, limit, 0

    def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes, fewer only at the end. Raises ``TarError``."""
        data = b""
        while len(data) < size:
            try:
                chunk = self._file.read(size - len(data))
            except (EOFError, OSError, zlib.error, ValueError) as error:
                raise TarError(f"damaged or truncated ({error})") from None
            if not chunk:
                break
            data += chunk
            self._seen += len(chunk)
            if self._seen > self._limit:
                raise TarError(f"unpacks to more than {self._limit:,} bytes: refused as a decompression bomb")
        return data


@dataclass
class Entry:
    """One header: name without a trailing slash, size of the content in bytes."""

    name: str
    kind: bytes
    size: int
    mode: int

    @property
    def is_folder(self) -> bool:
        return self.kind == FOLDER_KIND


def name_problem(name: str) -> str | None:
    """Explain why ``name`` is not a safe path in an archive on every system; None if it is."""
    shown = ascii(name if len(name) <= 80 else name[:80] + "...")
    if not name or name.startswith("/"):
        return f"{shown}: empty or absolute name"
    if "\\" in name or ":" in name:
        return f"{shown}: backslash or drive name"
    parts = name.split("/")
    if ".." in parts:
        return f"{shown}: path traversal ('..')"
    for part in parts:
        if not SAFE_PART.fullmatch(part) or part.split(".")[0].lower() in WINDOWS_DEVICES:
            return f"{shown}: name contains characters other than plain letters, digits and . _ + -"
    return None


def entries(stream: BoundedStream, problems: list[str]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """Yield every acceptable entry with its content; append the others to ``problems``.

    Content that the caller does not read is skipped. Raises ``TarError`` if reading cannot continue.
    """
    seen: dict[str, str] = {}
    for count in range(ENTRY_LIMIT + 1):
        header = stream.read(BLOCK)
        if len(header) != BLOCK:
            raise TarError("truncated: no end-of-archive marker")
        if header == bytes(BLOCK):
            break
        if count == ENTRY_LIMIT or len(problems) >= PROBLEM_LIMIT:
            raise TarError("too many entries or problems: reading stopped")
        entry = _parse_header(header)
        content = _content(stream, entry)
        if problem := _entry_problem(entry, seen):
            problems.append(problem)
        else:
            seen[entry.name.lower()] = entry.name
            yield entry, content
        for _ in content:
            pass
    while rest := stream.read(CHUNK):
        if rest.strip(b"\0"):
            raise TarError("data after the end mark")


def _number(raw: bytes) -> int:
    """Parse a number in a header: octal text, or GNU's binary form for large sizes."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    text = raw.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise TarError("damaged entry header (bad number)")
    return int(text or b"0", 8)


def _parse_header(header: bytes) -> Entry:
    checksum = sum(header) - sum(header[148:156]) + 8 * 0x20
    if _number(header[148:156]) != checksum:
        raise TarError("damaged entry header (checksum)")
    name, prefix, kind = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0], header[156:157]
    if header[257:263] == b"ustar\0":
        name = prefix + b"/" + name if prefix else name
    elif header[345:].strip(b"\0"):
        raise TarError("ambiguous entry header, which tar programs interpret differently")
    text = name.decode("utf-8", "backslashreplace")
    if kind == FOLDER_KIND:
        text = text.removesuffix("/")
    return Entry(text, kind, _number(header[124:136]), _number(header[100:108]))


def _entry_problem(entry: Entry, seen: dict[str, str]) -> str | None:
    name, shown = entry.name, ascii(entry.name[:80])
    if entry.kind not in (*FILE_KINDS, FOLDER_KIND):
        kind = OTHER_KINDS.get(entry.kind, "unknown kind of entry")
        return f"{shown}: {kind}; only files and folders are accepted"
    if reason := name_problem(name):
        return reason
    earlier = seen.get(name.lower())
    if earlier == name:
        return f"{name}: duplicate entry"
    if earlier is not None:
        return f"{name}: differs from {earlier} only in case"
    if entry.mode & 0o7000:
        return f"{name}: set-uid, set-gid or sticky bit"
    if entry.is_folder and entry.size:
        return f"{name}: a folder with a size"
    return None


def _content(stream: BoundedStream, entry: Entry) -> Iterator[bytes]:
    left = entry.size
    while left:
        data = stream.read(min(left, CHUNK))
        if not data:
            raise TarError(f"truncated inside {ascii(entry.name[:80])}")
        left -= len(data)
        yield data
    padding = -entry.size % BLOCK
    if len(stream.read(padding)) != padding:
        raise TarError(f"truncated after {ascii(entry.name[:80])}")
