"""Checkpoints are complete or absent; damage is detected; rotation keeps the newest and the best."""

import pytest
import torch

from mvlm_core.errors import UserError
from mvlm_core.training.checkpoint import (
    CheckpointError,
    checkpoint_folders,
    named_checkpoint,
    newest_checkpoint,
    newest_good_checkpoint,
    open_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
    set_aside_newer,
)


def save(root, step, **state):
    tensors = {"model": {"w": torch.full((4, 4), float(step))}, "optimizer": {"w/momentum": torch.ones(3)}}
    return save_checkpoint(root, step, tensors, {"best_step": step, **state})


def test_save_and_load_round_trip(tmp_path):
    save(tmp_path, 5, value=0.1 + 0.2)
    found = newest_checkpoint(tmp_path)
    assert (found.step, found.state["value"]) == (5, 0.1 + 0.2)
    assert torch.equal(found.tensors("model")["w"], torch.full((4, 4), 5.0))
    assert torch.equal(found.tensors("optimizer")["w/momentum"], torch.ones(3))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_newest_checkpoint_is_set_aside_for_the_previous_one(tmp_path, file, damage, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=file.split(".")[0]):
        open_checkpoint(path.parent)
    with pytest.raises(UserError, match="--resume_from"):
        named_checkpoint(path.parent)
    assert newest_checkpoint(tmp_path).step == 1
    assert (tmp_path / "step-00000002.damaged").is_dir()


def test_free_space_is_checked_before_writing(tmp_path):
    save(tmp_path, 1)
    petabyte = torch.zeros(1).expand(2**48)
    with pytest.raises(OSError, match="needs .* MB, .* MB free"):
        save_checkpoint(tmp_path, 2, {"model": {"w": petabyte}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_signal_only_checkpoints_serve_only_the_next_resume(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, best_step=10)
    for step in (31, 32, 33):
        save(tmp_path, step, best_step=10, for_signal_only=True)
        rotate_checkpoints(tmp_path, 2)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["10", "20", "30", "33"]
    assert newest_checkpoint(tmp_path).step == 33
    assert newest_good_checkpoint(tmp_path, before=None).step == 30
    assert newest_good_checkpoint(tmp_path, before=30).step == 20
    save(tmp_path, 40, best_step=40)
    rotate_checkpoints(tmp_path, 2)
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["10", "30", "40"]


def test_failed_save_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(
        "mvlm_core.training.checkpoint.sha256_file", lambda path: (_ for _ in ()).throw(OSError("no space left"))
    )
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000001"]
    assert newest_checkpoint(tmp_path).step == 1


def test_rotation_keeps_the_newest_and_the_best_checkpoints(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best_step=min(step, 2))
        rotate_checkpoints(tmp_path, keep=2)
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path)] == ["2", "5", "6"]


def test_set_aside_newer_hides_newer_checkpoints(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    set_aside_newer(tmp_path, 1)
    assert newest_checkpoint(tmp_path).step == 1


def test_resume_from_an_invalid_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        named_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        named_checkpoint(tmp_path)
