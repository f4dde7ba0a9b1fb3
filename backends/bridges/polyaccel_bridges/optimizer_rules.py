"""torch.optim's update rules in pure jnp: one small function per optimizer, with torch's own state keys and order of operations.

Whatever torch computes from hyperparameters in Python's float64 (`1 - beta`, `log(beta)`, `1 - lr * weight_decay`) is computed
on the host in float64 too and arrives rounded once; on the device float32 is enough, so a program holds no float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

Group = Mapping[str, Any]  # one of torch's param_groups
Scalars = Mapping[str, Array]  # the group's numbers inside the program, each of shape ()
State = Mapping[str, Array]  # one parameter's state, by torch's key
Shape = tuple[int, ...]


class Flags(NamedTuple):
    """What a program is specialised on: options of a group that choose formulas, not numbers."""

    maximize: bool = False
    momentum: bool = False
    nesterov: bool = False
    amsgrad: bool = False
    centered: bool = False
    decoupled_weight_decay: bool = False
    has_dtype_eps: bool = False
    initial_accumulator_value: float = 0.0


class StateArray(NamedTuple):
    """One array of a parameter's state. `is_scalar` marks a number that torch keeps in float32 beside a parameter of any dtype."""

    shape: Shape
    fill: float = 0.0
    is_scalar: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One optimizer: `scalars` of a group (host, float64), `layout` of a parameter's state, and the `update` itself.

    `update(p, g, t, state, h, flags)` takes the parameter, its gradient, the number of this step (1 at the first), the state
    without `step`, the group's scalars (with `dtype_eps`, the parameter's own finfo eps, added) and flags, every array in one
    dtype: float32, or float64 for a float64 parameter. It returns the new parameter and the entries of the state that
    changed. `is_elementwise` says that an element of the result depends on that element alone, so the rule may run on any
    shard of a parameter.
    """

    scalars: Callable[[Group], dict[str, float]]
    layout: Callable[[Shape, Flags], dict[str, StateArray]]
    update: Callable[[Array, Array, Array, State, Scalars, Flags], tuple[Array, dict[str, Array]]]
    is_elementwise: bool = True


STEP = StateArray((), is_scalar=True)


def number(value: Any) -> float:
    """The Python float behind a float, an int or torch's one-element tensor."""
    return value if type(value) is float else float(value)


def _decay(group: Group) -> dict[str, float]:
    lr, weight_decay = number(group["lr"]), number(group["weight_decay"])
    return {"lr": lr, "weight_decay": weight_decay, "shrink": 1 - lr * weight_decay}


def _moments(group: Group) -> dict[str, float]:
    beta1, beta2 = map(number, group["betas"])
    return {
        "beta1": beta1,
        "beta2": beta2,
        "rate1": 1 - beta1,
        "rate2": 1 - beta2,
        "log_beta1": _log(beta1),
        "log_beta2": _log(beta2),
        "eps": number(group["eps"]),
    }


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _bias_correction(log_beta: Array, t: Array) -> Array:
    """`1 - beta**t`, by expm1: the plain form loses half of float32's digits while beta**t is close to 1."""
    return -jnp.expm1(log_beta * t)


def _lerp(start: Array, end: Array, weight: Array) -> Array:
    return start + weight * (end - start)


def _weight_decay(p: Array, g: Array, h: Scalars, flags: Flags) -> tuple[Array, Array]:
    """Shrinks the parameter (decoupled) or adds the L2 gradient; with a weight_decay of 0 both are exact identities."""
    if flags.decoupled_weight_decay:
        return p * h["shrink"], g
    return p, g + h["weight_decay"] * p


# SGD ------------------------------------------------------------------------------------------------------------------


def _sgd_scalars(group: Group) -> dict[str, float]:
    return {**_decay(group), "momentum": number(group["momentum"]), "rate": 1 - number(group["dampening"])}


def _sgd_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    # torch marks the first step by a missing buffer, which a compiled program cannot: `step` says it here.
    return {"step": STEP, "momentum_buffer": StateArray(shape)} if flags.momentum else {}


def _sgd(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    if not flags.momentum:
        return p - h["lr"] * g, {}
    buffer = jnp.where(t == 1, g, h["momentum"] * s["momentum_buffer"] + h["rate"] * g)
    direction = g + h["momentum"] * buffer if flags.nesterov else buffer
    return p - h["lr"] * direction, {"momentum_buffer": buffer}


# Adam and its kin -----------------------------------------------------------------------------------------------------


def _adam_scalars(group: Group) -> dict[str, float]:
    return {**_decay(group), **_moments(group)}


def _adam_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    layout = {"step": STEP, "exp_avg": StateArray(shape), "exp_avg_sq": StateArray(shape)}
    return {**layout, "max_exp_avg_sq": StateArray(shape)} if flags.amsgrad else layout


def _averages(g: Array, s: State, h: Scalars) -> dict[str, Array]:
    return {
        "exp_avg": _lerp(s["exp_avg"], g, h["rate1"]),
        "exp_avg_sq": h["beta2"] * s["exp_avg_sq"] + h["rate2"] * g * g,
    }


def _adam(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    new = _averages(g, s, h)
    second = new["exp_avg_sq"]
    if flags.amsgrad:
        second = new["max_exp_avg_sq"] = jnp.maximum(s["max_exp_avg_sq"], second)
    denominator = jnp.sqrt(second) / jnp.sqrt(_bias_correction(h["log_beta2"], t)) + h["eps"]
    return p - h["lr"] / _bias_correction(h["log_beta1"], t) * new["exp_avg"] / denominator, new


def _adamax_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {"step": STEP, "exp_avg": StateArray(shape), "exp_inf": StateArray(shape)}


def _adamax(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    mean = _lerp(s["exp_avg"], g, h["rate1"])
    largest = jnp.maximum(h["beta2"] * s["exp_inf"], jnp.abs(g) + h["eps"])
    step_size = h["lr"] / _bias_correction(h["log_beta1"], t)
    return p - step_size * mean / largest, {"exp_avg": mean, "exp_inf": largest}


def _nadam_scalars(group: Group) -> dict[str, float]:
    # 0.96 is torch's constant; as a rate of exp it needs one multiplication per step.
    return {**_adam_scalars(group), "log_cache": math.log(0.96) * number(group["momentum_decay"])}


def _nadam_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {**_adam_layout(shape, flags), "mu_product": StateArray((), 1.0, is_scalar=True)}


def _nadam(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    mu = h["beta1"] * (1 - 0.5 * jnp.exp(h["log_cache"] * t))
    mu_next = h["beta1"] * (1 - 0.5 * jnp.exp(h["log_cache"] * (t + 1)))
    product = s["mu_product"] * mu
    new = _averages(g, s, h)
    denominator = jnp.sqrt(new["exp_avg_sq"] / _bias_correction(h["log_beta2"], t)) + h["eps"]
    gradient_part = (1 - mu) / (1 - product) * g
    average_part = mu_next / (1 - product * mu_next) * new["exp_avg"]
    return p - h["lr"] * (gradient_part + average_part) / denominator, {**new, "mu_product": product}


def _radam_scalars(group: Group) -> dict[str, float]:
    scalars = _adam_scalars(group)
    return {**scalars, "rho_inf": 2 / scalars["rate2"] - 1}


def _langevin(x: Array) -> Array:
    """`coth(x) - 1/x` for x > 0; a series where the two terms would cancel (relative error below 1e-6 in float32)."""
    y = x * x
    series = x / 3 * (1 - y / 15 * (1 - y * 2 / 21 * (1 - y / 10 * (1 - y * 10 / 99))))
    away = jnp.maximum(x, 0.5)
    return jnp.where(x < 0.5, series, 1 / jnp.tanh(away) - 1 / away)


def _rectification(t: Array, h: Scalars) -> tuple[Array, Array]:
    """RAdam's rho_t and its rectification.

    rho_t = rho_inf - 2 t beta2**t / (1 - beta2**t) subtracts two numbers near 2000 to get one near 5, on which a branch
    hangs. With L = -log(beta2)/2 it equals t + langevin(L) - t * langevin(t * L), which keeps float32's digits.
    """
    half_rate = -0.5 * h["log_beta2"]
    rho, rho_inf = t + _langevin(half_rate) - t * _langevin(t * half_rate), h["rho_inf"]
    return rho, jnp.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def _radam(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    new = _averages(g, s, h)
    rho, rectification = _rectification(t, h)
    root = jnp.sqrt(_bias_correction(h["log_beta2"], t))
    adaptive = rectification * root / (jnp.sqrt(new["exp_avg_sq"]) + h["eps"])
    step_size = h["lr"] / _bias_correction(h["log_beta1"], t)
    return p - step_size * new["exp_avg"] * jnp.where(rho > 5, adaptive, 1), new


# Running sums of squares ----------------------------------------------------------------------------------------------


def _adagrad_scalars(group: Group) -> dict[str, float]:
    return {**_decay(group), "lr_decay": number(group["lr_decay"]), "eps": number(group["eps"])}


def _adagrad_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {"step": STEP, "sum": StateArray(shape, flags.initial_accumulator_value)}


def _adagrad(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    total = s["sum"] + g * g
    step_size = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return p - step_size * g / (jnp.sqrt(total) + h["eps"]), {"sum": total}


def _rmsprop_scalars(group: Group) -> dict[str, float]:
    alpha = number(group["alpha"])
    own = {"alpha": alpha, "rate": 1 - alpha, "eps": number(group["eps"]), "momentum": number(group["momentum"])}
    return {**_decay(group), **own}


def _rmsprop_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    layout = {"step": STEP, "square_avg": StateArray(shape)}
    if flags.momentum:
        layout["momentum_buffer"] = StateArray(shape)
    if flags.centered:
        layout["grad_avg"] = StateArray(shape)
    return layout


def _rmsprop(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    new = {"square_avg": h["alpha"] * s["square_avg"] + h["rate"] * g * g}
    variance = new["square_avg"]
    if flags.centered:
        new["grad_avg"] = _lerp(s["grad_avg"], g, h["rate"])
        variance = variance - new["grad_avg"] * new["grad_avg"]
    direction = g / (jnp.sqrt(variance) + h["eps"])
    if flags.momentum:
        direction = new["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + direction
    return p - h["lr"] * direction, new


def _adadelta_scalars(group: Group) -> dict[str, float]:
    rho = number(group["rho"])
    return {**_decay(group), "rho": rho, "rate": 1 - rho, "eps": number(group["eps"])}


def _adadelta_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {"step": STEP, "square_avg": StateArray(shape), "acc_delta": StateArray(shape)}


def _adadelta(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    square = h["rho"] * s["square_avg"] + h["rate"] * g * g
    delta = jnp.sqrt(s["acc_delta"] + h["eps"]) / jnp.sqrt(square + h["eps"]) * g
    return p - h["lr"] * delta, {
        "square_avg": square,
        "acc_delta": h["rho"] * s["acc_delta"] + h["rate"] * delta * delta,
    }


# Adafactor ------------------------------------------------------------------------------------------------------------


def _adafactor_scalars(group: Group) -> dict[str, float]:
    eps1, eps2 = group["eps"]
    own = {"beta2_decay": number(group["beta2_decay"]), "d": number(group["d"]), "eps2": number(eps2)}
    return {**_decay(group), **own, "eps1": 0.0 if eps1 is None else number(eps1)}  # None: the rule takes dtype_eps


def _adafactor_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    if len(shape) < 2:
        return {"step": STEP, "variance": StateArray(shape)}
    return {"step": STEP, "row_var": StateArray((*shape[:-1], 1)), "col_var": StateArray((*shape[:-2], 1, shape[-1]))}


def _root_mean_square(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(x * x))


def _adafactor(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    eps1 = h["dtype_eps"] if flags.has_dtype_eps else h["eps1"]
    rate = t ** h["beta2_decay"]
    step_size = jnp.maximum(h["eps2"], _root_mean_square(p)) * jnp.minimum(h["lr"], lax.rsqrt(t))
    if p.ndim > 1:
        row = _lerp(s["row_var"], jnp.mean(g * g, axis=-1, keepdims=True), rate)  # (..., rows, 1)
        col = _lerp(s["col_var"], jnp.mean(g * g, axis=-2, keepdims=True), rate)  # (..., 1, cols)
        new = {"row_var": row, "col_var": col}
        variance = row * col / jnp.maximum(jnp.mean(row, axis=-2, keepdims=True), eps1)  # (..., rows, cols)
    else:
        variance = _lerp(s["variance"], g * g, rate)
        new = {"variance": variance}
    update = g * lax.rsqrt(jnp.maximum(variance, eps1 * eps1))
    clip = jnp.maximum(1, _root_mean_square(update) / h["d"])
    return p * h["shrink"] - step_size / clip * update, new


# ASGD, Rprop ----------------------------------------------------------------------------------------------------------


def _asgd_scalars(group: Group) -> dict[str, float]:
    return {**_decay(group), **{key: number(group[key]) for key in ("lambd", "alpha", "t0")}}


def _asgd_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {"step": STEP, "eta": STEP, "mu": StateArray((), 1.0, is_scalar=True), "ax": StateArray(shape)}


def _asgd(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    p, g = _weight_decay(p, g, h, flags)
    eta = jnp.where(t == 1, h["lr"], s["eta"])  # torch starts from the lr of the first step, not of construction
    p = p * (1 - h["lambd"] * eta) - eta * g
    return p, {
        "ax": jnp.where(s["mu"] == 1, p, s["ax"] + (p - s["ax"]) * s["mu"]),
        "eta": h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"],
        "mu": 1 / jnp.maximum(1, t - h["t0"]),
    }


def _rprop_scalars(group: Group) -> dict[str, float]:
    shrink, grow = map(number, group["etas"])
    smallest, largest = map(number, group["step_sizes"])
    return {"lr": number(group["lr"]), "shrink": shrink, "grow": grow, "smallest": smallest, "largest": largest}


def _rprop_layout(shape: Shape, flags: Flags) -> dict[str, StateArray]:
    return {"step": STEP, "prev": StateArray(shape), "step_size": StateArray(shape)}


def _rprop(p: Array, g: Array, t: Array, s: State, h: Scalars, flags: Flags) -> tuple[Array, dict[str, Array]]:
    agreement = g * s["prev"]
    factor = jnp.where(agreement > 0, h["grow"], jnp.where(agreement < 0, h["shrink"], 1))
    size = jnp.clip(jnp.where(t == 1, h["lr"], s["step_size"]) * factor, h["smallest"], h["largest"])
    g = jnp.where(agreement < 0, 0, g)
    return p - jnp.sign(g) * size, {"prev": g, "step_size": size}


RULES: Mapping[str, Rule] = {
    "SGD": Rule(_sgd_scalars, _sgd_layout, _sgd),
    "Adam": Rule(_adam_scalars, _adam_layout, _adam),
    "AdamW": Rule(_adam_scalars, _adam_layout, _adam),
    "Adamax": Rule(_adam_scalars, _adamax_layout, _adamax),
    "NAdam": Rule(_nadam_scalars, _nadam_layout, _nadam),
    "RAdam": Rule(_radam_scalars, _adam_layout, _radam),
    "Adagrad": Rule(_adagrad_scalars, _adagrad_layout, _adagrad),
    "RMSprop": Rule(_rmsprop_scalars, _rmsprop_layout, _rmsprop),
    "Adadelta": Rule(_adadelta_scalars, _adadelta_layout, _adadelta),
    "Adafactor": Rule(_adafactor_scalars, _adafactor_layout, _adafactor, is_elementwise=False),
    "ASGD": Rule(_asgd_scalars, _asgd_layout, _asgd),
    "Rprop": Rule(_rprop_scalars, _rprop_layout, _rprop),
}
