"""Within `jax.shard_map`, as its default checks of types want it: arguments of any mixture.

Each argument is once the same on all devices while the others are each device's own, and once its
own while the others are the same. Value and gradient are those of the devices one by one; the
gradient of what is the same is the sum over the devices.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from rnnattn import (
    LSTMParams,
    LSTMState,
    dot_product_attention,
    lstm,
    lstm_step,
    native,
    reference,
    rope,
    rope_2d,
    rope_mixed,
)
from tests.attention_cases import QUICK, assert_same

pytestmark = pytest.mark.slow

DEVICES = 2


def _lstm(run, w_x, w_h, b, x, h, c, peephole=None, lengths=None, resets=None):
    params = LSTMParams(w_x, w_h, b, peephole)
    masks = {"lengths": lengths, "resets": resets}
    given = {name: mask for name, mask in masks.items() if mask is not None}
    return run(params, x, LSTMState(h, c), **given)


def _attention(implementation):
    def run(**arrays):
        options: Any = {"is_causal": True, "implementation": implementation}
        return dot_product_attention(**arrays, **options, return_residual=True)

    return run


B, T, D, H, N, K = 2, 3, 2, 2, 2, 4
WEIGHTS = {"w_x": (D, 4 * H), "w_h": (H, 4 * H), "b": (4 * H,), "peephole": (3, H)}
STATE = {"h": (B, H), "c": (B, H)}
HEADS = {"query": (B, T, N, K), "key": (B, T, 1, K), "value": (B, T, 1, K)}
LOGITS = {"bias": (N, T, T), "scale": (N,), "sinks": (N,), "key_value_seq_lengths": (B,)}
TOKENS, PLACES = {"x": (B, T, N, K)}, {"rows": (T,), "columns": (B, 1)}

# What is called, and the shapes of its arguments on a device.
FUNCTIONS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "lstm": (
        lambda **arrays: _lstm(lstm, **arrays),
        {**WEIGHTS, "x": (B, T, D), **STATE, "lengths": (B,), "resets": (B, T)},
    ),
    "lstm_step": (lambda **arrays: _lstm(lstm_step, **arrays), {**WEIGHTS, "x": (B, D), **STATE}),
    "attention, dense": (_attention("dense"), HEADS | LOGITS),
    "attention, blockwise": (_attention("blockwise"), HEADS | LOGITS),
    "attention": (_attention(None), HEADS | LOGITS),
    "rope": (rope, TOKENS | {"positions": (T,)}),
    "rope_2d": (rope_2d, TOKENS | PLACES),
    "rope_mixed": (rope_mixed, TOKENS | PLACES | {"frequencies": (2, 1, K // 2)}),
    "reference.lstm": (
        lambda **arrays: _lstm(reference.lstm, **arrays),
        {**WEIGHTS, "x": (B, T, D), **STATE},
    ),
}

PLACEMENTS = [
    (function, bit, flipped)
    for function, (_, shapes) in FUNCTIONS.items()
    for bit in range(max(1, (len(shapes) - 1).bit_length()))
    for flipped in (False, True)
]


def _draw(function):
    """The arguments of each device, (devices, …)."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith("lengths"):
            return jnp.asarray(rng.integers(0, T + 1, (DEVICES, *shape)), jnp.int32)
        if name == "resets":
            return jnp.asarray(rng.random((DEVICES, *shape)) < 0.3)
        return jnp.asarray(rng.normal(size=(DEVICES, *shape)))

    return {name: draw(name, shape) for name, shape in FUNCTIONS[function][1].items()}


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _with_gradient(run, arrays):
    """The value, and the gradient of what is floating, of a sum that weighs all results."""
    floats = {name: x for name, x in arrays.items() if _is_float(x)}

    def weighed(results):
        leaves = jax.tree.leaves(results)
        return sum(
            jnp.sum(jnp.sin(jnp.where(jnp.isinf(y), 0, y) + n)) for n, y in enumerate(leaves)
        )

    return jax.value_and_grad(lambda floats: weighed(run(**{**arrays, **floats})))(floats)


@cache
def _on_one(function):
    run, _ = FUNCTIONS[function]
    return jax.jit(lambda arrays: _with_gradient(run, arrays), compiler_options=QUICK)


@pytest.mark.parametrize("function, bit, flipped", PLACEMENTS)
def test_any_argument_may_be_the_same_on_all_devices(function, bit, flipped):
    """Those whose number has the bit, or has not: of any two, each while the other varies."""
    run, shapes = FUNCTIONS[function]
    whole = _draw(function)
    replicated = {name for n, name in enumerate(shapes) if bool(n >> bit & 1) != flipped}
    arrays = {name: x[0] if name in replicated else x for name, x in whole.items()}
    of_device = lambda x, n, name: x if name in replicated else x[n]

    def part(arrays):
        own = {name: of_device(x, 0, name) for name, x in arrays.items()}
        # of the sum over all devices
        value, gradient = _with_gradient(run, own)
        summed = jax.lax.psum(value, "devices")
        return summed, {n: d if n in replicated else d[None] for n, d in gradient.items()}

    specs = {name: P() if name in replicated else P("devices") for name in arrays}
    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    of_floats = {name: spec for name, spec in specs.items() if _is_float(arrays[name])}
    divided = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=(P(), of_floats))
    found = jax.jit(divided, compiler_options=QUICK)(arrays)

    each = [
        _on_one(function)({name: of_device(x, n, name) for name, x in arrays.items()})
        for n in range(DEVICES)
    ]
    value = sum(value for value, _ in each)
    gradient = {
        name: sum(d[name] for _, d in each)
        if name in replicated
        else jnp.stack([d[name] for _, d in each])
        for name in of_floats
    }
    assert_same(found, (value, gradient))


@pytest.mark.parametrize(
    "function", ["lstm", "attention, dense", "attention, blockwise", "rope_2d"]
)
def test_the_gradient_can_be_differentiated(function):
    """With what comes back to a part of the results alone."""
    run, _ = FUNCTIONS[function]
    arrays = {name: x[0] for name, x in _draw(function).items()}
    replicated = [name for name in arrays if name not in ("query", "x", "positions")]

    def product(arrays):
        floats = {name: x for name, x in arrays.items() if _is_float(x)}
        first = lambda floats: jnp.sin(jax.tree.leaves(run(**{**arrays, **floats}))[0]).sum()
        return jax.jvp(jax.grad(first), (floats,), (floats,))[1]

    specs = {name: P() if name in replicated else P("devices") for name in arrays}
    mesh = jax.make_mesh((1,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:1])
    of_floats = {name: spec for name, spec in specs.items() if _is_float(arrays[name])}
    divided = jax.shard_map(product, mesh=mesh, in_specs=(specs,), out_specs=of_floats)
    assert_same(*(jax.jit(f, compiler_options=QUICK)(arrays) for f in (divided, product)))


@pytest.mark.skipif(not native.status().available, reason=f"no kernels: {native.status().reason}")
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("function", ["lstm", "attention"])
def test_kernels_run_on_each_device(function, checked):
    """As on one: value, gradient, and its derivative."""
    run, _ = FUNCTIONS[function]
    arrays = {name: x[0] for name, x in _draw(function).items() if name != "peephole"}
    arrays = {name: jnp.float32(x) if _is_float(x) else x for name, x in arrays.items()}
    own = ("query", "key", "value", "x", "h", "c", "lengths", "resets", "key_value_seq_lengths")
    specs = {name: P("devices") if name in own else P() for name in arrays}
    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    divided = jax.shard_map(
        lambda arrays: run(**arrays),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P("devices"),
        check_vma=checked,
    )

    def of(run):
        def gradient(floats):
            return _with_gradient(run, {**arrays, **floats})

        return jax.jit(lambda floats: (gradient(floats), jax.jvp(gradient, (floats,), (floats,))))

    floats = {name: x for name, x in arrays.items() if _is_float(x)}
    found, expected = of(lambda **arrays: divided(arrays)), of(run)
    program = found.lower(floats).as_text()
    kernels = "rnnattn.lstm" if function == "lstm" else "rnnattn.attention"
    assert all(f"{kernels}_{half}" in program for half in ("forward", "backward"))
    assert_same(found(floats), expected(floats), 1e-5)
