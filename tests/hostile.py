"""What the tests of hostile input share: settings, broken JSON, broken bytes, and an end to whatever hangs."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and control characters too
HUGE = 10**400
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | ANY_TEXT
    | st.sampled_from([HUGE, -HUGE, 0, -1, "", "0", "nan", "../x", "/etc/passwd", "\ud800", "x" * 5000, 1e308])
)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8
)
# Files that are no JSON of the wanted kind, whatever is wanted: what a fixed list can hold that chance would not find.
BROKEN_JSON = {
    "empty": b"",
    "cut": b'{"title": "In the begin',
    "not JSON": b"{title: yes}",
    "list": b"[1, 2]",
    "null": b"null",
    "number": b"7",
    "string": b'"split"',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "huge number": b'{"quality_score": ' + b"9" * 5000 + b"}",
    "huge exponent": b'{"quality_score": 1e999999999}x',
    "surrogate": b'{"split": "\\ud800", "book": "\\udfff"',
    "NUL": b'{"a": "\0"}',
    "UTF-16 without a mark": '{"split": "train"}'.encode("utf-16-le"),
    "UTF-16 cut": b"\xff\xfe{",
    "Latin-1": b'{"title": "caf\xe9"}',
    "two values": b'{"a": 1}{"b": 2}',
    "trailing comma": b'{"a": 1,}',
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "binary": bytes(range(256)),
}


def cases(count: int) -> settings:
    """Settings for ``count`` examples, the same ones in every run."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def damaged(data: bytes, seed: int, zeros: int = 64) -> bytes:
    """``data`` with one kind of damage: a bit, a cut, an insertion, zeros, a part that stands there twice."""
    chance, data = random.Random(seed), bytearray(data)
    place = chance.randrange(len(data))
    match chance.randrange(5):
        case 0:
            data[place] ^= 1 << chance.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data[place:place] = chance.randbytes(chance.randrange(1, 600))
        case 3:
            data[place : place + zeros] = bytes(len(data[place : place + zeros]))
        case 4:
            data[place:place] = data[place // 2 : place]
    return bytes(data)


def with_a_value_replaced(value: Any, seed: int, new: Any) -> Any:
    """A copy of a JSON value with ``new`` in the place of one of its parts, however deep."""
    chance, copy = random.Random(seed), json.loads(json.dumps(value))
    parent, key, node = None, None, copy
    while isinstance(node, dict | list) and node and (parent is None or chance.random() < 0.8):
        parent, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return new
    parent[key] = new
    return copy


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something waits or loops for longer."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def raises_only(kind: type[Exception], call: Callable[[], Any]) -> tuple[Any, str]:
    """What ``call`` gives, and the message of ``kind`` where that is raised; anything else is a traceback."""
    try:
        return call(), ""
    except kind as error:
        assert str(error).strip()
        return None, str(error)
