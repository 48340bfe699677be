"""Every check of an argument is there for something that is really refused.

The wrong calls of the other test files, and some more, are made. Each ends in a `ValueError` that
begins with the name of a function, and together they fail every check that the library has.
"""

import ast
import re
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import rnnattn
from rnnattn import dot_product_attention, init_lstm, interop, lstm, reference
from rnnattn.parallel import ring_attention
from tests import (
    test_attention,
    test_linear,
    test_masks,
    test_meshes,
    test_noise,
    test_packed,
    test_pages,
    test_parallel,
    test_patches,
    test_position,
    test_recurrent,
    test_ulysses,
)
from tests.test_interop import timm_weights

LIBRARY = Path(rnnattn.__file__).parent
TABLES = [
    test_attention,
    test_linear,
    test_masks,
    test_meshes,
    test_noise,
    test_packed,
    test_pages,
    test_parallel,
    test_ulysses,
    test_patches,
    test_position,
    test_recurrent,
]
PARAMS = init_lstm(jax.random.key(0), 2, 3, peephole=True)


def sites():
    """Where an argument is checked: (file, first line, last line)."""
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name == "checks.py" or not isinstance(node, ast.Raise | ast.Call):
                continue
            if _refuses(node):
                yield str(path.relative_to(LIBRARY)), node.lineno, node.end_lineno


def _refuses(node):
    """`check(…)`, `self.check.shape(…)`, `Check("lstm")(…)`, `raise ValueError(…)` and the like."""
    match node:
        case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"))):
            return True
        case ast.Call(func=ast.Attribute(value=subject, attr=name)) if name != "check":
            return _is_check(subject)
        case ast.Call(func=function):
            return _is_check(function)
    return False


def _is_check(node):
    match node:
        case ast.Name(id="check" | "of_kind") | ast.Attribute(attr="check"):
            return True
        case ast.Call(func=ast.Name(id="Check")):
            return True
    return False


def within_shard_map(T=2, **options):
    mesh = jax.make_mesh((2,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
    x, at = jnp.ones((1, T, 1, 2)), jax.sharding.PartitionSpec(None, "ring")
    attend: Any = partial(ring_attention, axis_name="ring", **options)
    jax.shard_map(lambda x: attend(x, x, x), mesh=mesh, in_specs=at, out_specs=at)(x)


def wrong_calls():
    """What the tables of the other files do not have."""
    x = jnp.ones((1, 2, 1, 2), jnp.float32)
    attend, run = partial(dot_product_attention, x, x, x), partial(lstm, PARAMS)
    yield from (
        partial(attend, implementation="cudnn"),
        partial(attend, dropout_rate=0.1, dropout_key=jax.random.key(0), implementation="native"),
        partial(attend, mask=jnp.ones((2, 2), bool), implementation="pallas"),
        partial(run, jnp.ones((0, 2, 2), jnp.float32), implementation="native"),
        partial(run, jnp.ones((1, 2, 2), jnp.float32), implementation="pallas"),
        partial(within_shard_map, batch_axis_name="ring"),
        partial(within_shard_map, layout="striped"),
        partial(within_shard_map, T=0),
        partial(within_shard_map, layout="zigzag"),
    )
    row, h = jnp.ones((1, 2), jnp.float32), jnp.ones((1, 3), jnp.float32)
    state = rnnattn.LSTMState(h, h)
    rope: Any = partial(rnnattn.rope, jnp.ones((1, 1, 1, 2)))
    step: Any = rnnattn.lstm_step
    twin: Any = reference.lstm
    shift: Any = rnnattn.shift_matrix
    both: Any = rnnattn.bidirectional_lstm
    yield from (
        lambda: step(PARAMS, jnp.float32(1), state),
        lambda: step(PARAMS, jnp.ones((1, 2), int), state),
        lambda: step(PARAMS, row, state._replace(c=jnp.ones(3))),
        lambda: step(PARAMS._replace(w_h=jnp.ones((4, 12))), jnp.ones((1, 2)), state),
        lambda: step(PARAMS, row, state, implementation="cudnn"),
        lambda: twin(PARAMS, row[None], implementation="cuda"),
        lambda: both(PARAMS, PARAMS, row[None], reverse=True),
        lambda: shift(1, 2.5),
        lambda: rope(jnp.ones(1), rotary_dim=1.5),
        lambda: rnnattn.sinusoids(jnp.ones(1), 4, dtype=jnp.int32),
        lambda: rnnattn.shift_matrix(1, 4, dtype=jnp.int32),
        lambda: rnnattn.rope(jnp.ones((1, 1, 1, 2)), jnp.ones(1, complex)),
        lambda: rnnattn.rope(jnp.ones((1, 1, 1, 2), int), jnp.ones(1)),
        lambda: rnnattn.rope_mixed(jnp.ones((1, 1, 1, 3)), row[0], row[0], jnp.ones((2, 1, 1))),
        lambda: rnnattn.unpatchify(jnp.ones((1, 1, 4)), (1, 1), 0),
        lambda: rnnattn.token_mask(jnp.ones((1, 2, 2), bool), 0),
        lambda: rnnattn.stem_strides((0, 1), (1, 1), [(3, 3)]),
        lambda: rnnattn.conv_stem(
            jnp.ones((1, 4, 4, 1)), [jnp.ones((3, 3, 1, 2))], [jnp.ones(2, jnp.bfloat16)], (2, 2)
        ),
    )
    yield from _of_kinds()
    yield from _of_modules()
    yield from _of_gru_formats()
    yield from _of_units()
    yield from _of_formats()
    yield from _of_files()


def _of_kinds():
    """What is no array, no key, no flag, no tuple or no function of those arguments."""
    anything: Any = rnnattn
    none: Any = None
    linear, gates = anything.init_mingru(jax.random.key(0), 2, 3), jnp.ones((1, 2, 3), jnp.float32)
    row, h = jnp.ones((1, 2), jnp.float32), jnp.ones((1, 3), jnp.float32)
    steps, state = row[None], rnnattn.LSTMState(h, h)
    q = jnp.ones((1, 2, 2, 2), jnp.float32)
    attend = partial(anything.dot_product_attention, q, q, q)
    alibi = rnnattn.masks.alibi(jnp.ones(3))
    yield from (
        lambda: lstm(PARAMS, none),
        lambda: lstm(PARAMS, [[1.0], [1.0, 2.0]]),  # type: ignore[arg-type]
        lambda: lstm(PARAMS, steps, (h, h, h)),  # type: ignore[arg-type]
        lambda: lstm(PARAMS, steps, (none, h)),  # type: ignore[arg-type]
        lambda: lstm(PARAMS, steps, zoneout=0.1, key=3),  # type: ignore[arg-type]
        lambda: anything.lstm_step(PARAMS, none, state),
        lambda: anything.lstm_step(PARAMS, row, none),
        lambda: anything.linear_scan(none, gates),
        lambda: anything.linear_scan(gates, none),
        lambda: anything.linear_scan(gates, gates, "0"),
        lambda: anything.linear_scan(gates[..., :0], gates[..., :0]),
        lambda: anything.mingru(linear, none),
        lambda: anything.mingru_step(linear, none, h),
        lambda: attend(is_causal="no"),
        lambda: attend(scale="1"),
        lambda: attend(sinks=none, dropout_rate=0.1, dropout_key=3),
        lambda: attend(mask_function=lambda b, t, s: s <= t),
        lambda: attend(score_function=lambda logit, t, s: logit),
        lambda: attend(score_function=alibi),
        lambda: anything.packed_attention(q[0], q[0], q[0], np.array([0, 2]), score_function=alibi),
        lambda: anything.dot_product_attention(none, q, q),
        lambda: init_lstm(0, 2, 3),  # type: ignore[arg-type]
        lambda: anything.init_slstm(0, 2, 3),
        lambda: anything.init_mingru(0, 2, 3),
        lambda: anything.init_rglru(0, 2),
        lambda: anything.stacked_lstm(PARAMS, steps),
        lambda: anything.stacked_lstm([PARAMS], steps, return_cells=True),
        lambda: anything.stacked_lstm([PARAMS], steps, key=3),
        lambda: anything.stacked_lstm([PARAMS], steps, dropout_rate=0.1, dropout_key=3),
        lambda: anything.bidirectional_lstm(PARAMS, PARAMS, steps, state),
        lambda: anything.bidirectional_lstm(PARAMS, PARAMS, steps, (state,)),
        lambda: anything.bidirectional_lstm(PARAMS, PARAMS, steps, return_cells=True),
        lambda: anything.bidirectional_lstm(PARAMS, PARAMS, steps, key=3),
    )


def _of_modules():
    nn, rngs = rnnattn.nn, nnx.Rngs(0)
    vit = partial(nn.ViT, patch_size=2, width=8, depth=1, num_heads=2, classes=3, rngs=rngs)
    bad: list[dict[str, Any]] = [
        {"position": "rotary"},
        {"pool": "max"},
        {"stem": "linear"},
        {"depth": 0},
        {"dropout_rate": 1.0},
        {"width": 9},
        {"width": 6, "position": "sincos2d"},
        {"width": 12, "position": "rope2d"},
        {"patch_size": 0},
        {"image_size": 0},
        {"image_size": 3},
        {"position": "learned"},
    ]
    yield from (partial(vit, **{"position": "none", **change}) for change in bad)
    model, conv = vit(position="none"), vit(position="none", stem="conv", image_size=4)
    images = jnp.ones((1, 4, 4, 3))
    yield from (
        lambda: model(images[..., :2]),
        lambda: model(images.astype(jnp.int32)),
        lambda: model(images, valid=jnp.ones((1, 4), bool)),
        lambda: model(images[:, :3]),
        lambda: conv(images, valid=jnp.ones((1, 4, 4), bool)),
        lambda: nn.LSTM(2, 3, num_layers=0, rngs=rngs),
        lambda: nn.load_weights(model, {}),
    )
    heads = partial(nn.MultiHeadAttention, rngs=rngs)
    attention, tokens = heads(2, 8), jnp.ones((1, 3, 8))
    yield from (
        lambda: heads(0, 8),
        lambda: heads(3, 8),
        lambda: heads(2, 8, head_width=0),
        lambda: heads(4, 8, num_key_value_heads=3),
        lambda: heads(2, 8, dropout_rate=1.0),
        lambda: attention(tokens, scale=1.0),
        lambda: attention(tokens, tokens, positions=jnp.arange(3)),
    )
    q = jnp.ones((1, 3, 2, 4))
    yield from (
        lambda: nn.attention_fn(q, q, q, precision="high"),
        lambda: nn.attention_fn(q, q, q, qk_attn_weights_einsum=jnp.einsum),
        lambda: nn.attention_fn(q, q, q, dropout_rate=0.1, dropout_rng=jax.random.key(0)),
    )


def _of_units():
    key, init_rnn = jax.random.key(0), rnnattn.init_rnn
    gru, slstm = rnnattn.init_gru(key, 2, 3), rnnattn.init_slstm(key, 2, 3)
    x = jnp.ones((1, 4, 2), jnp.float32)
    run = lambda params=gru, x=x, **options: lambda: rnnattn.gru(params, x, **options)
    yield from (
        run(gru._replace(w_h=gru.b)),
        run(gru._replace(w_h=gru.w_h[:0])),
        run(gru._replace(w_h=gru.w_h[:, 1:])),
        run(gru._replace(w_x=gru.w_x[1:])),
        run(gru._replace(b=gru.b[1:])),
        run(gru._replace(b_n=gru.b)),
        run(gru, reset_after=False),
        run(gru, reset_after="after"),
        run(gru, implementation="cudnn"),
        lambda: rnnattn.slstm(slstm, x, implementation="native"),
        lambda: rnnattn.gru_step(gru, x[:, 0], gru.w_h[:1, :3], implementation="no"),  # type: ignore[arg-type]
        lambda: reference.gru(gru, x, implementation="no"),  # type: ignore[arg-type]
        lambda: init_lstm(jax.random.key(0), 2, 3, projection_size=0),
        lambda: rnnattn.rnn(init_rnn(key, 2, 3), x, activation="sin"),  # type: ignore[arg-type]
        lambda: rnnattn.slstm(slstm, x, forget_gate="none"),  # type: ignore[arg-type]
        lambda: rnnattn.init_slstm(key, 2, 3, num_heads=0),
        lambda: rnnattn.init_slstm(key, 2, 3, num_heads=2),
    )
    rnn, norm = init_rnn(key, 2, 3), rnnattn.init_layer_norm_gru(key, 2, 3)
    of = lambda function, params, **change: lambda: function(params._replace(**change), x)
    yield from (
        of(rnnattn.rnn, rnn, w_h=rnn.b),
        of(rnnattn.rnn, rnn, w_h=rnn.w_h[:0, :0]),
        of(rnnattn.rnn, rnn, w_h=rnn.w_h[1:]),
        of(rnnattn.rnn, rnn, w_x=rnn.w_x[1:]),
        of(rnnattn.rnn, rnn, b=rnn.b[1:]),
        of(rnnattn.layer_norm_gru, norm, w_h=norm.b),
        of(rnnattn.layer_norm_gru, norm, w_h=norm.w_h[:0]),
        of(rnnattn.layer_norm_gru, norm, w_h=norm.w_h[1:]),
        of(rnnattn.layer_norm_gru, norm, w_x=norm.w_x[1:]),
        of(rnnattn.layer_norm_gru, norm, k_x=norm.b[1:]),
        of(rnnattn.layer_norm_gru, norm, b_n=norm.b),
        of(rnnattn.slstm, slstm, w_h=slstm.b),
        of(rnnattn.slstm, slstm, w_h=slstm.w_h[:, :0]),
        of(rnnattn.slstm, slstm, w_h=slstm.w_h[..., 1:]),
        of(rnnattn.slstm, slstm, w_x=slstm.w_x[1:]),
        of(rnnattn.slstm, slstm, b=slstm.b[1:]),
        lambda: rnnattn.init_gru(jax.random.key(0), 0, 3),
    )


def _of_gru_formats():
    gru = rnnattn.init_gru(jax.random.key(0), 2, 3)
    onnx = interop.gru_to_onnx(gru, linear_before_reset=True)
    yield from (
        lambda: interop.rnn_to_flax(rnnattn.init_rnn(jax.random.key(0), 2, 3), form="haiku"),  # type: ignore[arg-type]
        lambda: interop.gru_to_haiku(gru),
        lambda: interop.gru_to_flax(gru, form="haiku"),  # type: ignore[arg-type]
        lambda: interop.gru_to_flax(gru._replace(b_n=jnp.ones(3, jnp.float32)), form="nnx"),
        lambda: interop.gru_from_onnx(onnx, direction=1),
    )


def _of_formats():
    keras = interop.lstm_to_keras(PARAMS._replace(peephole=None))
    onnx, haiku = interop.lstm_to_onnx(PARAMS), {"w": np.ones((3, 12)), "b": np.ones(12)}
    name = next(iter(keras))
    yield from (
        lambda: interop.lstm_to_keras(PARAMS),
        lambda: interop.lstm_from_keras({}),
        lambda: interop.lstm_from_keras({**keras, "more": keras[name]}),
        lambda: interop.lstm_from_keras({**keras, name: np.ones(5)}),
        lambda: interop.lstm_from_keras({**keras, name: keras[name].astype(np.int32)}),
        lambda: interop.lstm_from_keras({**keras, name: keras[name].astype(np.float64)}),
        lambda: interop.lstm_from_keras({**keras, name: [[1.0], [1.0, 2.0]]}),
        lambda: interop.lstm_from_onnx(onnx, direction=1),
        lambda: interop.lstm_from_haiku(haiku),
        lambda: interop.lstm_to_flax(PARAMS._replace(peephole=None), form="haiku"),  # type: ignore[arg-type]
        lambda: interop.vit_from_timm({}, 2),
        lambda: interop.vit_from_timm(timm_weights(), 3),
        lambda: interop.vit_from_google({"pre_logits/bias": np.ones(1)}),
        lambda: interop.vit_to_google({}, form="timm"),  # type: ignore[arg-type]
    )


def _of_files():
    write = partial(interop.write_safetensors, "unwritten")
    missing, leaf = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, jnp.ones(1)
    yield from (
        lambda: write({"a": {"b": leaf}, "a.b": leaf}),
        lambda: write({"__metadata__": leaf}),
        lambda: write({"\ud800": leaf}),
        lambda: write({"a": 1.0}),
        lambda: write({"a": np.ones(1, ml_dtypes.int4)}),
        lambda: interop.read_safetensors("damaged", missing),
        lambda: interop.read_safetensors("whole", missing),
    )


@pytest.mark.usefixtures("only_own_checks")
def test_every_check_refuses_something(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("damaged").write_bytes(b"x")
    interop.write_safetensors("whole", {"y": jnp.ones(1)})
    failed = set()
    calls = [call for table in TABLES for call in table._bad_calls().values()]
    for call in [*calls, *wrong_calls()]:
        with pytest.raises(ValueError) as caught:
            call()
        assert re.match(r"[\w.]+: ", str(caught.value)), caught.value
        for frame in traceback.extract_tb(caught.tb):
            path = Path(frame.filename)
            if path.is_relative_to(LIBRARY):
                failed.add((str(path.relative_to(LIBRARY)), frame.lineno))
    lines = lambda first, last: range(first, last + 1)
    idle = {
        (file, first)
        for file, first, last in sites()
        if not any((file, line) in failed for line in lines(first, last))
    }
    # an environment variable is refused once in a process: tests/test_native_load.py
    assert {file for file, _ in idle} <= {"native/load.py"}, idle
