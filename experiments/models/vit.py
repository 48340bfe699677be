"""A vision transformer that names images: the model of the ViT experiments, as functions of arrays.

loss = -log softmax(logits)[label],   averaged over the batch
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from experiments.engine.config import Fraction, Layers, Size, UsageError
from experiments.engine.memory import check_training, rows_like
from experiments.engine.training import Loss, TrainConfig
from rnnattn.nn import ViT
from rnnattn.precision import accumulator

READ_AT_ONCE = 200
"""Held-out images in memory at a time; the scores are the same for any number."""

Apply = Callable[..., Any]
"""`apply(params, pixels (B, rows, columns, channels), key=None, **options)`: logits, and what else
the options ask of `rnnattn.nn.ViT`, 16-bit numbers in float32; with a key, as in training, with
dropout."""

Shape = tuple[int, int, int]
"""Of an image: rows, columns, channels."""


@dataclass(frozen=True)
class ViTConfig:
    """The vision transformer."""

    patch_size: Size = 4
    """Side length of a patch, in pixels."""
    width: Size = 16
    """Embedding dimension of a token."""
    depth: Layers = 1
    """Number of transformer blocks."""
    num_heads: Size = 2
    """Attention heads in each block."""
    mlp_ratio: Size = 2
    """Hidden width of the MLP, as a multiple of the width."""
    position: Literal["learned", "sincos2d", "rope2d", "none"] = "learned"
    """Position encoding."""
    pool: Literal["mean", "cls"] = "mean"
    """What the classifier reads: the mean of the tokens, or a class token."""
    stem: Literal["patch", "conv"] = "patch"
    """Patch embedding: a linear map of each patch, or strided convolutions."""
    dropout: Fraction = 0.0
    """Dropout rate, in training."""
    drop_path: Fraction = 0.0
    """Stochastic depth: probability of dropping a branch of the last block, in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the arithmetic; parameters, norms, the loss and the optimiser state stay
    float32."""


def build(config: ViTConfig, shape: Shape, classes: int, seed: int = 0) -> ViT:
    """The model for images of `shape`, which its positions refer to, with weights by the seed."""
    return ViT(
        patch_size=config.patch_size,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        classes=classes,
        channels=shape[2],
        image_size=shape[:2],
        position=config.position,
        pool=config.pool,
        stem=config.stem,
        dropout_rate=config.dropout,
        drop_path_rate=config.drop_path,
        dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None,
        rngs=nnx.Rngs(seed),
    )


def check_model(config: ViTConfig, shape: Shape, classes: int) -> ViT:
    """The model for images of `shape`, but for its weights.

    Raises:
        UsageError: if there is no such model.
    """
    try:
        return nnx.eval_shape(lambda: build(config, shape, classes))
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None


def check_memory(model: ViT, data: Any, train: TrainConfig) -> None:
    """Raise a `UsageError` if there is no memory to train the model on the first of the `data`."""
    params, apply = functional(model)
    batch = rows_like(data[0], train.batch_size)
    check_training(train, loss_of(apply), params, batch, data=data)


def functional(model: ViT) -> tuple[PyTree, Apply]:
    """The model's parameters, and the model as a function of them."""
    model.train()
    training = nnx.graphdef(model)
    model.eval()
    reading, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, pixels, key=None, **options):
        graph = reading if key is None else training
        rngs = None if key is None else nnx.Rngs(dropout=key)
        found = nnx.merge(graph, params, rest)(pixels, rngs=rngs, **options)
        return jax.tree.map(_widened, found)

    return params, apply


def _widened(x: Array) -> Array:
    """Numbers of 16 bits in float32."""
    return x.astype(accumulator(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def loss_of(apply: Apply) -> Loss:
    """Cross-entropy and accuracy of a batch of images."""

    def loss(params, batch, key):
        return judge(apply(params, batch.pixels, key), batch.labels)

    return loss


def judge(logits: Float[Array, "B classes"], labels: Array) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy, and accuracy."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jax.lax.argmax(logits, 1, jnp.int32) == labels
    return jnp.mean(entropy), {"accuracy": jnp.mean(correct, dtype=logits.dtype)}


def read(apply: Apply, params: PyTree, pixels: Float[Array, "B rows columns channels"]) -> Array:
    """Logits of any number of images, a few at a time."""
    size = min(READ_AT_ONCE, len(pixels))
    padded = jnp.pad(pixels, ((0, -len(pixels) % size), (0, 0), (0, 0), (0, 0)))
    chunks = padded.reshape(-1, size, *pixels.shape[1:])
    logits = jax.lax.map(lambda chunk: apply(params, chunk), chunks)
    return logits.reshape(-1, logits.shape[-1])[: len(pixels)]


def evaluation(apply: Apply, images: Any) -> Callable[[PyTree], dict[str, Array]]:
    """Metrics of the parameters on the images."""

    def metrics(params):
        logits = read(apply, params, jnp.asarray(images.pixels))
        loss, others = judge(logits, jnp.asarray(images.labels))
        return {"loss": loss, **others}

    return metrics


def attention_received(model: ViT, apply: Apply, params: PyTree, pixels: Any) -> np.ndarray:
    """How much of the attention goes to each patch (B, depth, heads, rows, columns).

    Of the class token's attention, if there is one, else of all tokens' in the mean.
    """
    _, kept = jax.jit(apply, static_argnames="capture")(params, pixels, capture=True)
    of_blocks = np.stack([np.asarray(weights) for weights in kept.weights], axis=1)
    of_readers = of_blocks[..., 0, 1:] if model.prefix else of_blocks.mean(axis=-2)
    return of_readers.reshape(*of_readers.shape[:-1], *model.grid(pixels.shape[1:3]))


def position_similarity(model: ViT, size: tuple[int, int]) -> np.ndarray:
    """Cosine of the positions of any two patches of images of `size`, (rows, columns) twice.

    Empty where no position is added to the tokens.
    """
    table = model.position_table(size)
    if table is None:
        return np.zeros((0, 0, 0, 0), np.float32)
    positions = np.asarray(table)[model.prefix :]
    positions = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    return (positions @ positions.T).reshape(*model.grid(size), *model.grid(size))
