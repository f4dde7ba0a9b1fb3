"""Floating point operations of jax programs, against what the mathematics needs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from polyaccel_jax.flops import FlopMeter, UncountableError, flops_of

M, K, N = 4, 6, 8
A, B = jnp.ones((M, K)), jnp.ones((K, N))


def count(function, *args):
    return flops_of(jax.make_jaxpr(function)(*args))


def test_a_matrix_product_is_two_operations_per_product():
    assert count(lambda a, b: jnp.tanh(a @ b) + 1, A, B) == 2 * M * K * N
    batched = jnp.ones((5, M, K))
    assert count(lambda a, b: jnp.einsum("bmk,kn->bmn", a, b), batched, B) == 5 * 2 * M * K * N


def test_the_backward_pass_is_two_products_of_the_same_size():
    loss = lambda a, b: jnp.sum((a @ b) ** 2)  # noqa: E731
    assert count(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * 2 * M * K * N
    assert count(jax.grad(loss, argnums=1), A, B) == 2 * 2 * M * K * N


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_and_its_gradients_are_three_times_its_products(stride, groups):
    images, kernel = jnp.ones((2, 8, 12, 12)), jnp.ones((6, 8 // groups, 3, 3))  # (batch, channels, height, width)

    def convolved(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (stride, stride), "SAME", feature_group_count=groups)

    size = 12 // stride
    forward = 2 * 2 * 6 * size * size * (8 // groups) * 9
    assert count(convolved, images, kernel) == forward
    gradients = jax.grad(lambda images, kernel: jnp.sum(convolved(images, kernel) ** 2), argnums=(0, 1))
    # Padding is counted as if it were data, and a stride's zeros are not: the three parts agree to within the border.
    assert count(gradients, images, kernel) == pytest.approx(3 * forward, rel=0.35)


def test_a_scan_counts_as_often_as_it_runs():
    def steps(a):
        return jax.lax.scan(lambda carry, _: (carry @ jnp.ones((K, K)), None), a, None, length=7)[0]

    assert count(steps, A) == 7 * 2 * M * K * K


def test_a_checkpointed_forward_counts_again_when_it_is_computed_again():
    loss = lambda a, b: jnp.sum(jnp.tanh(a @ b) ** 2)  # noqa: E731
    plain = count(jax.grad(loss, argnums=(0, 1)), A, B)
    again = count(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B)
    assert again == plain + 2 * M * K * N


def test_a_mapped_program_counts_once_per_shard():
    mesh = Mesh(jax.devices()[:4], "data")
    mapped = jax.shard_map(
        lambda a, b: a @ b,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    assert count(mapped, A, B) == 2 * M * K * N


def test_a_loop_of_unknown_length_cannot_be_counted_unless_it_multiplies_nothing():
    def loop(a, b):
        return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + (a @ b).sum(), jnp.zeros(()))

    with pytest.raises(UncountableError):
        count(loop, A, B)
    assert count(lambda a: jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + 1, a), A) == 0


def test_branches_count_where_they_are_equal_and_cannot_be_counted_where_they_are_not():
    same = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b))  # noqa: E731
    assert count(same, A, B) == 2 * M * K * N
    other = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((M, N)))  # noqa: E731
    with pytest.raises(UncountableError):
        count(other, A, B)


def test_code_that_nobody_can_look_into_cannot_be_counted():
    called = lambda a: jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(a.shape, a.dtype), a)  # noqa: E731
    with pytest.raises(UncountableError):
        count(called, A)


def test_a_meter_adds_up_calls_also_of_donated_arguments_and_reads_each_program_once():
    traced = []

    def product(owned, inputs):
        traced.append(1)
        return owned[0] + 1, owned[0] @ inputs[0]

    function, meter = jax.jit(product, donate_argnums=0), FlopMeter()
    for columns in (N, N, 2 * N):
        args = ((jnp.ones((M, K)),), [jnp.ones((K, columns))])
        function(*args)
        meter.ran(function, args)
    assert meter.total == 2 * M * K * (N + N + 2 * N)
    assert len(traced) == 2, "a program is traced for jit alone"


def test_a_meter_that_cannot_count_one_program_says_so_for_ever():
    function, meter = (
        jax.jit(lambda inputs: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, inputs[0])),
        FlopMeter(),
    )
    args = ([jnp.ones((2, 2))],)
    meter.ran(function, args)
    assert meter.total is None
