"""Values between processes: everything plain survives exactly, everything else is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel import wire
from polyaccel.errors import UnsupportedError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)  # a busy machine is no failure
@given(trees)
def test_plain_values_come_back_equal_and_of_the_same_type(value):
    back = wire.decode(wire.encode(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16", "uint8", "complex64"])
def test_arrays_come_back_with_their_dtype_and_shape(dtype):
    for shape in [(), (0, 3), (2, 3)]:
        array = np.ones(shape, dtype)
        back = wire.decode(wire.encode({"a": [array]}))["a"][0]
        assert back.dtype == array.dtype
        assert back.shape == shape
        np.testing.assert_array_equal(back, array)


def test_nan_survives():
    assert np.isnan(wire.decode(wire.encode(float("nan"))))


def test_what_could_run_code_is_refused_by_type():
    for value in (object(), len, np.array([object()]), {"deep": [lambda: 0]}):
        with pytest.raises(UnsupportedError, match="cannot be sent between processes"):
            wire.encode(value)


def test_bytes_left_over_are_an_error():
    with pytest.raises(ValueError, match="after the end"):
        wire.decode(wire.encode(1) + b"x")


def test_torch_tensors_come_back_as_tensors_of_their_dtype():
    torch = pytest.importorskip("torch")
    for tensor in (torch.arange(6).reshape(2, 3), torch.full((2,), 1.5, dtype=torch.bfloat16), torch.zeros(0, 4)):
        back = wire.decode(wire.encode({"a": [tensor]}))["a"][0]
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
