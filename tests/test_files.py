"""Atomic writes, and the lock that keeps two runs out of the same folder."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mvlm_core.errors import UserError
from mvlm_core.files import (
    LOCK_NAME,
    RunLock,
    leftovers,
    output_folder_problems,
    sha256_file,
    temporary_folder,
    write_atomic,
    write_json_atomic,
)


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_only_temporary_folders_of_ended_processes_are_leftovers(tmp_path):
    program = "import sys; from pathlib import Path; from mvlm_core.files import temporary_folder\n"
    program += "for name in ('one', 'two'): print(temporary_folder(Path(sys.argv[1]), name))"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    one, two = done.stdout.splitlines()
    mine = temporary_folder(tmp_path, "one")
    (tmp_path / mine.name.replace(f".{os.getpid()}.", ".word.")).mkdir()
    (tmp_path / Path(one).name.replace(socket.gethostname().replace(".", "-"), "elsewhere")).mkdir()
    assert leftovers(tmp_path, "one") == [Path(one)]
    assert sorted(leftovers(tmp_path, "*")) == sorted([Path(one), Path(two)])


def test_sha256_file_hashes_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_output_folder_problems(tmp_path):
    (tmp_path / "file").write_text("")
    assert output_folder_problems(tmp_path / "new" / "deep") == []
    assert "is a file" in output_folder_problems(tmp_path / "file")[0]
    assert "is below" in output_folder_problems(tmp_path / "file" / "x" / "y")[0]


def lock_text(tmp_path, **values):
    (tmp_path / LOCK_NAME).write_text(json.dumps(values))


def test_lock_file_exists_only_while_the_lock_is_held(tmp_path):
    with RunLock(tmp_path, "the folder"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_second_process_is_refused_with_the_holders_pid(tmp_path):
    code = f"from mvlm_core.files import RunLock; RunLock({str(tmp_path)!r}, 'it').__enter__()\n"
    code += "print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), RunLock(tmp_path, "it"):
            pass
        holder.kill()
    with RunLock(tmp_path, "it"):  # the killed process left a stale lock behind
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_lock_of_a_live_process_is_respected(tmp_path):
    lock_text(tmp_path, pid=os.getppid(), host=socket.gethostname())
    with pytest.raises(UserError, match="in use by process"), RunLock(tmp_path, "it"):
        pass


@pytest.mark.parametrize("content", ["{}", "pid {}", "{} host", "pid={}\n2026-11-30\n"])
def test_lock_of_a_live_process_is_respected_in_other_formats(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content.format(os.getppid()))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()} "), RunLock(tmp_path, "it"):
        pass
    assert len(RunLock(tmp_path, "it").problems()) == 1


def test_lock_of_another_machine_is_respected_while_the_kernel_says_that_it_is_held(tmp_path):
    lock_text(tmp_path, pid=os.getppid(), host="elsewhere")  # this process id is alive here
    with (tmp_path / LOCK_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="on elsewhere.*if no such run exists, delete"), RunLock(tmp_path, "it"):
            pass
    assert RunLock(tmp_path, "it").problems() == []
    with RunLock(tmp_path, "it"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "content", ['{"pid": 4000000}', "4000000", "pid 4000000", "", "garbage", "x" + "9" * 4000, '{"pid": "x"}', "[1]"]
)
def test_stale_and_broken_locks_are_taken_over(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content)
    with RunLock(tmp_path, "it"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_lock_with_a_reused_process_id_is_stale(tmp_path):
    lock_text(tmp_path, pid=os.getppid(), host=socket.gethostname(), process_started=1.0)
    with RunLock(tmp_path, "it"):
        pass
