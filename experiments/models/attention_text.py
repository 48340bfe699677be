"""A causal transformer that reads text, character by character, and says what comes next.

    x = E[c]                                          of the character c at each position t
    q, k, v = norm(x) W_q, norm(x) W_k, norm(x) W_v   q and k then rotated by their positions
    x ← x + attention(q, k, v) W_o                    to the characters up to its own
    x ← x + GELU(norm(x) W_1) W_2                     these two in each block
    p(next) = softmax(norm(x) W + b),   loss = -log p(next),   in nats per character
    norm(x) = (x − mean) / √(variance + 1e-6) · scale + bias

All but the attention is done to each character by itself, so that a window may lie on several
devices: keys and values then travel round them, by `rnnattn.parallel.ring_attention`.

Axes: B batch, T time, V characters, D width, N heads, K width of a head, F hidden width, S cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int32, PRNGKeyArray

import rnnattn
from experiments.engine.config import Fraction, Layers, Size, UsageError
from experiments.engine.devices import ROWS, SEQUENCE
from experiments.engine.training import Loss
from experiments.models.lstm import Dtype, computed_in, kept_dtype
from experiments.models.text import draw, judge
from rnnattn.parallel import ring_attention
from rnnattn.precision import accumulator

Attend = Callable[..., Float[Array, "B T N K"]]
"""Causal attention of (query, key, value), each (B, T, N, K)."""


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer."""

    width: Size = 16
    """Embedding dimension of a character."""
    depth: Layers = 1
    """Number of transformer blocks."""
    num_heads: Size = 2
    """Attention heads in each block."""
    mlp_ratio: Size = 4
    """Hidden width of the MLP, as a multiple of the width."""
    dropout: Fraction = 0.0
    """Dropout rate of what attention and MLP add, in training."""
    dtype: Dtype = "float32"
    """Precision of the arithmetic and the parameters; with bfloat16, only the arithmetic has 16
    bits: parameters, logits, the loss and the optimiser state stay float32."""
    remat: Literal["none", "blocks"] = "none"
    """What to recompute in the backward pass, to save memory: nothing, or the inside of blocks."""


class Norm(NamedTuple):
    """Of a LayerNorm."""

    scale: Float[Array, " D"]
    bias: Float[Array, " D"]


class Block(NamedTuple):
    """Weights of a block."""

    norm1: Norm
    query: Float[Array, "D N K"]
    key: Float[Array, "D N K"]
    value: Float[Array, "D N K"]
    out: Float[Array, "N K D"]
    norm2: Norm
    w1: Float[Array, "D F"]
    w2: Float[Array, "F D"]


class TransformerParams(NamedTuple):
    """Weights of the model."""

    embedding: Float[Array, "V D"]
    blocks: tuple[Block, ...]
    norm: Norm
    w: Float[Array, "D V"]
    b: Float[Array, " V"]


def check_model(config: TransformerConfig) -> None:
    """Raise a `UsageError` if there is no such model."""
    # the features of a head are rotated in pairs
    divisor = 2 * config.num_heads
    if config.width % divisor:
        raise UsageError(
            f"model.width: should be a multiple of 2 × model.num_heads = {divisor}, got "
            f"{config.width}"
        )


@partial(jax.jit, static_argnums=(1, 2))
def init_transformer(
    key: PRNGKeyArray, characters: int, config: TransformerConfig
) -> TransformerParams:
    """Random weights: of variance 1 for the embedding, 1 / inputs for what follows, and in the maps
    back to x, of which there are two in each block, as many times less."""
    D, N, F = config.width, config.num_heads, config.width * config.mlp_ratio
    dtype = jnp.dtype(kept_dtype(config.dtype))
    norm = Norm(jnp.ones(D, dtype), jnp.zeros(D, dtype))
    embedding_key, w_key, *keys = jax.random.split(key, 2 + config.depth)

    def normal(key: PRNGKeyArray, *shape: int, inputs: int) -> Array:
        return jax.random.normal(key, shape, dtype) / inputs**0.5

    def block(key: PRNGKeyArray) -> Block:
        of_query, of_key, of_value, of_out, of_w1, of_w2 = jax.random.split(key, 6)
        maps_back = 2 * config.depth
        return Block(
            norm1=norm,
            query=normal(of_query, D, N, D // N, inputs=D),
            key=normal(of_key, D, N, D // N, inputs=D),
            value=normal(of_value, D, N, D // N, inputs=D),
            out=normal(of_out, N, D // N, D, inputs=D * maps_back),
            norm2=norm,
            w1=normal(of_w1, D, F, inputs=D),
            w2=normal(of_w2, F, D, inputs=F * maps_back),
        )

    return TransformerParams(
        embedding=normal(embedding_key, characters, D, inputs=1),
        blocks=tuple(map(block, keys)),
        norm=norm,
        w=normal(w_key, D, characters, inputs=D),
        b=jnp.zeros(characters, dtype),
    )


def attention_on(mesh: Mesh | None) -> Attend:
    """Attention to windows that lie on the devices of the mesh; None is one device."""
    attend: Attend = partial(rnnattn.dot_product_attention, is_causal=True)
    if mesh is None:
        return attend
    if mesh.shape[SEQUENCE] > 1:
        return partial(
            ring_attention, is_causal=True, mesh=mesh, axis_name=SEQUENCE, batch_axis_name=ROWS
        )
    # left to jit, a CPU's kernel would be handed the rows of all devices
    return jax.shard_map(attend, mesh=mesh, in_specs=P(ROWS), out_specs=P(ROWS))


def predict(
    params: TransformerParams,
    x: Int32[Array, "B T"],
    attend: Attend,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    dtype: Dtype | None = None,
    remat: bool = False,
) -> Float[Array, "B T V"]:
    """Logits of the character after each of `x`.

    Args:
        attend: of `attention_on`.
        dropout: its rate, where there is a key.
        dtype: of the arithmetic; None is that of the parameters, in which logits are.
        remat: keep what is between blocks alone for the gradient.
    """
    # positions are those of the whole window, wherever its parts lie
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    through = partial(_through_block, attend=attend, positions=positions, dropout=dropout)

    def step(hidden, of_block):
        block, key = of_block
        return through(block, key, hidden), None

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    # in a loop, as without one XLA on a CPU keeps what `remat` would compute again
    blocks = jax.tree.map(lambda *of_blocks: jnp.stack(of_blocks), *params.blocks)
    keys = None if key is None else jax.random.split(key, len(params.blocks))
    # of the table itself, the gradients of many characters would be added up in that dtype
    embedded = computed_in(dtype, params.embedding[x])
    hidden, _ = jax.lax.scan(step, embedded, (blocks, keys))
    return _logits(params, hidden)


def loss_under(config: TransformerConfig, mesh: Mesh | None = None) -> Loss:
    """Cross-entropy and accuracy of a batch of windows, which lie on the devices of the mesh."""
    attend, remat = attention_on(mesh), config.remat == "blocks"

    def loss(params, batch, key):
        logits = predict(params, batch.characters, attend, config.dropout, key, config.dtype, remat)
        nats, correct = judge(logits, batch.following)
        return jnp.mean(nats), {"accuracy": jnp.mean(correct, dtype=logits.dtype)}

    return loss


def read_through(
    params: TransformerParams, text: Int32[Array, " N"], window: int, dtype: Dtype | None = None
) -> tuple[Float[Array, " N-1"], Float[Array, " N-1"]]:
    """-log p of each character but the first, and whether it was guessed.

    Windows overlap by half: but for the first, what is kept of a window is its second half, so that
    a character is judged given at least half a window before it.
    """
    number, attend = len(text) - 1, attention_on(None)
    fresh = (window + 1) // 2  # characters that a window judges and the ones before it did not
    more = max(0, -(-(number - window) // fresh))  # windows after the first
    padded = jnp.pad(text, (0, window + more * fresh - number))

    def read(start):
        x, following = (jax.lax.dynamic_slice_in_dim(padded, start + n, window) for n in (0, 1))
        nats, correct = judge(predict(params, x[None, :], attend, dtype=dtype)[0], following)
        return nats, correct.astype(nats.dtype)

    def joined(x):
        first, rest = x[0, : window - fresh], x[:, window - fresh :]
        return jnp.concatenate([first, rest.ravel()])[:number]

    nats, correct = jax.lax.map(read, fresh * jnp.arange(1 + more, dtype=jnp.int32))
    return joined(nats), joined(correct)


Cache = tuple[rnnattn.KVCache, ...]


@partial(jax.jit, static_argnames=("length", "temperature", "window"))
def write(
    params: TransformerParams,
    prompt: Int32[Array, " N"],
    key: PRNGKeyArray,
    *,
    length: int,
    window: int,
    temperature: float = 1.0,
) -> Int32[Array, " length"]:
    """The characters that follow the prompt, which has one at least, each given a `window` of them.

    Each is drawn from what the model expects after the last, p(next) ∝ exp(logit / temperature); at
    a temperature of 0 it is the likeliest.
    """

    def read(cache: Cache, character: Array) -> tuple[Cache, Array]:
        x = params.embedding[character][None, None, :]
        after: list[rnnattn.KVCache] = []
        for block, of_block in zip(params.blocks, cache, strict=True):
            position, attend = of_block.length, partial(_attend_to_cache, of_block, after)
            x = _through_block(block, None, x, attend=attend, positions=position, dropout=0.0)
        return tuple(after), _logits(params, x)[0, 0]

    def step(carry, key):
        character, cache = carry
        cache, logits = read(cache, character)
        character = draw(logits, key, temperature)
        return (character, cache), character

    room = min(window, len(prompt) + length)
    empty = [jnp.zeros((1, room, *block.key.shape[1:]), params.b.dtype) for block in params.blocks]
    cache = tuple(rnnattn.KVCache(x, x, jnp.zeros(1, jnp.int32)) for x in empty)
    if len(prompt) > 1:
        cache, _ = jax.lax.scan(read, cache, prompt[:-1])
    return jax.lax.scan(step, (prompt[-1], cache), jax.random.split(key, length))[1]


def _through_block(block, key, x, *, attend, positions, dropout):
    """x (B, T, D) after the block."""
    keys = (None, None) if key is None else jax.random.split(key)
    maps = block.query, block.key, block.value, block.out, block.w1, block.w2
    w_q, w_k, w_v, w_o, w1, w2 = computed_in(x.dtype, maps)
    y = _normalized(block.norm1, x)
    q, k, v = (jnp.einsum("btd,dnk->btnk", y, w) for w in (w_q, w_k, w_v))
    attended = attend(rnnattn.rope(q, positions), rnnattn.rope(k, positions), v)
    x = x + _dropped(dropout, keys[0], jnp.einsum("btnk,nkd->btd", attended, w_o))
    hidden = jax.nn.gelu(_normalized(block.norm2, x) @ w1, approximate=False)
    return x + _dropped(dropout, keys[1], hidden @ w2)


def _attend_to_cache(cache, after, query, key, value):
    """Attention of one token to those of the cache and itself; `after` is given the cache with it.

    Once the cache is full, its place is that of the oldest: rotated keys may lie in any order.
    """
    room = cache.key.shape[1]
    place = cache.length[0] % room
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, place, 1)
    cache = rnnattn.KVCache(put(cache.key, key), put(cache.value, value), cache.length + 1)
    after.append(cache)
    lengths = jnp.minimum(cache.length, room)
    return rnnattn.dot_product_attention(
        query, cache.key, cache.value, key_value_seq_lengths=lengths
    )


def _logits(params, x):
    logits = _normalized(params.norm, x) @ params.w.astype(x.dtype)
    return logits.astype(params.b.dtype) + params.b[None, None, :]


def _normalized(norm, x):
    """16-bit numbers in float32."""
    wide = x.astype(accumulator(x.dtype))
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    scale, bias = (w.astype(wide.dtype)[None, None, :] for w in norm)
    return (wide * scale + bias).astype(x.dtype)


def _dropped(rate, key, x):
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
