"""An image as a sequence of patches (V1), and what becomes of it if the image's size changes (V2).

Nothing is trained: both are statements about what the library computes, which its derivatives
show. A token depends on a pixel where its derivative by it is not zero. Images are twice as wide as
high, so that no axis can stand for the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

import rnnattn
from experiments.engine import memory
from experiments.engine.config import Seed, Several, UsageError
from experiments.engine.session import SILENT, Session
from experiments.report.evidence import Claim, Evidence, each
from experiments.report.intervals import Exact
from rnnattn.nn import ViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "V1": "An image is a sequence of patches",
    "V2": "Another image size is another number of patches",
}

ROUNDING = 1e-5
"""Of a token in float32, whose values are of the order of 1."""

Cut = Callable[[Float[Array, "B rows columns channels"]], Float[Array, "B tokens values"]]


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: a few seconds on one core."""

    seed: Seed = 0
    """Random seed of the images and of the patch embedding."""
    patch_size: Annotated[int, Field(ge=2, le=2**10, multiple_of=2)] = 2
    """Side P of a patch, in pixels: even, so that the overlapping cut has a stride of P/2."""
    grids: Several[Annotated[int, Field(ge=3, le=2**10)]] = (3, 6, 9)
    """Patches along the height of the images, one number for each size; the first is the size that
    a resized patch kernel starts from. From 3 on, some pixels of an overlapping cut are in four."""
    channels: Annotated[int, Field(ge=1, le=2**10)] = 3


TINY = Config(grids=(3, 6), channels=1)


class Result(NamedTuple):
    """What was counted at each image size (n,); of the overlapping cut, at the first."""

    tokens: np.ndarray  # of patchify
    values: np.ndarray  # of one of its tokens
    astray: np.ndarray  # share of the pixels' values that are not in exactly one token
    permutation_error: np.ndarray  # how far the derivative of patchify is from a permutation
    unlike_pixels: np.ndarray  # that unpatchify does not give back to the bit
    overlapping_astray: np.ndarray  # ()
    overlapping_error: np.ndarray  # ()
    embedded_tokens: np.ndarray  # of the patch embedding of a ViT
    embedded_astray: np.ndarray
    embedded_values: np.ndarray  # pixels' values that a token depends on, at most
    resized_tokens: np.ndarray  # the same with the patch kernel resized with the image
    resized_values: np.ndarray
    resized_change: np.ndarray  # largest of a token, as patches and kernel are enlarged
    stretched_change: np.ndarray  # the same if the kernel is stretched as the patches are
    scores: dict[str, Any]


def overlapping(images: Float[Array, "B rows columns channels"], patch_size: int) -> Array:
    """The rival: patches of P × P pixels at a distance of P/2."""
    stride = (patch_size // 2,) * 2
    patches = jax.lax.conv_general_dilated_patches(
        images,
        (patch_size, patch_size),
        stride,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return patches.reshape(len(images), -1, patches.shape[-1])


def derivative(cut: Cut, image: Float[Array, "rows columns channels"]) -> np.ndarray:
    """Of every value of every token by every pixel's value: (tokens, values, pixels)."""
    found = np.asarray(jax.jacobian(lambda x: cut(x[None])[0])(image))
    return found.reshape(*found.shape[:2], -1)


class Counts(NamedTuple):
    """Of tokens and pixels that depend on each other."""

    tokens: int
    astray: float
    """Share of the pixels' values on which not exactly one token depends."""
    values: int
    """Pixels' values that a token depends on, at most."""


def counts(derivative: np.ndarray) -> Counts:
    """What depends on what, by where the derivative is not zero."""
    depends = np.any(derivative != 0, axis=1)
    return Counts(
        len(depends), float(np.mean(depends.sum(axis=0) != 1)), int(depends.sum(axis=1).max())
    )


def permutation_error(derivative: np.ndarray) -> float:
    """How far the derivative is from a matrix of zeros and ones with one 1 in each row and column:
    the largest difference of an entry from the nearer of 0 and 1, and of a sum from 1."""
    matrix = derivative.reshape(-1, derivative.shape[2])
    from_zero_or_one = np.abs(matrix - (matrix > 0.5))
    sums = [np.abs(matrix.sum(axis=axis) - 1) for axis in (0, 1)]
    return float(max(np.max(x) for x in (from_zero_or_one, *sums)))


def stem(config: Config, patch_size: int, kernel: Array | None = None) -> Any:
    """The patch embedding of a ViT with such patches, and with that kernel if one is given."""
    model = ViT(
        patch_size=patch_size, width=2, depth=1, num_heads=1, classes=1, channels=config.channels,
        position="none", rngs=nnx.Rngs(config.seed),
    )  # fmt: skip
    if kernel is not None:
        model.stem.kernel[...] = kernel
    return model.stem


def check(config: Config) -> None:
    """Raise a `UsageError` if a size is no multiple of the first, or there is no memory."""
    first = config.grids[0]
    if any(grid % first for grid in config.grids):
        raise UsageError(
            f"grids: should be multiples of the first, {first}, by which the patch kernel is "
            f"resized, got {config.grids}"
        )
    pixels = 2 * (max(config.grids) * config.patch_size) ** 2 * config.channels
    # the derivative of patchify by all pixels, and what NumPy makes of it
    memory.check(4 * 4 * pixels**2, "the derivative of all tokens by all pixels")


def run(config: Config, session: Session = SILENT) -> Result:
    """Cut random images of each size, embed them, and count what depends on what."""
    P, random = config.patch_size, np.random.default_rng(config.seed)
    images = [
        jnp.asarray(random.random((grid * P, 2 * grid * P, config.channels), np.float32))
        for grid in config.grids
    ]
    first = images[0]
    cut = lambda x: rnnattn.patchify(x, P)
    overlap = lambda x: overlapping(x, P)
    embed = stem(config, P)
    back = [rnnattn.unpatchify(cut(x[None]), x.shape[:2], P)[0] for x in images]
    derivatives, of_overlap = [derivative(cut, x) for x in images], derivative(overlap, first)
    embedded = [counts(derivative(embed, x)) for x in images]
    resized, changes = [], []
    for image, grid in zip(images, config.grids, strict=True):
        size = grid * P // config.grids[0]
        kernel = rnnattn.resize_patch_kernel(embed.kernel[...], size)
        resized.append(counts(derivative(stem(config, size, kernel), image)))
        changes.append(_changes(config, embed, first, size))
    after_resizing, after_stretching = np.array(changes).T
    tokens, values = np.array([cut(x[None]).shape[1:] for x in images]).T
    unlike = [np.sum(np.asarray(x) != np.asarray(y)) for x, y in zip(images, back, strict=True)]
    return Result(
        tokens=tokens,
        values=values,
        astray=np.array([counts(d).astray for d in derivatives]),
        permutation_error=np.array([permutation_error(d) for d in derivatives]),
        unlike_pixels=np.array(unlike),
        overlapping_astray=np.array(counts(of_overlap).astray),
        overlapping_error=np.array(permutation_error(of_overlap)),
        embedded_tokens=np.array([c.tokens for c in embedded]),
        embedded_astray=np.array([c.astray for c in embedded]),
        embedded_values=np.array([c.values for c in embedded]),
        resized_tokens=np.array([c.tokens for c in resized]),
        resized_values=np.array([c.values for c in resized]),
        resized_change=after_resizing,
        stretched_change=after_stretching,
        scores={"patch_size": P, "sizes": len(images)},
    )


def _changes(
    config: Config, embed: Any, image: Float[Array, "rows columns channels"], size: int
) -> list[float]:
    """How much tokens change as each patch of the image is enlarged by itself: with the resized
    kernel, and with one that is stretched as the patches are."""
    P, C = config.patch_size, config.channels
    enlarge = lambda x: jax.image.resize(x, (len(x), size, size, x.shape[3]), "bilinear")
    patches = enlarge(rnnattn.patchify(image[None], P).reshape(-1, P, P, C))
    whole = tuple(n * size // P for n in image.shape[:2])
    larger = rnnattn.unpatchify(patches.reshape(1, -1, size * size * C), whole, size)
    kernel = embed.kernel[...]
    stretched = jnp.moveaxis(enlarge(jnp.moveaxis(kernel, 3, 0)), 0, 3)
    return [
        float(jnp.max(jnp.abs(stem(config, size, new)(larger) - embed(image[None]))))
        for new in (rnnattn.resize_patch_kernel(kernel, size), stretched)
    ]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """V1: each pixel is in one token; V2: at a fixed patch size it is the number that changes."""
    return _patches_are_tokens(config, result), _number_or_size(config, result)


def _patches_are_tokens(config: Config, result: Result) -> Claim:
    grids = np.array(config.grids)
    tokens, values = 2 * grids**2, config.patch_size**2 * config.channels
    of_overlap = (2 * grids - 1) * (4 * grids - 1)
    astray, error = result.overlapping_astray, result.overlapping_error
    rival = "patches that overlap by half"
    return Claim(
        "V1",
        r"N = \frac{\text{rows}}{P} \cdot \frac{\text{columns}}{P},"
        r"\quad \text{tokens} \in \mathbb{R}^{N \times P^2 C},"
        r"\quad \frac{\partial\,\text{tokens}}{\partial\,\text{pixels}} \text{ a permutation}",
        "In images of every size each pixel's value is in exactly one of N tokens of P²C values, "
        "and not in up to four, as of patches that overlap; the derivative is a permutation, which "
        "is undone to the bit. Of a ViT's embedded tokens, too, exactly one depends on it.",
        (
            *_each(config, "share of values not in one token", 0, result.astray, astray, rival),
            *_each(config, "distance of the derivative from a permutation", 0,
                   result.permutation_error, error, rival),
            *_each(config, "pixels that do not come back to the bit", 0, result.unlike_pixels),
            *_each(config, "tokens N", tokens, result.tokens, of_overlap, rival),
            *_each(config, "values of a token", values, result.values),
            *_each(config, "embedded: share of values not in one token", 0, result.embedded_astray,
                   astray, rival),
            *_each(config, "embedded: tokens N", tokens, result.embedded_tokens, of_overlap, rival),
            *_each(config, "embedded: values that a token depends on", values,
                   result.embedded_values),
        ),
    )  # fmt: skip


def _number_or_size(config: Config, result: Result) -> Claim:
    grids = np.array(config.grids)
    tokens, values = 2 * grids[0] ** 2, config.patch_size**2 * config.channels
    areas = (grids / grids[0]) ** 2
    # at the first size nothing has changed yet
    unlike = lambda x: np.where(areas == 1, np.nan, x)
    change = "largest change of a token, patches and kernel enlarged"
    of_values = "values that a token depends on"
    return Claim(
        "V2",
        r"N = \frac{\text{rows} \cdot \text{columns}}{P^2}: \quad "
        r"N \propto \text{area at fixed } P, \quad P^2 \propto \text{area at fixed } N",
        "At a fixed patch size the number of tokens grows as the area of the image, and the number "
        "of values that one depends on stays; with the patch kernel resized with the image it is "
        "the other way round, and tokens of enlarged patches stay what they were.",
        (
            *_each(config, "tokens, fixed P", tokens * areas, result.embedded_tokens,
                   unlike(tokens), "no change")[::-1],
            *_each(config, f"{of_values}, fixed P", values, result.embedded_values,
                   unlike(values * areas), "as the area"),
            *_each(config, "tokens, kernel resized", tokens, result.resized_tokens,
                   unlike(tokens * areas), "as the area"),
            *_each(config, f"{of_values}, kernel resized", values * areas, result.resized_values,
                   unlike(values), "no change"),
            *_each(config, change, 0, result.resized_change, unlike(result.stretched_change),
                   "kernel stretched like the patches", error=ROUNDING),
        ),
        printed=(
            *_each(config, f"{of_values}, fixed P", unlike(values * areas), result.embedded_values,
                   values, "no change"),
            *_each(config, "tokens, kernel resized", unlike(tokens * areas), result.resized_tokens,
                   tokens, "no change"),
        ),
        note="One of the two changes, not both: the number, which positions have to follow, or the "
        "size, which the patch kernel has to.",
        printed_equation=r"\text{if the size of the input image changes, number and size of the "
        r"patches change}",
    )  # fmt: skip


def _each(
    config: Config, name: str, predicted: Any, measured: np.ndarray, *rival: Any, error: float = 0.0
) -> tuple[Evidence, ...]:
    """Evidence at each image size, but where nothing is predicted."""
    P = config.patch_size
    found = each(
        f"{name}, {{}} pixels",
        [f"{grid * P} × {2 * grid * P}" for grid in config.grids],
        predicted,
        [Exact(x, error) for x in measured],
        *rival,
    )
    return tuple(e for e in found if not np.isnan(e.predicted))


def plot(config: Config, result: Result) -> "Figure":
    """Tokens and the values of one against the area of the image, at fixed P and resized."""
    from experiments.figures import BLUE, ORANGE, new_figure

    figure = new_figure(9, 3.8)
    tokens, values = figure.subplots(1, 2)
    P, C = config.patch_size, config.channels
    grids = np.array(config.grids)
    area = 2 * (grids * P) ** 2
    fixed, resized = f"patches of {P} × {P}", "patch kernel resized with the image"
    for axes, at_fixed, at_resized in (
        (tokens, result.embedded_tokens, result.resized_tokens),
        (values, result.embedded_values, result.resized_values),
    ):
        axes.plot(area, at_fixed, "o", color=BLUE, label=fixed)
        axes.plot(area, at_resized, "s", color=ORANGE, label=resized)
        axes.set(xlabel="image (pixels)", xscale="log", yscale="log")
        axes.set_xticks(area, [f"{grid * P} × {2 * grid * P}" for grid in config.grids])
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    line = np.array([area.min(), area.max()])
    tokens.plot(line, line / P**2, color=BLUE, label="theory, area / P²")
    tokens.plot(line, [2 * grids[0] ** 2] * 2, color=ORANGE)
    values.plot(line, [P**2 * C] * 2, color=BLUE, label="theory, P²C")
    values.plot(line, line / (2 * grids[0] ** 2) * C, color=ORANGE)
    tokens.set_ylabel("tokens")
    values.set_ylabel("values that a token depends on")
    tokens.legend(fontsize=8)
    values.legend(fontsize=8)
    return figure
