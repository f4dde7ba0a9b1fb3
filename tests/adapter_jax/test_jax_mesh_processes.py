"""Meshes with fsdp and tensor axes in jobs of several processes: the numbers of one device, saved in pieces and resumed anywhere."""

from __future__ import annotations

import math

import jax
import mesh_processes as job
import numpy as np
import optax
import pytest
from asked_jobs import answers_of
from flax import nnx
from jax_engines import batches, cross_entropy
from safetensors.numpy import load_file

from polyaccel.sharding.plan import local_shape, plan_shardings
from polyaccel_torch.dialect.sharding_hints import hints_of

FSDP, SQUARE, HYBRID, PAIR, TENSOR = (
    {"fsdp": 4},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2},
    {"data": 2, "tensor": 2},
    {"tensor": 4},
)
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32 sums in another order over twenty steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh_processes")


@pytest.fixture(scope="module")
def two_processes(folder):
    """Two processes with two devices each."""
    plan = [
        ["flax", FSDP, "pmap", str(folder)],
        ["flax_accumulation", HYBRID, "sharding"],
        ["flax_precision", SQUARE, "fp16"],
        ["flax_created", SQUARE],
        ["torch_gpt", SQUARE, "auto", str(folder)],
        ["linen_bf16", FSDP],
        ["other_rows", TENSOR],
    ]
    return answers_of("mesh_processes.py", plan, folder, num_processes=2, num_devices=2)


@pytest.fixture(scope="module")
def four_processes(folder, two_processes):
    """Four processes with one device each, of which two share a data shard; they continue what the others saved."""
    plan = [
        ["flax_resumed", SQUARE, "auto", two_processes[0]["flax"]["path"]],
        ["flax_accumulation", SQUARE, "auto"],
        ["torch_resumed", FSDP, "auto", two_processes[0]["torch_gpt"]["path"]],
        ["metrics", PAIR],
    ]
    return answers_of("mesh_processes.py", plan, folder, num_processes=4, num_devices=1)


@pytest.fixture(scope="module")
def one_process(two_processes):
    """What one process with four devices reads of the same checkpoints."""
    path, other = (two_processes[0][name]["path"] for name in ("flax", "torch_gpt"))
    return job.flax_resumed(HYBRID, "pmap", path), job.torch_resumed(TENSOR, "auto", other)


def by_hand(model, data, *, accumulation=1, decay=None):
    """(losses, averages) of the loop that a flax user writes on one device, with clipping."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    averages, losses, total, norm = nnx.state(model, nnx.Param), [], None, None

    @nnx.jit
    def gradients(model, batch):
        return nnx.value_and_grad(cross_entropy)(model, batch)

    for number, batch in enumerate(data, start=1):
        loss, grads = gradients(model, batch)
        losses.append(float(loss))
        grads = jax.tree.map(lambda grad: grad / accumulation, grads)
        total = grads if total is None else jax.tree.map(np.add, total, grads)
        if number % accumulation == 0:
            norm = float(optax.tree.norm(total))
            factor = min(job.MAX_NORM / (norm + 1e-6), 1.0)
            optimizer.update(model, jax.tree.map(lambda grad, factor=factor: grad * factor, total))
            total = None
            if decay is not None:
                now = nnx.state(model, nnx.Param)
                averages = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, averages, now)
    return losses, averages, norm


def flat(state):
    return {".".join(map(str, path)): np.asarray(v.get_value()).ravel() for path, v in nnx.to_flat_state(state)}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)


def test_twenty_flax_steps_are_those_of_one_device_from_the_values_of_process_0(two_processes):
    model = job.Odd(nnx.Rngs(0))
    losses, averages, _ = by_hand(model, batches(20), decay=0.5)
    for result in two_processes:
        np.testing.assert_allclose(result["flax"]["losses"], losses, **CLOSE)
        for name, value in flat(averages).items():
            np.testing.assert_allclose(result["flax"]["averages"][name], value, **CLOSE)
        for name, value in flat(nnx.state(model, nnx.Param)).items():
            np.testing.assert_allclose(result["flax"]["state"][name], value, rtol=0, atol=1e-4)
        assert result["flax"]["applied"] == result["flax"]["averages"]["inner.first.bias"]
        assert result["flax"]["again"]


def test_each_device_holds_its_part_and_what_does_not_divide(two_processes):
    whole = 4 * (8 * 16 + 16 + 16 * 4 + 4)
    for result in two_processes:
        assert result["flax"]["parameter bytes"] == whole // 4 + 4 * 15
        assert result["flax"]["gradient bytes"] == whole // 4 + 4 * 15
        assert result["flax"]["state bytes"] == 2 * (whole // 4 + 4 * 15) + 4  # and optax's count
        assert result["flax_created"]["gap"] < 1e-6  # compiled in one piece
        assert result["flax_created"]["bytes"] < (whole + 4 * 15) / 2


@pytest.mark.parametrize("job_name", ["two_processes", "four_processes"])
def test_windows_of_micro_batches_with_clipping_are_those_of_one_device(request, job_name):
    losses, _, norm = by_hand(job.Odd(nnx.Rngs(0)), batches(8), accumulation=2)
    for result in request.getfixturevalue(job_name):
        np.testing.assert_allclose(result["flax_accumulation"]["losses"], losses, **CLOSE)
        assert result["flax_accumulation"]["norm"] == pytest.approx(norm, abs=1e-5)


def test_fp16_with_a_loss_scale_trains(two_processes):
    model = job.Mlp(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    expected = []
    for batch in batches(4):
        loss, grads = nnx.value_and_grad(cross_entropy)(model, batch)
        optimizer.update(model, grads)
        expected.append(float(loss))
    for result in two_processes:
        np.testing.assert_allclose(result["flax_precision"], expected, rtol=0, atol=5e-3)  # eps of fp16 is 1e-3


def test_a_linen_model_in_bf16_trains_in_pieces_and_its_metrics_count_samples_once(two_processes):
    module, variables = job.linen_model().unbind()
    params, expected = variables["params"], []

    @jax.jit
    def gradients(params, batch):
        def loss_fn(params):
            logits = module.apply({"params": params}, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        return jax.value_and_grad(loss_fn)(params)

    for batch in batches(4):
        loss, grads = gradients(params, batch)
        params = jax.tree.map(lambda value, grad: value - 0.1 * grad, params, grads)
        expected.append(float(loss))
    logits = np.ravel(module.apply({"params": params}, batches(1)[0]["x"]))
    for result in two_processes:
        result = result["linen_bf16"]
        np.testing.assert_allclose(result["losses"], expected, rtol=0, atol=2e-2)  # eps of bf16 is 8e-3
        np.testing.assert_allclose(result["logits"][0], logits, rtol=0, atol=5e-2)
        assert result["ids"] == [list(range(job.SIZE)), list(range(12))]
        assert result["kept"] == ["float32"]
        assert result["bytes"] == 4 * (8 * 16 + 16 + 16 * 4 + 4) // 4


def test_twenty_torch_steps_of_three_forms_are_those_of_plain_torch(two_processes):
    model, losses, norms = job.plain_torch(job.gpt, job.tokens(20).split(job.SIZE), job.loss_fn)
    sizes = {"replica": 1, "data": 1, "sequence": 1, **SQUARE}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = plan_shardings(shapes, sizes, job.RULES, hints_of(model)).specs
    predicted = 4 * sum(math.prod(local_shape(shape, specs[name], sizes)) for name, shape in shapes.items())
    for result in two_processes:
        result = result["torch_gpt"]
        np.testing.assert_allclose(result["losses"], losses, **CLOSE)
        np.testing.assert_allclose(result["norms"], norms[:15], **CLOSE)
        assert result["is cut"]
        assert result["keys"]
        assert result["loaded"]
        assert result["parameter bytes"] == result["gradient bytes"] == predicted
        for name, value in model.state_dict().items():
            # Adam moves what has no gradient but rounding, the bias of keys, by as much as anything else.
            np.testing.assert_allclose(result["state"][name], value.numpy().ravel(), rtol=0, atol=1e-3)


def test_what_is_in_pieces_is_refused_by_name_where_one_process_would_read_it(two_processes):
    for result in two_processes:
        gradient, state, parameter = result["torch_gpt"]["refused"]
        assert "the gradient of 'tokens.weight' of Gpt lies in pieces on several processes" in gradient
        assert "in the state of AdamW lies in pieces" in state
        assert "the parameter 'tokens.weight' of Gpt lies in pieces" in parameter
        assert "accelerator.get_state_dict(model)" in parameter


def test_processes_of_one_data_shard_with_different_rows_are_refused(two_processes):
    for result in two_processes:
        assert "processes 0 and 1 hold devices of one data shard, and were given different rows" in result["other_rows"]


def test_a_checkpoint_of_pieces_is_resumed_exactly_on_other_meshes_and_numbers_of_processes(
    two_processes, four_processes, one_process
):
    saved = two_processes[0]
    by_one, by_one_torch = one_process
    for result in [*(one["flax_resumed"] for one in four_processes), by_one]:
        same(result["state"], saved["flax"]["state"])
        same(result["averages"], saved["flax"]["averages"])
        assert result["following"] == pytest.approx(saved["flax"]["following"], abs=1e-6)
    of_four = [one["flax_resumed"]["optimizer"] for one in four_processes]
    assert {name for one in of_four for name in one} == by_one["optimizer"].keys()
    for name, total in by_one["optimizer"].items():
        assert math.fsum(one.get(name, 0.0) for one in of_four) == pytest.approx(total, rel=1e-5, abs=1e-6)
    for result in [*(one["torch_resumed"] for one in four_processes), by_one_torch]:
        same(result["state"], saved["torch_gpt"]["state"])
    following = {one["torch_resumed"]["following"] for one in four_processes} | {by_one_torch["following"]}
    assert max(following) - min(following) < 1e-5


def test_weights_of_pieces_are_written_whole_for_other_libraries(two_processes, folder):
    weights = load_file(folder / "weights" / "model.safetensors")
    same({name: value.ravel() for name, value in weights.items()}, two_processes[0]["flax"]["state"])


def test_metrics_count_every_sample_once_where_two_processes_have_it(four_processes):
    for result in four_processes:
        result = result["metrics"]
        numbers = list(range(result["count"]))
        assert result["flax"] == result["torch"] == numbers
        assert result["objects"] == list(map(str, numbers))
