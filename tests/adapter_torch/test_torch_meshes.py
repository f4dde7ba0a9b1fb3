"""fsdp and tensor axes on the torch engine: four gloo processes answer, mesh_job.py asks, and one process is what they must be equal to."""

from __future__ import annotations

import functools
from pathlib import Path

import mesh_job
import pytest
import safetensors.torch
import torch
from gloo_jobs import answers_of
from small_gpt import SAMPLES, accelerator, gpt, loader, train
from torch import nn

from polyaccel_torch.sharded import fsdp

JOB = Path(mesh_job.__file__)
FSDP, FSDP_TENSOR, DATA_FSDP = "fsdp 4", "fsdp 2 x tensor 2", "data 2 x fsdp 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the four processes keep what they save."""
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def answers(folder) -> list[dict]:
    """Those of each process."""
    return answers_of(JOB, folder, 4)


@functools.cache
def of_one_process(num_steps: int = 20, **settings):
    run = accelerator(**settings)
    model = gpt(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model, optimizer, batches = run.prepare(model, optimizer, loader())
    return *train(run, model, optimizer, batches, num_steps), model, optimizer


def assert_close(given, expected, tolerance=1e-5):
    """fp32 sums in another order."""
    torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mesh", mesh_job.MESHES)
def test_twenty_steps_are_those_of_one_process(answers, mesh):
    losses, norms, model, _ = of_one_process()
    for one in answers:
        found = one[f"twenty steps, {mesh}"]
        assert_close(found["losses"], losses)
        assert_close(found["norms"], norms, 1e-4)  # norms are near 2: the same in relation
        assert found["is a Gpt"]
        assert_close(
            [found["values"][name] for name in model.state_dict()],
            [float(value.double().square().sum()) for value in model.state_dict().values()],
            1e-3,
        )


@pytest.mark.parametrize("mesh", [FSDP_TENSOR, DATA_FSDP])
def test_micro_batches_are_added_up_before_their_exchange(answers, mesh):
    losses, norms, *_ = of_one_process(10, gradient_accumulation_steps=5)
    assert_close(answers[0][f"accumulated, {mesh}"]["losses"], losses)
    assert_close(answers[0][f"accumulated, {mesh}"]["norms"], norms, 1e-4)


def test_a_fused_step_is_the_same_training(answers):
    losses, *_ = of_one_process(10, gradient_accumulation_steps=5)
    assert_close(answers[0]["fused"], losses)


def test_bf16_trains_as_it_does_in_one_process(answers):
    losses, *_ = of_one_process(6, mixed_precision="bf16")
    # Parameters of norms are narrow too on the mesh, where autocast leaves them in float32.
    assert_close(answers[0]["bf16"]["losses"], losses, 0.1)
    assert answers[0]["bf16"]["losses"][-1] < answers[0]["bf16"]["losses"][0]


@pytest.mark.parametrize("question", ["resumed", "resumed on tensor"])
def test_a_run_continues_on_another_mesh(answers, question):
    assert_close(answers[0][question], of_one_process()[0])


def test_each_process_keeps_its_part_of_parameters_and_optimizer_state(answers):
    model = of_one_process()[2]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    for one in answers:
        parameters, state = one[f"twenty steps, {FSDP}"]["bytes"]
        assert parameters <= whole / 4 + 64  # of a dim of 3 one process has none, and the others a row
        assert state == 2 * parameters
    split = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if "blocks" in name and "ln_" not in name and name.rpartition(".")[0][-4:] != "norm"
    )
    for one in answers:
        parameters, _ = one[f"twenty steps, {FSDP_TENSOR}"]["bytes"]
        rows_cut = sum(
            p.nbytes for name, p in model.named_parameters() if name.endswith(("out_proj.bias", "fc2.bias"))
        )  # whole on the tensor axis
        assert parameters <= (split - rows_cut) / 4 + (whole - split + rows_cut) / 2 + 64


def test_saved_weights_are_whole_and_load_anywhere(folder, answers):
    number = list(mesh_job.QUESTIONS).index(f"twenty steps, {FSDP_TENSOR}")
    saved = safetensors.torch.load_file(folder / str(number) / "weights" / "model.safetensors")
    for name, value in of_one_process()[2].state_dict().items():
        # Tied parameters are there once. Softmax does not see a shift of its keys: that gradient is rounding, which Adam makes large.
        if name in saved and not name.endswith("k_proj.bias"):
            torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-4)
    assert len(saved) == len(list(of_one_process()[2].parameters()))


@pytest.mark.parametrize("question", ["interrupted", "interrupted, bf16"])
def test_a_run_that_was_stopped_inside_a_window_goes_on_exactly(answers, question):
    for one in answers:
        (losses, norms), (more, norms_of_more), *_ = one[question]
        assert more == losses[3:]
        assert norms_of_more == norms[1:]


def test_an_open_window_continues_on_any_mesh(answers):
    losses, norms, *_ = of_one_process(6, gradient_accumulation_steps=2)
    for one in answers:
        _, _, *others = one["interrupted"]
        for more, norms_of_more in others:
            assert_close(more, losses[3:])
            assert_close(norms_of_more, norms[1:], 1e-4)


def test_a_model_without_values_computes_them_in_parts(answers):
    ranges = answers[0]["late"]["ranges"]
    for name, (low, high) in ranges.items():
        if name.startswith("blocks"):
            assert -0.25 <= low < high <= 0.25  # 1 / sqrt(16), nn.Linear's own bound
    assert ranges["norm.weight"] == [1, 1]
    assert all(one["late"]["ranges"] == ranges for one in answers)


def test_running_statistics_are_those_of_the_first_process(answers):
    assert answers[1]["late"]["before"] != answers[0]["late"]["before"]
    assert all(one["late"]["after"] == answers[0]["late"]["before"] for one in answers)


def test_processes_of_one_tensor_group_drop_the_same_and_others_do_not(answers):
    for first, second, third, fourth in answers[0][
        "noise"
    ]:  # from prepare on, and after set_seed(device_specific=True)
        assert first == second
        assert third == fourth
        assert first != third


def test_blocks_are_gathered_one_at_a_time_unless_they_share_parameters():
    class Nested(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)])
            if tied:
                self.first.weight = self.stages[0][1].weight

    assert list(fsdp.blocks_of(gpt(0))) == ["blocks.0", "blocks.1"]
    everything = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    assert list(fsdp.blocks_of(Nested(tied=False))) == everything
    assert list(fsdp.blocks_of(Nested(tied=True))) == ["stages.0.0", "stages.1.0", "stages.1.1"]


def test_metrics_count_each_sample_once(answers):
    for one in answers:
        assert sorted(one["metrics"]) == [*range(SAMPLES // 8 + 1)]


def test_what_cannot_be_split_is_refused_by_name(answers):
    of_ddp, nothing = answers[0]["refused"]
    assert "ddp_bucket_cap_mb=5" in of_ddp
    assert "mesh.tensor=2 splits no layer of Sequential" in nothing
