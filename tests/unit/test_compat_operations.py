"""Accelerate's operations on nested batches, for torch, and for jax where it is installed, in one process."""

import importlib.util
import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest

from polyaccel import jobs
from polyaccel.errors import ConfigError
from polyaccel.registry import register_backend
from polyaccel.testing.fake import FakeBackend
from polyaccel.utils import (
    CannotPadNestedTensorWarning,
    GatheredParameters,
    TensorInformation,
    broadcast,
    broadcast_object_list,
    concatenate,
    convert_outputs_to_fp32,
    convert_to_fp32,
    copy_tensor_to_devices,
    find_batch_size,
    find_device,
    gather,
    gather_object,
    get_data_structure,
    honor_type,
    ignorant_find_batch_size,
    initialize_tensors,
    is_namedtuple,
    is_tensor_information,
    is_torch_tensor,
    listify,
    pad_across_processes,
    pad_input_tensors,
    recursively_apply,
    reduce,
    send_to_device,
    set_seed,
    slice_tensors,
    synchronize_rng_state,
    synchronize_rng_states,
)
from polyaccel.utils.operations import get_shape

torch = pytest.importorskip("torch")
HAS_JAX = importlib.util.find_spec("jax") is not None
register_backend(FakeBackend())
Pair = namedtuple("Pair", "x y")


class Rows(list):
    """A subclass of list, which trees take for a leaf."""


@pytest.fixture(params=["torch", pytest.param("jax", marks=pytest.mark.skipif(not HAS_JAX, reason="no jax"))])
def array(request):
    """Makes an array of the framework from nested lists."""
    if request.param == "torch":
        return lambda values, dtype="float32": torch.tensor(values, dtype=getattr(torch, dtype))
    import jax.numpy as jnp

    return lambda values, dtype="float32": jnp.asarray(values, dtype=dtype)


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(jobs, "_engines", [])
    monkeypatch.setattr(jobs, "_accelerators", [])
    monkeypatch.setattr(jobs, "_kept", None)
    monkeypatch.setattr(jobs, "_make", None)
    monkeypatch.setenv("POLYACCEL_BACKEND", "fake")


def numbers(value):
    return np.asarray(value).tolist()


def test_containers_keep_their_types_and_other_values_stay(array):
    @dataclass
    class Batch:
        ids: object
        name: str

    batch = {"p": Pair(array([1.0]), "text"), "r": Rows([array([2.0]), 3]), "d": Batch(array([4.0]), "b"), "n": None}
    doubled = recursively_apply(lambda leaf, factor: leaf * factor, UserDict(batch), 2)
    assert isinstance(doubled, UserDict)
    assert isinstance(doubled["p"], Pair)
    assert isinstance(doubled["r"], Rows)
    assert numbers(doubled["p"].x) == [2.0]
    assert doubled["p"].y == "text"
    assert numbers(doubled["r"][0]) == [4.0]
    assert doubled["r"][1] == 3
    assert numbers(doubled["d"].ids) == [8.0]
    assert doubled["d"].name == "b"
    assert doubled["n"] is None


def test_another_type_is_an_error_where_that_is_asked_for(array):
    def double(leaf):
        return leaf * 2

    with pytest.raises(TypeError, match=r"Unsupported types \(<class 'int'>\) passed to `double`.*`is_torch_tensor`"):
        recursively_apply(double, (array(1.0), 1), error_on_other_type=True)


def test_numpy_arrays_are_data_of_the_script():
    rows = np.zeros(3)
    assert recursively_apply(lambda leaf: leaf + 1, [rows])[0] is rows
    assert find_batch_size(rows) == 3


def test_the_batch_size_is_that_of_the_first_array(array):
    assert find_batch_size({"a": [array([[1.0], [2.0]])], "b": 3}) == 2
    assert ignorant_find_batch_size([]) is None
    with pytest.raises(ValueError, match="empty list"):
        find_batch_size([])
    with pytest.raises(TypeError, match="a str has no batch size"):
        find_batch_size(["text"])
    with pytest.raises(TypeError, match="no batch size"):
        find_batch_size(array(1.0))


def test_numbers_rows_and_shapes_come_out_of_nested_batches(array):
    batch = OrderedDict(a=array([[1.0, 2.0], [3.0, 4.0]]), b=(array([5.0, 6.0]),))
    assert listify(batch) == {"a": [[1.0, 2.0], [3.0, 4.0]], "b": ([5.0, 6.0],)}
    assert listify(slice_tensors(batch, slice(0, 1))) == {"a": [[1.0, 2.0]], "b": ([5.0],)}
    assert get_shape(batch)["a"] == [2, 2]
    assert listify([array([1.5], "bfloat16")]) == [[1.5]]


def test_batches_are_joined_tensor_by_tensor(array):
    first, second = ({"a": array([[1.0]]), "b": [array([[value]])]} for value in (2.0, 3.0))
    joined = concatenate([UserDict(first), UserDict(second)])
    assert isinstance(joined, UserDict)
    assert listify(dict(joined)) == {"a": [[1.0], [1.0]], "b": [[[2.0], [3.0]]]}
    assert listify(concatenate([array([[1.0]]), array([[2.0]])], dim=1)) == [[1.0, 2.0]]
    assert concatenate(["alone"]) == "alone"
    with pytest.raises(TypeError, match="got a str"):
        concatenate([{"a": "x"}, {"a": "y"}])


def test_a_described_batch_can_be_made_again(array):
    batch = [array([[1.0, 2.0]], "bfloat16"), "text"]
    described = get_data_structure(batch)
    assert is_tensor_information(described[0])
    assert described[0] == TensorInformation(batch[0].shape, batch[0].dtype)
    made = initialize_tensors(described)
    assert made[0].shape == batch[0].shape
    assert made[0].dtype == batch[0].dtype
    assert made[1] == "text"


def test_sixteen_bits_become_thirty_two_and_nothing_else_changes(array):
    batch = (array([1.5], "bfloat16"), array([2.5], "float16"), array([3], "int32"), np.float32(1), "text")
    converted = convert_to_fp32(batch)
    assert [str(one.dtype).rpartition(".")[2] for one in converted[:3]] == ["float32", "float32", "int32"]
    assert converted[2] is batch[2]
    assert converted[4] == "text"


def test_a_forward_of_converted_outputs_leads_back_and_is_not_pickled():
    forward = convert_outputs_to_fp32(lambda x: {"y": x.half()})
    assert forward(torch.ones(1))["y"].dtype == torch.float32
    assert forward.__wrapped__.__wrapped__(torch.ones(1))["y"].dtype == torch.float16
    with pytest.raises(TypeError, match="unwrap the model"):
        pickle.dumps(forward.__wrapped__)


@pytest.mark.parametrize(
    ("size", "num_processes", "padded"), [(1, 2, 2), (3, 2, 4), (4, 3, 6), (61, 6, 66), (4, 2, 4), (5, 3, 6)]
)
def test_inputs_are_filled_up_with_their_last_row(array, size, num_processes, padded):
    rows = pad_input_tensors({"x": array([[float(i)] for i in range(size)])}, size, num_processes)["x"]
    assert rows.shape == (padded, 1)
    assert listify(rows)[size - 1 :] == [[size - 1.0]] * (padded - size + 1)


def test_tensors_and_what_has_a_method_of_its_own_are_sent():
    class Encoding(UserDict):
        def to(self, device):
            return ("moved", device)

    batch = {"a": torch.zeros(2), "text": "t", "b": Pair(torch.ones(1), Encoding()), "kept": torch.zeros(1)}
    sent = send_to_device(batch, torch.device("meta"), skip_keys="kept")
    assert sent["a"].device.type == "meta"
    assert sent["text"] == "t"
    assert sent["b"].x.device.type == "meta"
    assert sent["b"].y == ("moved", torch.device("meta"))
    assert sent["kept"].device.type == "cpu"
    assert find_device(sent).type == "meta"
    assert find_device([1, "a"]) is None
    with pytest.raises(RuntimeError, match="nowhere"):
        send_to_device(torch.zeros(1), "nowhere")


@pytest.mark.skipif(not HAS_JAX, reason="no jax")
def test_arrays_of_jax_are_sent_to_a_device_of_jax():
    import jax

    device = jax.devices()[-1]
    sent = send_to_device({"a": [jax.numpy.ones(2)], "b": 1}, device)
    assert sent["a"][0].devices() == {device}
    assert sent["b"] == 1


def test_namedtuples_and_tensors_are_told_from_their_likes():
    assert is_namedtuple(Pair(1, 2))
    assert not is_namedtuple((1, 2))
    assert is_torch_tensor(torch.zeros(1))
    assert not is_torch_tensor(np.zeros(1))
    assert honor_type(Pair(1, 2), iter([3, 4])) == Pair(3, 4)
    assert honor_type((1,), iter([3, 4])) == (3, 4)
    with GatheredParameters([torch.zeros(1)], modifier_rank=0):
        pass


def test_in_one_process_values_come_back_and_reduce_gives_a_copy(job):
    tensor = torch.tensor([1.0, 2.0])
    assert gather({"a": tensor})["a"] is tensor
    assert gather_object(["a"]) == ["a"]
    assert broadcast([tensor])[0] is tensor
    assert broadcast_object_list([1, "b"]) == [1, "b"]
    reduced = reduce({"a": tensor})["a"]
    reduced += 1
    assert tensor.tolist() == [1.0, 2.0]
    assert reduce(tensor, "sum", scale=3.0).tolist() == [3.0, 6.0]
    assert copy_tensor_to_devices(tensor).tolist() == [1.0, 2.0]
    with pytest.raises(ConfigError, match="on 0 of 1 processes"):
        copy_tensor_to_devices(None)


def test_a_nested_tensor_is_not_padded_and_that_is_said(job):
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(1)], layout=torch.jagged)
    with pytest.warns(CannotPadNestedTensorWarning):
        padded = pad_across_processes({"n": nested, "t": torch.ones(2)})
    assert padded["n"] is nested
    assert padded["t"].tolist() == [1.0, 1.0]


def test_generators_of_the_host_go_on_as_on_process_0(job):
    set_seed(3)
    generator = torch.Generator().manual_seed(5)
    expected = (torch.Generator().manual_seed(5).get_state(), torch.get_rng_state())
    synchronize_rng_states(["torch", "numpy", "python", "generator"], generator)
    assert torch.equal(generator.get_state(), expected[0])
    assert torch.equal(torch.get_rng_state(), expected[1])


def test_generators_that_cannot_be_shared_are_refused(job, monkeypatch):
    with pytest.raises(ConfigError, match="needs a generator"):
        synchronize_rng_state("generator")
    with pytest.raises(ConfigError, match="rng_type='npu'"):
        synchronize_rng_state("npu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        synchronize_rng_state("cuda")
