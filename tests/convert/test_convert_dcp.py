"""torch's distributed checkpoints: `dcp.load` reads ours, we read theirs, and nothing that they hold is run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from trained_runs import NUM_STEPS, Net, Training, bits

from polyaccel import Accelerator
from polyaccel.checkpoint import open_checkpoint
from polyaccel.checkpoint.convert import convert
from polyaccel.checkpoint.formats.bundle import Choices
from polyaccel.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ours(tmp_path: Path) -> tuple[Training, Path]:
    run = Training(Accelerator(backend="torch", cpu=True))
    run.train(0, NUM_STEPS)
    run.accelerator.save_state(tmp_path / "ours", blocking=True)
    return run, tmp_path / "ours"


def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_dcp_loads_a_run_of_ours_by_name(tmp_path: Path) -> None:
    run, folder = ours(tmp_path)
    convert(folder, tmp_path / "converted", "dcp")

    other = Training(Accelerator(backend="torch", cpu=True), seed=1)
    model, optimizer = other.accelerator.unwrap_model(other.model), other.optimizer.optimizer
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path / "converted", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for name, value in other.weights().items():
        np.testing.assert_array_equal(value, run.weights()[name], err_msg=name)
    expected = run.optimizer.optimizer.state_dict()
    found = optimizer.state_dict()
    for position, slots in expected["state"].items():
        for slot, value in slots.items():
            assert torch.equal(value, found["state"][position][slot])
    assert [group["weight_decay"] for group in found["param_groups"]] == [0.0, 0.01]
    assert [group["lr"] for group in found["param_groups"]] == [g["lr"] for g in expected["param_groups"]]


def test_there_and_back_is_exact(tmp_path: Path) -> None:
    _, folder = ours(tmp_path)
    convert(folder, tmp_path / "there", "dcp")
    done = convert(tmp_path / "there", tmp_path / "back", "polyaccel")
    assert done.left_behind == ()
    assert bits(tmp_path / "back") == bits(folder)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "back")
    assert (after.shared, after.own(0)) == (before.shared, before.own(0))


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_checkpoint_of_theirs_is_read_by_name(tmp_path: Path, is_flat: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    model, optimizer = stepped()
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=is_flat))
    dcp.save({"app": {"model": weights, "optim": state}, "epoch": 3}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    done = convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert done.left_behind == ("epoch",)
    found = bits(tmp_path / "converted")
    assert found["model"]["first.weight"][2] == model.first.weight.detach().numpy().tobytes()
    assert (
        found["optimizer"]["first.weight.exp_avg"][2]
        == optimizer.state[model.first.weight]["exp_avg"].numpy().tobytes()
    )
    assert len(found["optimizer"]) == 3 * 6


def test_a_run_continues_from_a_checkpoint_of_theirs(tmp_path: Path) -> None:
    model, optimizer = stepped()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "optim": state}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    places = {"model": ("weights",), "optimizer": ("optim",)}
    convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel", choices=Choices(places=places))

    accelerator = Accelerator(backend="jax", cpu=True, split_batches=True)
    other = Net()
    other, other_optimizer = accelerator.prepare(other, torch.optim.AdamW(other.parameters(), lr=1.0))
    accelerator.load_state(tmp_path / "converted")
    assert other_optimizer.param_groups[0]["lr"] == 0.01
    batch = torch.ones(8, 3)
    for one, its_optimizer, backward in (
        (model, optimizer, torch.Tensor.backward),
        (other, other_optimizer, lambda loss: accelerator.backward(loss)),
    ):
        its_optimizer.zero_grad()
        backward(one(batch).square().mean())
        its_optimizer.step()
    theirs = model.state_dict()
    for name, value in accelerator.unwrap_model(other).state_dict().items():
        np.testing.assert_allclose(value.numpy(), theirs[name].detach().numpy(), rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_chunks_of_several_processes_are_put_together(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/rendezvous", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        rows = torch.arange(35.0).reshape(5, 7)
        weights = {
            "rows": distribute_tensor(rows, mesh, [Shard(0)]),
            "columns": distribute_tensor(rows.bfloat16(), mesh, [Shard(1)]),
            "whole": torch.arange(3),
        }
        dcp.save({"model": weights}, checkpoint_id=f"{sys.argv[2]}/theirs")
        dist.destroy_process_group()
        """)
    )
    command = [sys.executable, str(script)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(100) for process in processes] == [0, 0]
    convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    rows = torch.arange(35.0).reshape(5, 7)
    assert bits(tmp_path / "converted")["model"] == {
        "rows": ("float32", (5, 7), rows.numpy().tobytes()),
        "columns": ("bfloat16", (5, 7), rows.bfloat16().view(torch.uint16).numpy().tobytes()),
        "whole": ("int64", (3,), torch.arange(3).numpy().tobytes()),
    }


# -- bad faith ------------------------------------------------------------------------------------------------------------------


class Planted:
    """Loading its pickle would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def theirs(tmp_path: Path) -> Path:
    dcp.save({"model": {"weight": torch.arange(6.0)}, "step": 3}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    return tmp_path / "theirs"


def rewritten(folder: Path, change: Any) -> None:
    """The index of a DCP folder with something changed in it."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_an_index_that_runs_code_is_read_and_does_nothing(tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    rewritten(folder, lambda index: setattr(index, "storage_meta", Planted(tmp_path / "ran")))
    convert(folder, tmp_path / "converted", "polyaccel")
    assert bits(tmp_path / "converted")["model"]["weight"][2] == torch.arange(6.0).numpy().tobytes()
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"holds a (posix|nt).mkdir where DCP has its Metadata"):
        convert(folder, tmp_path / "again", "polyaccel")
    assert not (tmp_path / "ran").exists()


def test_a_stored_value_that_runs_code_is_refused(tmp_path: Path) -> None:
    dcp.save(
        {"model": {"weight": torch.ones(2)}, "own": Planted(tmp_path / "ran")},
        checkpoint_id=tmp_path / "theirs",
        no_dist=True,
    )
    with pytest.raises(CheckpointError, match="cannot be read as data"):
        convert(tmp_path / "theirs", tmp_path / "converted", "polyaccel")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "a\0b"])
def test_an_index_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = theirs(tmp_path)

    def point_outside(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    rewritten(folder, point_outside)
    with pytest.raises(CheckpointError, match="which is no file of the folder"):
        convert(folder, tmp_path / "converted", "polyaccel")


def test_an_index_whose_chunks_are_not_the_array_is_refused(tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    rewritten(folder, lambda index: setattr(index.state_dict_metadata["model.weight"], "size", torch.Size([7])))
    with pytest.raises(CheckpointError, match="do not make up its shape"):
        convert(folder, tmp_path / "converted", "polyaccel")


@pytest.mark.parametrize("kept", [0, 1, 20, 200, -1])
def test_a_truncated_index_is_refused(tmp_path: Path, kept: int) -> None:
    folder = theirs(tmp_path)
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[:kept])
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "converted", "polyaccel")


def test_a_link_to_another_file_is_not_followed(tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be read"):
        convert(folder, tmp_path / "converted", "polyaccel")


def test_a_truncated_chunk_is_refused(tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-100])
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "converted", "polyaccel")
    assert not (tmp_path / "converted").exists()
