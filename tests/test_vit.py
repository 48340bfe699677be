"""The vision transformer: sizes, positions, padding, pooling, dropout, and what it captures."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rnnattn
from rnnattn.nn import Block, LayerNorm, ViT
from tests.lstm_cases import assert_close

WIDTH, CLASSES, CHANNELS, PATCH = 8, 3, 2, (2, 3)
BASE = (6, 9)  # a grid of 3 × 3
RNG = np.random.default_rng(0)


def make(draw=True, **options):
    """A model in float64, every weight drawn anew, with dropout off."""
    defaults: dict[str, Any] = {
        "patch_size": PATCH,
        "width": WIDTH,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
        "classes": CLASSES,
        "channels": CHANNELS,
        "image_size": BASE,
        "param_dtype": jnp.float64,
    }
    model = ViT(**defaults | options, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(1)
    redraw = lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.5, w.dtype)
    if draw:
        nnx.update(model, jax.tree.map(redraw, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def images_of(rows, columns, batch=2):
    return jnp.asarray(RNG.normal(size=(batch, rows, columns, CHANNELS)))


apply = jax.jit(lambda model, images, valid=None: model(images, valid))
shapes = partial(jax.eval_shape, lambda model, images: model(images, capture=True))
capture = jax.jit(lambda model, images, valid=None: model(images, valid, capture=True))


# ---- the published sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("width, heads, count", [(192, 3, 5_717_416), (384, 6, 22_050_664)])
def test_as_many_parameters_as_timm_counts(width, heads, count):
    make = lambda: ViT(
        patch_size=16,
        image_size=224,
        width=width,
        depth=12,
        num_heads=heads,
        classes=1000,
        pool="cls",
        rngs=nnx.Rngs(0),
    )
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


# ---- any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"position": "learned", "pool": "cls"},
        {"position": "sincos2d", "pool": "mean"},
        {"position": "rope2d", "pool": "cls", "image_size": None},
        {"position": "none", "pool": "mean", "image_size": None},
        {"position": "rope2d", "pool": "cls", "stem": "conv"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_images_of_any_size(options):
    model = make(**options)
    conv = "stem" in options
    # a prime size for the stem that takes all of them
    for size, compiled in [((4, 15), True), ((11, 17) if conv else (8, 3), False)]:
        run = capture if compiled else shapes
        logits, activations = run(model, images_of(*size))
        grid = (3, 3) if conv else (size[0] // 2, size[1] // 3)
        assert model.grid(size) == grid
        T = model.prefix + grid[0] * grid[1]
        assert logits.shape == (2, CLASSES)
        assert not compiled or np.isfinite(logits).all()
        assert activations.embedded.shape == (2, T, WIDTH)


def test_captured_activations():
    model = make(pool="cls", depth=2)
    images = images_of(*BASE)
    logits, activations = capture(model, images)
    assert_close(logits, apply(model, images), 1e-12)
    assert len(activations.blocks) == len(activations.weights) == 2 and activations.mask is None
    for weights in activations.weights:
        assert weights.shape == (2, 2, 10, 10)
        assert_close(weights.sum(-1), jnp.ones((2, 2, 10)), 1e-12)
    tokens = jnp.concatenate(
        [jnp.broadcast_to(model.cls[...][None], (2, 1, WIDTH)), model.stem(images)], axis=1
    )
    assert_close(activations.embedded, tokens + model.position[...][None], 1e-12)
    first, weights = model.blocks[0](activations.embedded, return_weights=True)
    assert_close((first, weights), (activations.blocks[0], activations.weights[0]), 1e-12)
    assert_close(model.norm(activations.blocks[-1]), activations.normalized, 1e-12)
    np.testing.assert_array_equal(activations.pooled, activations.normalized[:, 0])
    assert_close(model.head(activations.pooled), logits, 1e-12)


def test_the_first_loss_is_that_of_guessing():
    model = make(draw=False)
    assert not apply(model, images_of(*BASE)).any()


# ---- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_learned_grid_is_resampled(pool):
    model = make(pool=pool)
    table = model.position[...]
    np.testing.assert_array_equal(model.position_table(BASE), table)
    expected = rnnattn.resample_grid(table, (3, 3), (2, 5), prefix_tokens=model.prefix)
    np.testing.assert_array_equal(model.position_table((4, 15)), expected)


def test_sinusoids_of_rows_and_columns():
    counted = make(position="sincos2d", pool="cls", image_size=None)
    table = np.asarray(counted.position_table((4, 15)))
    assert not table[0].any()
    row, column = 1, 3
    expected = [rnnattn.sinusoids(t, 4, dtype=jnp.float64) for t in (row, column)]
    np.testing.assert_allclose(table[1 + row * 5 + column], np.concatenate(expected), atol=1e-12)

    stretched = make(position="sincos2d")  # 2 × 5 patches on the 3 × 3 of `image_size`
    table = np.asarray(stretched.position_table((4, 15)))
    u = (row + 0.5) * 3 / 2 - 0.5, (column + 0.5) * 3 / 5 - 0.5
    expected = [rnnattn.sinusoids(t, 4, dtype=jnp.float64) for t in u]
    np.testing.assert_allclose(table[row * 5 + column], np.concatenate(expected), atol=1e-6)
    same = make(position="sincos2d", image_size=None)
    np.testing.assert_array_equal(stretched.position_table(BASE), same.position_table(BASE))


def test_rotations_see_where_a_token_is_and_nothing_else_does():
    images = images_of(*BASE)
    flipped = images.reshape(2, 3, 2, 9, 2)[:, ::-1].reshape(images.shape)  # rows of patches
    for position in ("none", "rope2d"):
        model = make(position=position)
        assert model.position_table(BASE) is None
        change = np.abs(apply(model, images) - apply(model, flipped)).max()
        assert (change < 1e-12) == (position == "none")


# ---- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"position": "learned", "pool": "cls"}, {"position": "rope2d", "pool": "mean"}]
)
def test_what_padding_holds_reaches_nothing(options):
    model = make(image_size=(6, 12), depth=2, **options)
    _, valid = rnnattn.crop_and_pad(images_of(6, 4, 1), (6, 12))  # cuts through patches, too
    valid = jnp.concatenate([valid, jnp.zeros_like(valid)])
    inside = images_of(6, 12)
    target = jnp.asarray(RNG.normal(size=(2, CLASSES)))

    @jax.jit
    def run(padding):
        images = jnp.where(valid[..., None], inside, padding)

        def loss(params, images):
            logits = nnx.merge(graphdef, params, rest)(images, valid)
            return jnp.sum((logits - target) ** 2), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, images)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    expected = run(0.0)
    for padding in (7.0, np.nan, np.inf):
        for a, e in zip(jax.tree.leaves(run(padding)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, e)
    (_, logits), (dparams, dimages) = expected
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, dparams)))
    assert not dimages[~valid].any() and dimages[valid].any()
    if options["position"] == "learned":
        seen = np.pad(rnnattn.token_mask(valid, PATCH)[0], (1, 0), constant_values=True)
        dposition = dparams["position"][...]
        assert not dposition[~seen].any() and np.abs(dposition[seen]).min() > 0
    else:
        np.testing.assert_array_equal(logits[1], model.head.bias[...])  # of no valid pixel


def test_an_image_among_padding_is_the_image_alone():
    model = make(position="rope2d", image_size=None, depth=2)
    images = images_of(4, 6)
    padded, valid = rnnattn.crop_and_pad(images, (8, 12))  # by whole patches
    logits, activations = capture(model, padded, valid)
    assert_close(logits, apply(model, images), 1e-10)
    hidden = np.asarray(~activations.mask)
    assert hidden.sum() == 2 * (16 - 4)
    for weights in activations.weights:
        assert not np.moveaxis(np.asarray(weights), 3, 1)[hidden].any()


# ---- training ---------------------------------------------------------------------------------


def test_an_optimizer_moves_every_weight():
    model = make(pool="cls", stem="conv")
    images = images_of(*BASE)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: jnp.sum(nnx.merge(graphdef, params, rest)(images) ** 2)
    gradient = jax.jit(jax.grad(loss))(params)
    moved = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradient))
    paths = jax.tree.leaves_with_path(params)
    for (path, before), after in zip(paths, jax.tree.leaves(moved), strict=True):
        name = jax.tree_util.keystr(path)
        # a bias of the keys shifts all logits alike
        assert "['key']['bias']" in name or not np.array_equal(before, after), name


@pytest.mark.parametrize("option", ["dropout_rate", "attention_dropout_rate", "drop_path_rate"])
def test_dropout_is_for_training_only(option):
    model, plain = make(**{option: 0.5}, depth=2), make(depth=2)
    images = images_of(*BASE)
    expected = apply(plain, images)
    np.testing.assert_array_equal(apply(model, images), expected)
    model.train()
    call = jax.jit(lambda model, key: model(images, rngs=nnx.Rngs(dropout=key)))
    first, again, other = (call(model, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, expected)


def test_stochastic_depth():
    model = make(depth=3, drop_path_rate=0.4)
    rates = [block.drop_path.rate for block in model.blocks]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4])

    rows, rate = 400, 0.25
    block = Block(4, 1, hidden=4, drop_path_rate=rate, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    block.fc2.kernel[...] = jnp.zeros_like(block.fc2.kernel[...])  # leaves the first branch
    x = jnp.asarray(RNG.normal(size=(1, 3, 4)))
    branch = block.attention(block.norm1(x))
    y = jax.jit(lambda block, x: block(x))(block, jnp.broadcast_to(x, (rows, 3, 4)))
    factor = np.asarray((y - x) / branch)
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], y.shape), atol=1e-9)
    factor = factor[:, 0, 0]
    kept = factor > 0.5
    np.testing.assert_allclose(factor, kept / (1 - rate), atol=1e-9)
    deviation = np.sqrt(rate * (1 - rate) / rows)
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation


def test_layer_norm():
    x = images_of(3, 4)
    norm = LayerNorm(CHANNELS, param_dtype=jnp.float64)
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([-1.0, 1.0])
    variance = x.var(-1, keepdims=True)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    expected = np.asarray(expected) * [2, 3] + [-1, 1]
    assert_close(norm(x), expected, 1e-12)
    far = LayerNorm(4)(jnp.array([1.0, 2.0, 3.0, 4.0], jnp.float32) + 10_000)
    np.testing.assert_allclose(far, np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-5)


def test_sixteen_bits():
    options = {"position": "rope2d", "pool": "mean", "param_dtype": jnp.float32}
    model, wide = make(dtype=jnp.bfloat16, **options), make(**options)
    images, valid = rnnattn.crop_and_pad(images_of(4, 6).astype(jnp.float32), (6, 9))
    logits, expected = apply(model, images, valid), apply(wide, images, valid)
    assert logits.dtype == jnp.bfloat16
    assert_close(logits.astype(jnp.float32), expected, 5e-2)


# ---- errors -----------------------------------------------------------------------------------

IMAGES = np.zeros((1, 6, 9, CHANNELS))
ERRORS: dict[str, Any] = {
    "`position` must be 'learned', 'sincos2d', 'rope2d' or 'none', got 'other'": lambda: make(
        position="other"
    ),
    "`pool` must be 'mean' or 'cls', got 'other'": lambda: make(pool="other"),
    "`stem` must be 'patch' or 'conv', got 'other'": lambda: make(stem="other"),
    "`image_size` must be given for position 'learned', got None": lambda: make(image_size=None),
    "`image_size` must be given for stem 'conv', got None": lambda: make(
        image_size=None, position="none", stem="conv"
    ),
    r"`image_size` must be of \(rows, columns\) in multiples of `patch_size` \(2, 3\), got "
    r"\(6, 8\)": lambda: make(image_size=(6, 8)),
    r"`images` must be of \(rows, columns\) in multiples of `patch_size` \(2, 3\), got "
    r"\(6, 8\); `rnnattn.crop_and_pad`": lambda: make()(jnp.asarray(IMAGES[:, :, :8])),
    r"`images` must be of shape \(B, rows, columns, 2\), got \(1, 6, 9, 1\)": lambda: make()(
        jnp.asarray(IMAGES[..., :1])
    ),
    r"`valid` must be of shape \(B, rows, columns\) = \(1, 6, 9\), got \(1, 6, 6\)": lambda: make()(
        jnp.asarray(IMAGES), jnp.ones((1, 6, 6), bool)
    ),
    "`valid` must be None with the conv stem": lambda: make(stem="conv")(
        jnp.asarray(IMAGES), jnp.ones((1, 6, 9), bool)
    ),
    "`width` must be a multiple of 3 heads, got 8": lambda: make(num_heads=3),
    "`width` must be 4 heads times 4 n, got 8": lambda: make(num_heads=4, position="rope2d"),
    "`width` must be a multiple of 4, got 6": lambda: make(width=6, position="sincos2d"),
    "`depth` must be at least 1, got 0": lambda: make(depth=0),
    r"`drop_path_rate` must be in \[0, 1\), got 1.0": lambda: make(drop_path_rate=1.0),
    r"`patch_size` must be \(rows, columns\), two integers of at least 1, or one for both, "
    "got 0": lambda: make(patch_size=0),
}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.usefixtures("only_own_checks")
def test_a_wrong_argument_is_named(message):
    with pytest.raises(ValueError, match=f"^ViT: {message}"):
        ERRORS[message]()
