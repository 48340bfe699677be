"""Weights from and to other libraries: the libraries themselves are the oracle, in float64."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnattn import LSTMParams, LSTMState, lstm
from rnnattn.interop import (
    lstm_from_flax,
    lstm_from_haiku,
    lstm_from_keras,
    lstm_from_onnx,
    lstm_from_torch,
    lstm_to_flax,
    lstm_to_haiku,
    lstm_to_keras,
    lstm_to_onnx,
    lstm_to_torch,
    read_safetensors,
    vit_from_google,
    vit_from_timm,
    vit_to_google,
    vit_to_timm,
    write_safetensors,
)
from tests.lstm_cases import assert_close, make_case

B, T, D, H, R = 2, 5, 3, 4, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D))
STATE = LSTMState(jnp.asarray(RNG.normal(size=(B, H))), jnp.asarray(RNG.normal(size=(B, H))))


def permissive():
    """Other libraries are not written for strict promotion."""
    return jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")


def run(params, state=STATE, reverse=False):
    return lstm(params, jnp.asarray(X), state, reverse=reverse)


def assert_same(actual, expected):
    """Every field bit for bit, in the same dtype."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == e.dtype
            np.testing.assert_array_equal(a, e)


# ---- the libraries themselves -----------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proj_size", [0, R])
def test_torch_with_two_layers_and_directions(proj_size, bias):
    torch = pytest.importorskip("torch")
    module = torch.nn.LSTM(
        D, H, 2, bias, True, bidirectional=True, proj_size=proj_size, dtype=torch.float64
    )
    with torch.no_grad():
        expected, (h, c) = module(torch.tensor(X))
    weights = module.state_dict()

    y = jnp.asarray(X)
    for layer in range(2):
        runs = [
            lstm(lstm_from_torch(weights, layer, reverse), y, reverse=reverse)
            for reverse in (False, True)
        ]
        y = jnp.concatenate([y for y, _ in runs], axis=-1)
        for k, (_, state) in enumerate(runs):
            assert_close(state, LSTMState(h[2 * layer + k].numpy(), c[2 * layer + k].numpy()))
    assert_close(y, expected.numpy())

    if bias:  # and torch accepts what is written
        exported: dict[str, np.ndarray] = {}
        for layer in range(2):
            for reverse in (False, True):
                params = lstm_from_torch(weights, layer, reverse)
                exported |= lstm_to_torch(params, layer, reverse)
        module.load_state_dict({key: torch.from_numpy(value) for key, value in exported.items()})
        with torch.no_grad():
            assert_close(module(torch.tensor(X))[0].numpy(), expected.numpy())


def test_torch_weights_are_copied():
    torch = pytest.importorskip("torch")
    module = torch.nn.LSTM(D, H)
    params = lstm_from_torch(module.state_dict())
    before = np.array(params.w_x)
    with torch.no_grad():
        module.weight_ih_l0.add_(1)
    np.testing.assert_array_equal(params.w_x, before)
    exported = lstm_to_torch(params)
    exported["weight_ih_l0"] += 1
    np.testing.assert_array_equal(params.w_x, before)


def test_haiku():
    haiku = pytest.importorskip("haiku")
    params = make_case(T, B, D, H).params

    def unroll(x, state):
        return haiku.dynamic_unroll(haiku.LSTM(H), x, state, time_major=False)

    apply = haiku.without_apply_rng(haiku.transform(unroll)).apply
    state = haiku.LSTMState(hidden=STATE.h, cell=STATE.c)
    dtype, rank = permissive()
    with dtype, rank:
        exported = {"lstm/linear": jax.tree.map(jnp.asarray, lstm_to_haiku(params))}
        expected, final = apply(exported, jnp.asarray(X), state)
    assert_close(run(params), (expected, LSTMState(final.hidden, final.cell)))
    assert_close(lstm_from_haiku(exported["lstm/linear"]), params, 1e-15)


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell"])
def test_flax_linen(cell):
    linen = pytest.importorskip("flax.linen")
    rnn = linen.RNN(getattr(linen, cell)(H, param_dtype=jnp.float64), return_carry=True)
    dtype, rank = permissive()
    with dtype, rank:
        variables = rnn.init(jax.random.key(0), jnp.asarray(X))
        params = lstm_from_flax(variables["params"]["cell"])
        params = params._replace(b=jnp.asarray(RNG.normal(size=4 * H)))
        exported = {"params": {"cell": lstm_to_flax(params)}}
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert shapes(exported) == shapes(variables)
        (c, h), expected = rnn.apply(exported, X, initial_carry=(STATE.c, STATE.h))
    assert_close(run(params), (expected, LSTMState(h, c)))
    assert_same(lstm_from_flax(exported["params"]["cell"]), params)


@pytest.mark.parametrize(
    "cell, form", [("LSTMCell", "nnx"), ("OptimizedLSTMCell", "nnx_optimized")]
)
def test_flax_nnx(cell, form):
    nnx = pytest.importorskip("flax.nnx")
    params = make_case(T, B, D, H).params
    dtype, rank = permissive()
    with dtype, rank:
        module = getattr(nnx, cell)(D, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        nnx.update(module, lstm_to_flax(params, form))
        rnn = nnx.RNN(module, return_carry=True, rngs=nnx.Rngs(0))
        (c, h), expected = rnn(jnp.asarray(X), initial_carry=(STATE.c, STATE.h))
        state = nnx.state(module)
    assert_close(run(params), (expected, LSTMState(h, c)))
    assert_same(lstm_from_flax(state), params)


@pytest.mark.parametrize("peephole", [False, True])
def test_onnx_in_both_directions(peephole):
    pytest.importorskip("onnx")
    from onnx.helper import make_node
    from onnx.reference import ReferenceEvaluator

    cases = [make_case(T, B, D, H, peephole=peephole, seed=seed) for seed in (0, 1)]
    written = [lstm_to_onnx(case.params) for case in cases]
    weights = {key: np.concatenate([w[key] for w in written]) for key in written[0]}
    half = weights["B"][:, : 4 * H] / 4  # two biases that add up to the same one
    weights["B"] = np.concatenate([weights["B"][:, : 4 * H] - half, half], axis=1)
    inputs = weights | {
        "X": X.swapaxes(0, 1),
        "h": np.stack([case.state.h for case in cases]),
        "c": np.stack([case.state.c for case in cases]),
    }
    names = ["X", "W", "R", "B", "", "h", "c"] + ["P"] * peephole
    node = make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H, direction="bidirectional")
    y, h, c = ReferenceEvaluator(node).run(None, inputs)
    for k, case in enumerate(cases):
        params = lstm_from_onnx(weights, k)
        assert_close(params, case.params, 1e-15)
        expected = (y[:, k].swapaxes(0, 1), LSTMState(h[k], c[k]))
        assert_close(run(params, case.state, reverse=k == 1), expected)


def test_keras_formula():
    """`keras.layers.LSTMCell.call`, written out."""
    weights = {
        "kernel": RNG.normal(size=(D, 4 * H)),
        "recurrent_kernel": RNG.normal(size=(H, 4 * H)),
        "bias": RNG.normal(size=4 * H),
    }
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    h, c, expected = np.asarray(STATE.h), np.asarray(STATE.c), []
    for x in X.swapaxes(0, 1):
        z = x @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"]
        z0, z1, z2, z3 = np.split(z, 4, axis=1)
        i, f = sigmoid(z0), sigmoid(z1)
        c = f * c + i * np.tanh(z2)
        h = sigmoid(z3) * np.tanh(c)
        expected.append(h)
    params = lstm_from_keras(weights)
    assert_close(run(params), (np.stack(expected, 1), LSTMState(jnp.asarray(h), jnp.asarray(c))))
    for key, value in lstm_to_keras(params).items():
        np.testing.assert_array_equal(value, weights[key])


# ---- round trips ------------------------------------------------------------------------------

PLAIN = make_case(1, 1, D, H).params
ROUND_TRIPS: dict[str, Any] = {
    "torch": (lstm_to_torch, lstm_from_torch),
    "torch_reverse": (
        lambda params: lstm_to_torch(params, 3, reverse=True),
        lambda weights: lstm_from_torch(weights, 3, reverse=True),
    ),
    "keras": (lstm_to_keras, lstm_from_keras),
    "linen": (lstm_to_flax, lstm_from_flax),
    "nnx": (lambda params: lstm_to_flax(params, "nnx"), lstm_from_flax),
    "nnx_optimized": (lambda params: lstm_to_flax(params, "nnx_optimized"), lstm_from_flax),
    "onnx": (lstm_to_onnx, lstm_from_onnx),
}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_is_exact(name, dtype):
    export, load = ROUND_TRIPS[name]
    params = jax.tree.map(lambda a: a.astype(dtype), PLAIN)
    assert_same(load(export(params)), params)


def test_round_trip_of_variants_is_exact():
    projected = make_case(1, 1, D, H, R).params
    assert_same(lstm_from_torch(lstm_to_torch(projected)), projected)
    peephole = make_case(1, 1, D, H, peephole=True).params
    assert_same(lstm_from_onnx(lstm_to_onnx(peephole)), peephole)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_haiku_round_trip_rounds_only_the_forget_bias(dtype):
    params = jax.tree.map(lambda a: (8 * a).astype(dtype), PLAIN)
    actual = lstm_from_haiku(lstm_to_haiku(params))
    forget = slice(H, 2 * H)
    drop = lambda p: p._replace(b=p.b.at[forget].set(0))
    assert_same(drop(actual), drop(params))
    a, b = (np.asarray(p.b[forget], np.float64) for p in (actual, params))
    assert (np.abs(a - b) <= float(jnp.finfo(dtype).eps) * (1 + np.abs(b))).all()
    exact = params._replace(b=params.b.at[forget].set(jnp.linspace(0.5, 2, H).astype(dtype)))
    assert_same(lstm_from_haiku(lstm_to_haiku(exact)), exact)


def test_an_absent_bias_is_zero():
    weights = lstm_to_onnx(PLAIN)
    del weights["B"]
    expected = PLAIN._replace(b=jnp.zeros(4 * H))
    assert_same(lstm_from_onnx(weights), expected)
    weights = lstm_to_keras(PLAIN)
    del weights["bias"]
    assert_same(lstm_from_keras(weights), expected)
    weights = lstm_to_torch(PLAIN)
    del weights["bias_ih_l0"], weights["bias_hh_l0"]
    assert_same(lstm_from_torch(weights), expected)


# ---- errors -----------------------------------------------------------------------------------

LINEN, OPTIMIZED = lstm_to_flax(PLAIN), lstm_to_flax(PLAIN, "nnx_optimized")
G = 4 * H


def changed(weights, key, value=None):
    """`weights` with another value at `key`, "a.b" for a nested one; None removes it."""
    head, _, tail = key.partition(".")
    rest = {name: old for name, old in weights.items() if name != head}
    if tail:
        return rest | {head: changed(weights[head], tail, value)}
    return rest if value is None else rest | {head: value}


ERRORS: dict[str, Any] = {
    "torch_missing": (lstm_from_torch, lstm_to_torch(PLAIN), "weight_hh_l0", None, "is missing"),
    "torch_one_bias": (lstm_from_torch, lstm_to_torch(PLAIN), "bias_hh_l0", None, "is missing"),
    "torch_shape": (
        *(lstm_from_torch, lstm_to_torch(PLAIN), "weight_ih_l0", np.ones((D, G))),
        r"must be of shape \(4H, D\) = \(16, 16\), got \(3, 16\)",
    ),
    "torch_gates": (
        *(lstm_from_torch, lstm_to_torch(PLAIN), "weight_hh_l0", np.ones((3 * H, H))),
        r"must be of shape \(4H, H\) = \(12, 3\), got \(12, 4\)",
    ),
    "torch_projection": (
        *(lstm_from_torch, lstm_to_torch(PLAIN), "weight_hr_l0", np.ones((R, H))),
        r"must be of shape \(R, H\) = \(4, 4\), got \(2, 4\)",
    ),
    "torch_unknown": (
        *(lstm_from_torch, lstm_to_torch(PLAIN), "weight_xx_l0", np.ones(1)),
        "is unknown, expected",
    ),
    "keras_missing": (lstm_from_keras, lstm_to_keras(PLAIN), "kernel", None, "is missing"),
    "keras_unknown": (
        *(lstm_from_keras, lstm_to_keras(PLAIN), "gamma", np.ones(1)),
        r"is unknown, expected \['recurrent_kernel', 'kernel', 'bias'\]",
    ),
    "keras_axes": (
        *(lstm_from_keras, lstm_to_keras(PLAIN), "recurrent_kernel", np.ones(G)),
        r"must be of shape \(H, 4H\), got \(16,\)",
    ),
    "keras_dtype": (
        *(lstm_from_keras, lstm_to_keras(PLAIN), "bias", np.ones(G, np.float32)),
        "must be of the dtype of `recurrent_kernel`, float64, got float32",
    ),
    "keras_integers": (
        *(lstm_from_keras, lstm_to_keras(PLAIN), "kernel", np.ones((D, G), int)),
        "must be of a floating dtype, got int64",
    ),
    "linen_missing": (lstm_from_flax, LINEN, "hg.bias", None, "is missing"),
    "linen_unknown": (lstm_from_flax, LINEN, "ii.bias", np.ones(H), "is unknown"),
    "linen_shape": (
        *(lstm_from_flax, LINEN, "if.kernel", np.ones((2, H))),
        r"must be of shape \(D, H\) = \(3, 4\), got \(2, 4\)",
    ),
    "nnx_missing": (lstm_from_flax, lstm_to_flax(PLAIN, "nnx"), "ho.kernel", None, "is missing"),
    "optimized_missing": (lstm_from_flax, OPTIMIZED, "dense_h.bias", None, "is missing"),
    "optimized_shape": (
        *(lstm_from_flax, OPTIMIZED, "dense_i.kernel", np.ones((D, H))),
        r"must be of shape \(D, 4H\) = \(3, 16\), got \(3, 4\)",
    ),
    "haiku_missing": (lstm_from_haiku, lstm_to_haiku(PLAIN), "b", None, "is missing"),
    "haiku_rows": (
        *(lstm_from_haiku, lstm_to_haiku(PLAIN), "w", np.ones((H, G))),
        r"must be of D \+ H rows, H = 4, got 4",
    ),
    "haiku_unknown": (lstm_from_haiku, lstm_to_haiku(PLAIN), "w2", np.ones(1), "is unknown"),
    "onnx_missing": (lstm_from_onnx, lstm_to_onnx(PLAIN), "R", None, "is missing"),
    "onnx_no_directions": (
        *(lstm_from_onnx, lstm_to_onnx(PLAIN), "W", np.ones((G, D))),
        r"must be of shape \(directions, 4H, D\), got \(16, 3\)",
    ),
    "onnx_bias": (
        *(lstm_from_onnx, lstm_to_onnx(PLAIN), "B", np.ones((1, G))),
        r"must be of shape \(directions, 8H\) = \(1, 32\), got \(1, 16\)",
    ),
    "onnx_unknown": (lstm_from_onnx, lstm_to_onnx(PLAIN), "X", np.ones(1), "is unknown"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_wrong_key_is_named(name):
    load, weights, key, value, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{load.__name__}: `{key}` {message}"):
        load(changed(weights, key, value))


def test_other_layers_of_torch_are_not_looked_at():
    weights = lstm_to_torch(PLAIN) | {"weight_ih_l1": np.ones(1), "weight_xx_l0_reverse": None}
    assert_same(lstm_from_torch(weights), PLAIN)


def test_what_is_no_array_is_named():
    torch = pytest.importorskip("torch")
    weights = dict(torch.nn.LSTM(D, H).named_parameters())
    with pytest.raises(ValueError, match=r"`weight_hh_l0` must be an array, got Parameter: .*grad"):
        lstm_from_torch(weights)


def test_there_is_no_such_direction():
    for direction in (1, -1):
        with pytest.raises(ValueError, match=f"`direction` must be from 0 to 0, got {direction}"):
            lstm_from_onnx(lstm_to_onnx(PLAIN), direction)


@pytest.mark.parametrize(
    "export, projected, peephole",
    [
        (lstm_to_torch, True, False),
        (lstm_to_keras, False, False),
        (lstm_to_flax, False, False),
        (lstm_to_haiku, False, False),
        (lstm_to_onnx, False, True),
    ],
)
def test_a_variant_the_format_does_not_have_is_an_error(export, projected, peephole):
    if not projected:
        with pytest.raises(ValueError, match=r"`params.projection` must be None"):
            export(make_case(1, 1, D, H, R).params)
    if not peephole:
        with pytest.raises(ValueError, match=r"`params.peephole` must be None"):
            export(make_case(1, 1, D, H, peephole=True).params)


def test_params_are_checked_before_they_are_written():
    with pytest.raises(ValueError, match=r"`params.w_h` must be of shape \(H, 4H\) = \(4, 16\)"):
        lstm_to_torch(PLAIN._replace(w_h=jnp.ones((3, G))))
    with pytest.raises(ValueError, match=r"`params.peephole` must be of shape \(3, H\) = \(3, 4\)"):
        lstm_to_onnx(PLAIN._replace(peephole=jnp.ones((6, H))))


@pytest.mark.usefixtures("only_own_checks")
def test_an_unknown_form_is_an_error():
    message = "`form` must be 'linen', 'nnx' or 'nnx_optimized', got 'optimized'"
    with pytest.raises(ValueError, match=f"^lstm_to_flax: {message}$"):
        lstm_to_flax(PLAIN, form="optimized")  # type: ignore[arg-type]


# ---- vision transformers ----------------------------------------------------------------------

WIDTH, HEADS, HIDDEN, CLASSES, PATCH, CHANNELS = 8, 2, 12, 3, (2, 3), 2
GRID = (3, 2)


def timm_weights(class_token=True):
    """What `state_dict()` of a timm ViT of two blocks holds."""
    draw = lambda *shape: RNG.normal(size=shape) * 0.5
    tokens = GRID[0] * GRID[1] + class_token
    weights = {"cls_token": draw(1, 1, WIDTH)} if class_token else {}
    weights |= {
        "pos_embed": draw(1, tokens, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, CHANNELS, *PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
    }
    for n in range(2):
        linear = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (HIDDEN, WIDTH),
            "mlp.fc2": (WIDTH, HIDDEN),
        }
        for name, shape in linear.items():
            weights[f"blocks.{n}.{name}.weight"] = draw(*shape)
            weights[f"blocks.{n}.{name}.bias"] = draw(shape[0])
        for name in ("norm1", "norm2"):
            weights[f"blocks.{n}.{name}.weight"] = draw(WIDTH)
            weights[f"blocks.{n}.{name}.bias"] = draw(WIDTH)
    weights |= {"norm.weight": draw(WIDTH), "norm.bias": draw(WIDTH)}
    return weights | {"head.weight": draw(CLASSES, WIDTH), "head.bias": draw(CLASSES)}


def timm_forward(weights, images):
    """timm's `VisionTransformer.forward` in torch's own functions; images (B, channels, …)."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    w = {name: torch.tensor(array) for name, array in weights.items()}
    norm = lambda x, name: F.layer_norm(
        x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6
    )
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    patches = F.conv2d(
        torch.tensor(images),
        w["patch_embed.proj.weight"],
        w["patch_embed.proj.bias"],
        stride=PATCH,
    )
    x = patches.flatten(2).transpose(1, 2)
    if "cls_token" in w:
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + w["pos_embed"]
    for n in range(2):
        y = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = y.reshape(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), f"blocks.{n}.attn.proj")
        y = F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + linear(y, f"blocks.{n}.mlp.fc2")
    x = norm(x, "norm")
    return linear(x[:, 0] if "cls_token" in w else x.mean(dim=1), "head").numpy()


def vit(pool):
    nnx = pytest.importorskip("flax.nnx")
    from rnnattn.nn import ViT

    return ViT(
        patch_size=PATCH,
        image_size=(6, 6),
        width=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        classes=CLASSES,
        channels=CHANNELS,
        pool=pool,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm(pool):
    from rnnattn.nn import load_weights

    weights, model = timm_weights(pool == "cls"), vit(pool)
    load_weights(model, vit_from_timm(weights, HEADS))
    images = RNG.normal(size=(2, 6, 6, CHANNELS))
    logits = jax.jit(lambda model, images: model(images))(model, jnp.asarray(images))
    assert_close(logits, timm_forward(weights, images.transpose(0, 3, 1, 2)), 1e-10)


FORMS: tuple[Literal["vision_transformer", "big_vision"], ...]
FORMS = ("vision_transformer", "big_vision")


@pytest.mark.parametrize("class_token", [True, False])
def test_vit_round_trips_are_exact(class_token):
    weights = timm_weights(class_token)
    tree = vit_from_timm(weights, HEADS)
    again = vit_to_timm(tree)
    assert set(again) == set(weights)
    for name in weights:
        np.testing.assert_array_equal(again[name], weights[name])
    of_form = {"vision_transformer": tree, "big_vision": tree}
    if class_token:  # big_vision has no position for it
        own, grid = tree["position"][:1], tree["position"][1:]
        moved = {"cls": tree["cls"] + own, "position": jnp.pad(grid, ((1, 0), (0, 0)))}
        of_form["big_vision"] = tree | moved
    for form in FORMS:
        for prefix in ("", "params/", "opt/target/"):
            google = {prefix + name: a for name, a in vit_to_google(tree, form).items()}
            beside = {"opt/step": np.ones(())} if prefix == "params/" else {}
            back = vit_from_google(google | beside)
            jax.tree.map(np.testing.assert_array_equal, back, of_form[form])


# As `np.load` of AugReg's Ti_16 lists them: name, and shape with D 192, 3 heads, 197 tokens.
AUGREG = {
    "cls": (1, 1, 192),
    "embedding/bias": (192,),
    "embedding/kernel": (16, 16, 3, 192),
    "head/bias": (1000,),
    "head/kernel": (192, 1000),
    "Transformer/encoder_norm/bias": (192,),
    "Transformer/encoder_norm/scale": (192,),
    "Transformer/posembed_input/pos_embedding": (1, 197, 192),
    "Transformer/encoderblock_0/LayerNorm_0/bias": (192,),
    "Transformer/encoderblock_0/LayerNorm_0/scale": (192,),
    "Transformer/encoderblock_0/LayerNorm_2/bias": (192,),
    "Transformer/encoderblock_0/LayerNorm_2/scale": (192,),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias": (768,),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (192, 768),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias": (192,),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel": (768, 192),
    **{
        f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{name}/{leaf}": shape
        for name in ("query", "key", "value")
        for leaf, shape in {"bias": (3, 64), "kernel": (192, 3, 64)}.items()
    },
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/bias": (192,),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": (3, 64, 192),
}


def test_google_names_and_shapes():
    weights = {name: np.zeros(shape, np.float32) for name, shape in AUGREG.items()}
    tree = vit_from_google(weights)
    assert tree["blocks"][0]["attention"]["out"]["kernel"].shape == (3, 64, 192)
    assert {name: array.shape for name, array in vit_to_google(tree).items()} == AUGREG
    timm = vit_to_timm(tree)
    assert timm["blocks.0.attn.qkv.weight"].shape == (576, 192)
    assert timm["patch_embed.proj.weight"].shape == (192, 3, 16, 16)
    big_vision = vit_to_google(tree, "big_vision")
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    assert {"pos_embedding", f"{block}/LayerNorm_1/scale", f"{attention}/query/kernel"} < set(
        big_vision
    )
    assert f"{block}/MlpBlock_0/Dense_1/bias" in big_vision


def test_positions_of_big_vision_with_and_without_the_class_token():
    big_vision = {}
    for name, shape in AUGREG.items():
        name = name.replace("Transformer/posembed_input/", "").replace("LayerNorm_2", "LayerNorm_1")
        name = name.replace("MlpBlock_3", "MlpBlock_0").replace("Attention_1", "Attention_0")
        big_vision[name] = np.ones(shape, np.float32)
    with_it = vit_from_google(big_vision)["position"]
    big_vision["pos_embedding"] = big_vision["pos_embedding"][:, 1:]
    without = vit_from_google(big_vision)["position"]
    assert without.shape == with_it.shape == (197, 192)
    assert (without[0] == 0).all() and (with_it == 1).all() and (without[1:] == 1).all()


def test_a_layer_that_the_vit_does_not_have_is_named_with_the_way_round_it():
    weights = {name: np.zeros(shape, np.float32) for name, shape in AUGREG.items()}
    more = {"pre_logits/kernel": np.zeros((192, 192)), "pre_logits/bias": np.zeros(192)}
    with pytest.raises(
        ValueError, match=r"`pre_logits` is a layer .* leave its arrays out and give"
    ):
        vit_from_google(weights | more)
    fresh = {"head/kernel": np.zeros((192, 7), np.float32), "head/bias": np.zeros(7, np.float32)}
    assert vit_from_google(weights | fresh)["head"]["kernel"].shape == (192, 7)


def test_all_that_is_wrong_with_a_vit_is_named():
    weights = timm_weights()
    wrong = weights | {
        "head.weight": np.ones((WIDTH, CLASSES)),
        "fc_norm.weight": np.ones(WIDTH),
        "blocks.1.attn.qkv.bias": np.ones(WIDTH),
    }
    del wrong["norm.bias"]
    with pytest.raises(ValueError) as caught:
        vit_from_timm(wrong, HEADS)
    assert str(caught.value) == (
        "vit_from_timm: `norm.bias` is missing; `fc_norm.weight` is unknown; "
        "`blocks.1.attn.qkv.bias` must be of shape (3D,) = (24,), got (8,); "
        "`head.weight` must be of shape (classes, D) = (8, 8), got (8, 3); "
        "`head.bias` must be of shape (classes,) = (8,), got (3,)"
    )
    with pytest.raises(
        ValueError, match=r"^vit_from_timm: `num_heads` must be a divisor of the width 8"
    ):
        vit_from_timm(weights, 3)
    first = "`Transformer/encoder_norm/scale` is missing"
    with pytest.raises(ValueError, match=f"^vit_from_google: {first}.*; and . more$"):
        vit_from_google({})
    tree = vit_from_timm(weights, HEADS)
    tree["stem"] = {"layers": tree["stem"]}
    message = "`stem.kernel` is missing; `stem.bias` is missing; `stem.layers.kernel` is unknown"
    with pytest.raises(ValueError, match=f"^vit_to_timm: {message}"):
        vit_to_timm(tree)


# ---- arrays, however they lie in memory -------------------------------------------------------


def strided(array):
    """Every second element of a larger one."""
    return np.stack([array, np.zeros_like(array)], axis=-1)[..., 0]


def backwards(array):
    return np.flip(np.flip(array).copy())


def from_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array.T.copy()).numpy().T


# Each makes an array that is not in one piece, or not in the machine's order of bytes.
LAYOUTS: dict[str, Any] = {
    "fortran": np.asfortranarray,
    "transposed": lambda array: array.T.copy().T,
    "strided": strided,
    "backwards": backwards,
    "repeated": lambda array: np.broadcast_to(array[..., :1] if array.ndim else array, array.shape),
    "big_endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "read_only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "torch": from_torch,
}


def plain(array):
    """The same values in one piece."""
    return np.array(array, array.dtype.newbyteorder("="), order="C")


FROM: dict[str, Any] = {
    "torch": (lstm_from_torch, lstm_to_torch(PLAIN)),
    "torch_projection": (lstm_from_torch, lstm_to_torch(make_case(1, 1, D, H, R).params)),
    "keras": (lstm_from_keras, lstm_to_keras(PLAIN)),
    "linen": (lstm_from_flax, LINEN),
    "nnx_optimized": (lstm_from_flax, OPTIMIZED),
    "haiku": (lstm_from_haiku, lstm_to_haiku(PLAIN)),
    "onnx": (lstm_from_onnx, lstm_to_onnx(make_case(1, 1, D, H, peephole=True).params)),
    "timm": (lambda weights: vit_from_timm(weights, HEADS), timm_weights()),
    "google": (
        vit_from_google,
        vit_to_google(vit_from_timm(timm_weights(), HEADS)),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FROM)
def test_weights_are_read_from_any_memory(name, layout):
    load, weights = FROM[name]
    given = jax.tree.map(LAYOUTS[layout], weights)
    actual, expected = load(given), load(jax.tree.map(plain, given))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


TO: dict[str, Any] = {
    "torch": (lstm_to_torch, make_case(1, 1, D, H, R).params),
    "keras": (lstm_to_keras, PLAIN),
    "linen": (lstm_to_flax, PLAIN),
    "nnx_optimized": (lambda params: lstm_to_flax(params, "nnx_optimized"), PLAIN),
    "haiku": (lstm_to_haiku, PLAIN),
    "onnx": (lstm_to_onnx, make_case(1, 1, D, H, peephole=True).params),
    "timm": (vit_to_timm, vit_from_timm(timm_weights(), HEADS)),
    "google": (vit_to_google, vit_from_timm(timm_weights(), HEADS)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TO)
def test_weights_are_written_from_any_memory_into_one_piece(name, layout):
    export, params = TO[name]
    given = jax.tree.map(LAYOUTS[layout], jax.tree.map(np.asarray, params))
    actual = export(given)
    jax.tree.map(np.testing.assert_array_equal, actual, export(jax.tree.map(plain, given)))
    for array in jax.tree.leaves(actual):
        assert array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative
        assert not any(np.shares_memory(array, other) for other in jax.tree.leaves(given))


def test_a_torch_cell_has_names_without_a_layer():
    torch = pytest.importorskip("torch")
    cell = torch.nn.LSTMCell(D, H, dtype=torch.float64)
    params = lstm_from_torch(cell.state_dict())
    x, h, c = (torch.tensor(np.asarray(a)) for a in (X[:, 0], STATE.h, STATE.c))
    with torch.no_grad():
        h, c = cell(x, (h, c))
    state = lstm(params, jnp.asarray(X[:, :1]), STATE)[1]
    assert_close(state, LSTMState(h.numpy(), c.numpy()))


@pytest.mark.parametrize("names", [{"rnn.": 1}, {"module.": 1}, {"": None}])
def test_the_names_that_came_are_told(names):
    ((prefix, layer),) = names.items()
    weights = lstm_to_torch(PLAIN, layer=layer or 0)
    weights = {prefix + key: value for key, value in weights.items()}
    message = rf"`weight_hh_l2` is missing, got \['{prefix}weight_ih_l{layer or 0}', "
    with pytest.raises(ValueError, match=message):
        lstm_from_torch(weights, layer=2)


def test_weights_that_lie_further_down_are_pointed_at():
    for read, weights in (
        (lstm_from_torch, {f"rnn.{key}": w for key, w in lstm_to_torch(PLAIN).items()}),
        (lstm_from_flax, {"rnn": lstm_to_flax(PLAIN)}),
        (lstm_from_flax, {"rnn": OPTIMIZED}),
    ):
        with pytest.raises(ValueError, match=r"is missing.*; give what is below `rnn`, alone$"):
            read(weights)


def test_long_lists_of_names_are_cut():
    weights = {f"encoder.{n}.weight": np.ones(1) for n in range(1000)}
    with pytest.raises(ValueError, match=r"is missing, got \['encoder.0.weight'.* and 980 more$"):
        lstm_from_torch(weights)


def test_absurd_numbers_of_blocks_are_refused_at_once():
    weights = timm_weights() | {"blocks.99999999999999999999.norm1.weight": np.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"^vit_from_timm: .* is unknown$"):
        vit_from_timm(weights, HEADS)


def test_a_dtype_that_jax_does_not_have_is_an_error():
    weights = {key: a.astype(np.longdouble) for key, a in lstm_to_torch(PLAIN).items()}
    with pytest.raises(
        ValueError, match="`weight_hh_l0` must be of a floating dtype, got float128"
    ):
        lstm_from_torch(weights)


# ---- files ------------------------------------------------------------------------------------

SHAPES = [(), (1,), (0, 3), (3, 4), (2, 1, 3)]
DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64"
DTYPES += " complex64 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
OTHER = "complex128 int2 int4 uint2 uint4 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3fnuz"
OTHER += " float8_e4m3b11fnuz float8_e5m2fnuz"


def any_bits(shape, dtype):
    """An array of any bits that the dtype can have: NaN, infinity and subnormal numbers too."""
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return RNG.integers(0, 2, shape).astype(bool)
    return np.frombuffer(RNG.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.asarray(actual).tobytes() == expected.tobytes()


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors")
    return tmp_path / "file.safetensors"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "torch"])
@pytest.mark.parametrize("dtype", DTYPES.split())
def test_what_is_written_is_read_bit_for_bit(dtype, layout, path):
    arrays = [LAYOUTS[layout](any_bits(shape, dtype)) for shape in SHAPES]
    tree = {"numpy": arrays, "jax": [jnp.asarray(plain(array)) for array in arrays]}
    write_safetensors(path, tree)
    for like in (tree, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, plain(a).dtype), tree)):
        again = read_safetensors(path, like)
        assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(again))
        for kind in ("numpy", "jax"):
            for actual, expected in zip(again[kind], arrays, strict=True):
                assert_same_bits(actual, plain(expected))


def test_weights_of_torch_in_a_file(path):
    torch = pytest.importorskip("torch")
    weights = torch.nn.LSTM(D, H, dtype=torch.float64).state_dict()
    w_x, w_h = (weights[f"weight_{name}_l0"].numpy().T for name in ("ih", "hh"))
    params = LSTMParams(w_x, w_h, weights["bias_ih_l0"].numpy())
    write_safetensors(path, params)
    assert_same(read_safetensors(path, params), params)


@pytest.mark.parametrize("dtype", [name for name in OTHER.split() if hasattr(jnp, name)])
def test_a_dtype_that_the_format_does_not_have_is_named(dtype, path):
    write_safetensors(path, {"a": jnp.ones(3)})
    before = path.read_bytes()
    tree = {"a": jnp.zeros(3), "b": [jnp.zeros(2, dtype)]}
    with pytest.raises(ValueError, match=rf"`b.0` must be of a dtype that .*, got {dtype}$"):
        write_safetensors(path, tree)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "leaf",
    [3.0, "text", np.array(["text"]), np.array([object()]), jax.random.key(0)],
    ids=["number", "text", "array of text", "array of objects", "key"],
)
def test_what_is_no_array_is_not_written(leaf, path):
    with pytest.raises(ValueError, match=r"^write_safetensors: `a.b` must "):
        write_safetensors(path, {"a": {"b": leaf}})
    assert not path.exists()


def test_sharded_arrays_in_a_file(path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("x"))
    for dtype in (jnp.float32, jnp.bfloat16):
        array = any_bits((16, 3), dtype)
        write_safetensors(path, {"w": jax.device_put(array, spread)})
        assert_same_bits(read_safetensors(path, {"w": array})["w"], array)


@pytest.mark.parametrize(
    "tree, first, second",
    [
        ({"a": {"b": 0}, "a.b": 0}, "['a']['b']", "['a.b']"),
        ([{"0": 0}, {"x.0": 0, "x": [0]}], "[1]['x'][0]", "[1]['x.0']"),
        ({"a": {"": {"b": 0}}, "a.": {"b": 0}}, "['a']['']['b']", "['a.']['b']"),
    ],
)
def test_two_leaves_of_one_name_are_named(tree, first, second, path):
    tree = jax.tree.map(lambda _: jnp.ones(2), tree)
    with pytest.raises(ValueError) as caught:
        write_safetensors(path, tree)
    assert f"{first} and {second} have one name" in str(caught.value)
    assert not path.exists()
    with pytest.raises(ValueError, match=r"^read_safetensors: .* have one name"):
        write_safetensors(path, {})
        read_safetensors(path, tree)


@pytest.mark.parametrize("name", ["__metadata__", "\udc80"])
def test_names_that_the_format_does_not_have(name, path):
    with pytest.raises(ValueError, match=r"^write_safetensors: the (format keeps the )?name "):
        write_safetensors(path, {name: jnp.ones(2)})
    assert not path.exists()


@pytest.mark.parametrize("name", ["", ".", 'a\nb"\0', "σ", "__metadata__.", "x" * 10_000])
def test_any_other_name_is_kept(name, path):
    tree: Any = {name: jnp.arange(3.0), "b": None, "c": [], "d": ()}
    write_safetensors(path, tree)
    again = read_safetensors(path, tree)
    assert again.keys() == tree.keys()
    np.testing.assert_array_equal(again[name], tree[name])


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_64_bits_are_not_cut(dtype, path):
    array = np.arange(3, dtype=dtype)
    write_safetensors(path, {"w": array, "b": np.ones(2, np.float32)})
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=f"`w`: {dtype} needs jax_enable_x64$"):
            read_safetensors(path, {"w": array, "b": np.ones(2, np.float32)})
        narrow = jnp.asarray(array)  # of 32 bits
        with pytest.raises(ValueError, match=rf"`w` must be {narrow.dtype}\[3\], got {dtype}"):
            read_safetensors(path, {"w": narrow, "b": jnp.ones(2)})


def test_all_that_is_wrong_with_a_file_is_named(path):
    write_safetensors(path, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)})
    like = {"a": jnp.ones(3), "b": np.ones(2, ">f4"), "d": jnp.ones(2)}
    with pytest.raises(ValueError) as caught:
        read_safetensors(path, like)
    assert str(caught.value) == (
        f"read_safetensors: {path}: `a` must be float64[3], got float64[2]; "
        "`b` must be float32[2], got float64[2]; `c` is unknown; `d` is missing"
    )


def file_of(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DAMAGED: dict[str, Any] = {
    "overlap": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "gap": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "huge_offset": file_of({"a": entry(2**63, 2**63 + 8)}, bytes(8)),
    "huge_shape": file_of({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)),
    "huge_empty_shape": file_of({"a": entry(0, 0, [0, 2**62, 8])}, b""),
    "negative_shape": file_of({"a": entry(0, 8, [-2])}, bytes(8)),
    "another_size": file_of({"a": entry(0, 8, [3])}, bytes(8)),
    "dtype": file_of({"a": entry(0, 8, dtype="F99")}, bytes(8)),
    "half_bytes": file_of({"a": entry(0, 1, dtype="F4")}, bytes(1)),
    "behind": file_of({"a": entry(0, 8)}, bytes(9)),
    "header_of_no_size": bytes(8),
    "header_beyond_the_end": (2**40).to_bytes(8, "little") + b"{}",
    "header_of_all_memory": b"\xff" * 8 + b"{}",
    "deep": file_of(b"[" * 100_000, b""),
    "no_text": file_of(b"\xff\xfe", b""),
    "a_list": file_of([1], b""),
    "pickle": b"\x80\x04N.",
    "npz": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, path):
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError) as caught:
        read_safetensors(path, {"a": jnp.ones(2, jnp.float32)})
    assert str(caught.value).startswith(f"read_safetensors: {path}: ")
    assert "no such file" not in str(caught.value)


def test_a_file_that_was_cut_or_changed_is_refused_or_read_whole(path):
    tree = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 1), np.int16)}
    write_safetensors(path, tree)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    cut = [content[:length] for length in range(len(content))]
    flipped = [
        content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        for place in range(size)
        for bit in range(8)
    ]
    for damaged in cut + flipped:
        path.write_bytes(damaged)
        try:
            again = read_safetensors(path, tree)
        except ValueError as error:
            assert str(error).startswith(f"read_safetensors: {path}: ")
        else:  # such as a space of the header become another
            assert damaged in flipped
            assert again.keys() == tree.keys()


def test_a_file_that_cannot_be_finished_leaves_the_one_before(path, monkeypatch):
    write_safetensors(path, {"a": jnp.ones(3)})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_safetensors(path, {"a": jnp.zeros(3)})
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_process_that_is_killed_leaves_the_file_before(path):
    write_safetensors(path, {"a": jnp.ones(3)})
    before = path.read_bytes()
    code = """
import os, signal, sys, numpy as np
from rnnattn.interop import write_safetensors
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_safetensors(sys.argv[1], {"a": np.zeros(3)})
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (write_safetensors, read_safetensors):
        with pytest.raises(ModuleNotFoundError, match=f"{call.__name__} needs safetensors: `pip"):
            call(tmp_path / "file", {"a": jnp.ones(2)})
