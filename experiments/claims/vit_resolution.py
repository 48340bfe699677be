"""What a vision transformer trained on small images makes of images twice as large (V3–V6).

Images are shrunk to half their size by area means. Models trained on those are moved to the whole
images in several ways and tuned there for a few steps. All claims are about ways to train, so the
unit is the training: the test images are the same for every seed, and the seed draws the weights,
the order, and which of the other images are trained on. Arms that are compared share their seeds.

The trainings of all seeds go on side by side, as one step over a further axis (`jax.vmap` of the
engine's own step): for models of this size that takes half the time. They are short and many, so
that none is worth a checkpoint, nor a device of its own.
"""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree
from pydantic import Field
from scipy import stats

import rnnattn
from experiments.data.images import Images, image_batches, split_in_two
from experiments.data.sources import DataConfig, load_images
from experiments.engine import memory
from experiments.engine.config import Count, NonNegative, Positive, Seed, Several, Size, UsageError
from experiments.engine.session import SILENT, Session
from experiments.engine.training import (
    TrainConfig,
    TrainState,
    make_optimizer,
    make_schedule,
    start,
    train_step,
)
from experiments.models.vit import (
    Apply,
    Shape,
    ViTConfig,
    attention_received,
    build,
    check_model,
    functional,
    loss_of,
    position_similarity,
    read,
)
from experiments.report.evidence import LEVEL, Claim, Evidence, above, below, equal
from experiments.report.intervals import Exact, Mean
from rnnattn.nn import ViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "V3": "Train at low resolution, tune at high resolution",
    "V4": "Positions have to be fitted to a new image size",
    "V5": "Crop and pad the image to the wanted size",
    "V6": "A CNN brings the image to the wanted size",
}

MOVES = {
    "learned": "learned grid",
    "sincos2d": "2-D sinusoids",
    "rope2d": "2-D rotary",
    "none": "no positions",
    "pad": "padded small images, masked",
    "crop": "cropped to the small size",
    "conv": "convolutional stem",
}
"""The ways from small images to large ones."""

Scheme = Literal["learned", "sincos2d", "rope2d"]
"""Of positions, those that can be fitted to another size."""

MARGIN = 0.05
"""A way "works" if it costs less than so much accuracy (V5, V6)."""

POWER = 0.9
"""Probability with which a difference is seen, where a claim says which one can be."""

TIMED = 20
"""Steps that are timed, in turn on small images and on whole ones."""

WARMUP = 0.1
"""Share of a training's steps over which the learning rate rises."""

SHOWN = 3
"""Test images whose attention is kept."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: under a minute on two cores, no download."""

    seed: Seed = 0
    """The first random seed."""
    runs: Annotated[int, Field(ge=2, le=2**20)] = 16
    """Number of seeds: each has its own weights, order and choice of the images to train on."""
    steps: Count = 500
    """Optimiser steps on small images."""
    learning_rate: Positive = 4e-3
    """Peak learning rate on small images, and on whole ones from scratch."""
    tune_steps: Count = 250
    """Steps of tuning on whole images after the move."""
    tune_learning_rate: Positive = 2e-3
    """Peak learning rate of the tuning."""
    batch_size: Size = 32
    """Images in each step."""
    weight_decay: NonNegative = 0.0
    """Of AdamW, multiplied by the learning rate."""
    schemes: Several[Scheme] = ("learned",)
    """Schemes of positions that are fitted and not (V4), "learned" among them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=lambda: ViTConfig(patch_size=2, width=32, depth=1))
    """The model; its position and stem are those of each way to move it."""


TINY = Config(runs=2, steps=2, tune_steps=1, batch_size=4, model=ViTConfig(width=8))


class Result(NamedTuple):
    """Accuracies by training (rows R, seeds S), what a step costs, and pictures."""

    methods: np.ndarray  # (R,)
    phases: np.ndarray  # (R,)
    accuracies: np.ndarray  # (R, S), on the test images
    chance: np.ndarray  # accuracy of a guess
    step_flops: np.ndarray  # on small images and on whole ones (2,)
    step_bytes: np.ndarray  # the same: memory
    step_seconds: np.ndarray  # the same, several times: (TIMED, 2)
    padding_effects: np.ndarray  # largest change of a logit, masked and not (2,)
    tokens: np.ndarray  # of the convolutional stem and of patches, small and whole (2, 2)
    similarity_small: np.ndarray  # of learned positions: as trained, interpolated, and tuned
    similarity_moved: np.ndarray
    similarity_tuned: np.ndarray
    images_small: np.ndarray
    images_whole: np.ndarray
    attention_small: np.ndarray  # in the last block (images, rows, columns)
    attention_moved: np.ndarray
    attention_tuned: np.ndarray
    scores: dict[str, Any]


class Network(NamedTuple):
    """A model whatever its weights, and how it takes its images."""

    model: ViT
    apply: Apply


class Training(NamedTuple):
    """The parameters of all seeds; a step of theirs to be taken once more; and its memory."""

    params: PyTree
    again: Callable[[], Any]
    bytes: float


View = Literal["small", "whole", "crop"]
"""How images are shown to a network: shrunk, as they are, or cropped to the size of small ones."""


def shown(pixels: np.ndarray, view: View) -> np.ndarray:
    """Images (B, rows, columns, channels) in that view; a small pixel is the mean of 2 × 2."""
    B, rows, columns, channels = pixels.shape
    half = rows // 2, columns // 2
    if view == "small":
        squares = pixels.reshape(B, half[0], 2, half[1], 2, channels)
        return squares.mean(axis=(2, 4), dtype=pixels.dtype)
    return (
        np.asarray(rnnattn.crop_and_pad(jnp.asarray(pixels), half)[0]) if view == "crop" else pixels
    )


def model_of(config: Config, method: str) -> ViTConfig:
    """The model of that way: its position and its stem."""
    position = method if method in ("sincos2d", "rope2d", "none") else "learned"
    stem = "conv" if method == "conv" else "patch"
    return replace(config.model, position=position, stem=stem)  # type: ignore[arg-type]


def padding(network: Network, size: tuple[int, int]) -> Network:
    """The same, but images are padded to `size` first, and the padding is masked."""

    def apply(params, pixels, key=None, **options):
        padded, valid = rnnattn.crop_and_pad(pixels, size)
        return network.apply(params, padded, key, valid=valid, **options)

    return Network(network.model, apply)


class Study:
    """The trainings of several seeds, side by side, and the images that they have in common."""

    def __init__(self, config: Config):
        # which images are held out follows from no seed of the config: they are the same for all
        data = load_images(config.data, 0, "float32")
        rest = Images(*map(np.concatenate, zip(data.train, data.validation, strict=True)))
        self.config, self.test, self.origin = config, data.test, data.origin
        self.seeds = range(config.seed, config.seed + config.runs)
        self.classes = len(data.classes)
        self.whole: Shape = data.test.pixels.shape[1:]
        self.half: Shape = (self.whole[0] // 2, self.whole[1] // 2, self.whole[2])
        shift, flip = config.data.shift, config.data.flip
        self._batches = [
            image_batches(
                split_in_two(rest, 1 / 8, seed)[0], seed, config.batch_size, shift=shift, flip=flip
            )
            for seed in self.seeds
        ]
        plan = TrainConfig(schedule="constant", warmup=0.0, weight_decay=config.weight_decay)
        # the rate is a number in the state, so that all trainings of a network share a program
        self._optimizer = optax.inject_hyperparams(
            lambda learning_rate: make_optimizer(replace(plan, learning_rate=learning_rate))
        )(learning_rate=0.0)
        self._programs: dict[Any, Any] = {}

    def images(self, step: int, view: View) -> Images:
        """The batch of a step, of all seeds (S, B, …)."""
        batches = [batch(step) for batch in self._batches]
        pixels, labels = map(np.concatenate, zip(*batches, strict=True))
        of_seeds = lambda x: x.reshape(len(batches), -1, *x.shape[1:])
        return Images(of_seeds(shown(pixels, view)), of_seeds(labels))

    def network(self, method: str, shape: Shape) -> Network:
        """The network whose positions refer to images of `shape`."""
        model = build(model_of(self.config, method), shape, self.classes)
        return Network(model, functional(model)[1])

    def weights(self, method: str, shape: Shape) -> PyTree:
        """The initial parameters of all seeds."""
        model = model_of(self.config, method)
        drawn = [functional(build(model, shape, self.classes, seed))[0] for seed in self.seeds]
        return jax.tree.map(lambda *x: jnp.stack(x), *drawn)

    def train(
        self, network: Network, params: PyTree, view: View, steps: int, rate: float
    ) -> Training:
        """Train all seeds for so many steps: the rate rises to `rate`, then falls as a cosine.

        Raises:
            FloatingPointError: if the parameters come out NaN or infinite.
        """
        keys = jax.vmap(jax.random.key)(jnp.array(self.seeds, jnp.uint32))
        rates = make_schedule(TrainConfig(steps=steps, learning_rate=rate, warmup=WARMUP))
        # optax mixes its integer counts with floats, which strict promotion refuses
        with jax.numpy_dtype_promotion("standard"):
            of_steps = np.asarray(jax.vmap(rates)(jnp.arange(steps)), np.float32)

        def at(state: TrainState, step: int) -> TrainState:
            rates = {"learning_rate": np.full(len(self.seeds), of_steps[step])}
            return state._replace(optimizer=state.optimizer._replace(hyperparams=rates))

        state = at(jax.vmap(lambda p: start(p, self._optimizer))(params), 0)
        first = self.images(0, view)
        program = self._program(network, state, first, keys)
        for step in range(steps):
            state = program(at(state, step), self.images(step, view), keys)
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.params)):
            raise FloatingPointError(f"parameters are NaN or infinite after {steps} steps")
        again = lambda: jax.block_until_ready(program(state, first, keys))
        used = program.memory_analysis()
        total = used and (
            used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        )
        return Training(state.params, again, float(total or np.nan))

    def _program(self, network: Network, *example: Any) -> Any:
        """A step of all seeds, compiled for arguments like these."""
        key = network.apply, example[1].pixels.shape
        if key not in self._programs:
            one = partial(
                train_step, loss_of(network.apply), self._optimizer, skip=False, mesh=None
            )
            step = jax.jit(lambda *arguments: jax.vmap(one)(*arguments)[0])
            self._programs[key] = step.lower(*example).compile()
        return self._programs[key]

    def accuracy(self, network: Network, params: PyTree, view: View) -> np.ndarray:
        """On the test images, by seed."""
        answers = _answers(network.apply, params, shown(self.test.pixels, view))
        return np.mean(np.asarray(answers) == self.test.labels, axis=1)

    def flops(self, network: Network, view: View) -> float:
        """Operations of a step of one seed.

        XLA does not see into the kernels of attention: they are counted as what they compute, which
        is what is computed where the weights are asked for.
        """
        dense = lambda params, pixels, key=None: network.apply(params, pixels, key, capture=True)[0]
        state = start(functional(network.model)[0], self._optimizer)
        batch = jax.tree.map(lambda x: x[0], self.images(0, view))
        lowered = train_step.lower(
            loss_of(dense), self._optimizer, state, batch, jax.random.key(0), skip=False, mesh=None
        )
        return float((lowered.cost_analysis() or {}).get("flops", np.nan))


@partial(jax.jit, static_argnums=0)
def _answers(apply: Apply, params: PyTree, pixels: Array) -> Array:
    """The class that each seed's model names, one seed after another (S, B)."""
    one = lambda params: jax.lax.argmax(read(apply, params, pixels), 1, jnp.int32)
    return jax.lax.map(one, params)


def with_positions(params: PyTree, change: Callable[[Array], Array]) -> PyTree:
    """The parameters of all seeds with other learned positions."""

    def changed(path: Any, x: Array) -> Array:
        named = jax.tree_util.keystr(path, simple=True, separator="/").startswith("position/")
        return jax.vmap(change)(x) if named else x

    return jax.tree.map_with_path(changed, params)


def fitted(positions: Array, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Array:
    """Learned positions for the grid `new`: those of the grid `old`, interpolated."""
    return rnnattn.resample_grid(positions, old, new, prefix_tokens=prefix)


def unfitted(positions: Array, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Array:
    """Learned positions as they are, again and again: the grid `new` is laid with the `old` one."""
    rows, columns = (np.arange(n) % m for n, m in zip(new, old, strict=True))
    places = (rows[:, None] * old[1] + columns).ravel()
    return jnp.concatenate([positions[:prefix], positions[prefix:][places]])


def check(config: Config) -> None:
    """Raise a `UsageError` if the data or the model will not do."""
    if config.seed + config.runs > 2**32:
        raise UsageError(
            f"runs: the last seed, {config.seed} + {config.runs} − 1, should be less than {2**32}"
        )
    if "learned" not in config.schemes:
        raise UsageError('schemes: should have "learned", with which the others are compared')
    data = load_images(config.data, 0, "float32")
    whole, classes = data.test.pixels.shape[1:], len(data.classes)
    if whole[0] % 2 or whole[1] % 2:
        raise UsageError(f"vit_resolution: images of {whole[:2]} pixels have no half size")
    for method in (*config.schemes, "conv"):
        model = model_of(config, method)
        check_model(model, (whole[0] // 2, whole[1] // 2, whole[2]), classes)
        params, apply = functional(check_model(model, whole, classes))
        batch = memory.rows_like(data.train, config.batch_size)
        of_one = memory.of_training(TrainConfig(), loss_of(apply), params, batch)
        needed = config.runs * of_one + memory.size_of(data[:3])
        memory.check(needed, f"training {config.runs} models at once")


def run(config: Config, session: Session = SILENT) -> Result:
    """Train and move everything with all seeds, and count what it cost."""
    study = Study(config)
    half, whole, steps, rate = study.half, study.whole, config.steps, config.learning_rate
    accuracies: dict[tuple[str, str], np.ndarray] = {}

    def keep(method: str, phase: str, network: Network, params: PyTree, view: View) -> None:
        accuracies[method, phase] = found = study.accuracy(network, params, view)
        for seed, accuracy in zip(study.seeds, found, strict=True):
            where: dict[str, str | float] = {"split": "test", "method": method, "phase": phase}
            session.log(where | {"step": steps, "seed": seed, "accuracy": float(accuracy)})

    def learn(method: str, network: Network, shape: Shape) -> Training:
        trained = study.train(network, study.weights(method, shape), "small", steps, rate)
        keep(method, "small", network, trained.params, "small")
        return trained

    def tune(method: str, network: Network, params: PyTree, view: View = "whole") -> Training:
        tuned = study.train(network, params, view, config.tune_steps, config.tune_learning_rate)
        keep(method, "tuned", network, tuned.params, view)
        return tuned

    grid, large = study.network("learned", half), study.network("learned", whole)
    sizes = grid.model.grid(half[:2]), grid.model.grid(whole[:2]), grid.model.prefix
    small = learn("learned", grid, half)
    moved = with_positions(small.params, lambda x: fitted(x, *sizes))
    keep("learned", "moved", large, moved, "whole")
    repeated = with_positions(small.params, lambda x: unfitted(x, *sizes))
    keep("learned", "unfitted", large, repeated, "whole")
    tuned = tune("learned", large, moved)
    tune("crop", grid, small.params, "crop")

    for method in (*config.schemes, "none"):
        if method != "learned":
            # what knows the small images' size is stretched to it, and else goes on counting
            network = study.network(method, half)
            params = learn(method, network, half).params
            keep(method, "moved", network, params, "whole")
            if method != "none":
                keep(method, "unfitted", study.network(method, whole), params, "whole")

    stem = study.network("conv", half)
    params = learn("conv", stem, half).params
    keep("conv", "moved", stem, params, "whole")
    tune("conv", stem, params)

    padded = learn("pad", padding(large, whole[:2]), whole)
    tune("pad", large, padded.params)

    flops = study.flops(grid, "small"), study.flops(large, "whole")
    # as many operations as all steps on small images and those of tuning come to
    equal_steps = max(1, round(steps * flops[0] / flops[1] + config.tune_steps))
    weights = study.weights("learned", whole)
    alone = study.train(large, weights, "whole", equal_steps, rate)
    keep("learned", "equal compute", large, alone.params, "whole")

    methods, phases = zip(*accuracies, strict=True)
    count = lambda network, shape: network.model.stem(jnp.zeros((1, *shape), jnp.float32)).shape[1]
    return Result(
        methods=np.array(methods),
        phases=np.array(phases),
        accuracies=np.array(list(accuracies.values())),
        chance=np.array(np.bincount(study.test.labels).max() / len(study.test.labels)),
        step_flops=np.array(flops),
        step_bytes=np.array([training.bytes for training in (small, tuned)]),
        step_seconds=np.array(
            [[_seconds(training.again) for training in (small, tuned)] for _ in range(TIMED)]
        ),
        padding_effects=_padding_effects(study, large, padded.params),
        tokens=np.array([[count(n, shape) for shape in (half, whole)] for n in (stem, grid)]),
        **_pictures(study, [(grid, small.params), (large, moved), (large, tuned.params)]),
        scores={
            f"{method}_{phase.replace(' ', '_')}_accuracy": float(values.mean())
            for (method, phase), values in accuracies.items()
        }
        | {"equal_compute_steps": equal_steps, **study.origin},
    )


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _first(params: PyTree) -> PyTree:
    """The parameters of the first seed."""
    return jax.tree.map(lambda x: x[0], params)


def _padding_effects(study: Study, network: Network, params: PyTree) -> np.ndarray:
    """How much logits change if what pads the small images is noise: with the mask, and without."""
    pixels = jnp.asarray(shown(study.test.pixels[:20], "small"))
    zeros, valid = rnnattn.crop_and_pad(pixels, study.whole[:2])
    noise = np.random.default_rng(0).random(zeros.shape, np.float32)
    noisy = jnp.where(valid[..., None], zeros, noise)
    read = jax.jit(partial(network.apply, _first(params)))
    return np.array([
        float(jnp.max(jnp.abs(read(noisy, valid=mask) - read(zeros, valid=mask))))
        for mask in (valid, None)
    ])  # fmt: skip


def _pictures(study: Study, models: Sequence[tuple[Network, PyTree]]) -> dict[str, np.ndarray]:
    """Positions and attention of the first seed's learned grid: as trained, moved, and tuned."""
    _, chosen = np.unique(study.test.labels, return_index=True)
    whole = study.test.pixels[chosen[:SHOWN]]
    pictures = {"images_small": shown(whole, "small"), "images_whole": whole}
    for phase, (network, params) in zip(("small", "moved", "tuned"), models, strict=True):
        pixels = pictures["images_small" if phase == "small" else "images_whole"]
        params, model = _first(params), nnx.clone(network.model)
        nnx.update(model, params)
        attention = attention_received(model, network.apply, params, jnp.asarray(pixels))
        pictures[f"attention_{phase}"] = attention[:, -1].mean(axis=1)
        pictures[f"similarity_{phase}"] = position_similarity(model, pixels.shape[1:3])
    return pictures


# ---- claims -------------------------------------------------------------------------------------


def accuracy_of(result: Result, method: str, phase: str) -> np.ndarray:
    """On the test images, of each seed's training."""
    (row,) = np.flatnonzero((result.methods == method) & (result.phases == phase))
    return result.accuracies[row]


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """What the trainings say of V3 to V6."""
    several = (
        _low_then_high(result),
        _positions_must_fit(config, result),
        _crop_and_pad(result),
        _by_convolutions(result),
    )
    return tuple(map(_with_power, several))


def _low_then_high(result: Result) -> Claim:
    at = partial(accuracy_of, result, "learned")
    (flops, whole_flops), (used, whole_used) = result.step_flops, result.step_bytes
    seconds = result.step_seconds[:, 0] / result.step_seconds[:, 1]
    return Claim(
        "V3",
        r"\text{accuracy}(\text{small, then tuned on large}) >"
        r"\text{accuracy}(\text{large alone, equal operations})",
        "Trained on small images and tuned on whole ones, a model with a learned grid reads more "
        "test images than one trained on whole ones alone with as many operations, and than on "
        "small ones before; a step on small images takes fewer operations, less memory and less "
        "time.",
        (
            _gain(
                "gain over whole images alone at equal operations",
                at("tuned") - at("equal compute"),
            ),
            _gain("gain by tuning on whole images", at("tuned") - at("small")),
            below("operations of a step, small images over whole", 1, Exact(flops / whole_flops)),
            below("memory of a step, small images over whole", 1, Exact(used / whole_used)),
            below("time of a step, small images over whole", 1, Mean.of_normal(seconds)),
        ),
        note="What falls is the number of patches, a word that the print lost; of the parameters "
        "only the table of positions is smaller.",
        printed_equation=r"\text{pre-training in small dimensions lowers (…), so that speed and "
        r"memory improve; fine-tuning at a higher resolution helps generalisation}",
    )  # fmt: skip


def _positions_must_fit(config: Config, result: Result) -> Claim:
    at, chance = partial(accuracy_of, result), float(result.chance)

    def kept(method: str, phase: str) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (at(method, phase) - chance) / (at(method, "small") - chance)
        return np.where(np.isfinite(share), share, np.nan)

    # a model that reads nothing any more has lost what it had, however much the move would cost
    if Mean.of_normal(at("none", "moved") - chance).interval(LEVEL).low > 0:
        rows = (("none", "moved"), ("learned", "unfitted"), ("learned", "moved"))
        shares = [kept(*row) for row in rows]
        excess = shares[0] - shares[1]
        beside = (
            "Of its accuracy above chance a model without positions keeps {:.0%} in the move, the "
            "unfitted grid {:.0%}, the fitted one {:.0%}."
        ).format(*map(np.mean, shares))
    else:
        excess = np.full(config.runs, np.nan)
        beside = (
            "A model without positions reads no more than by chance after the move: what it lost "
            "cannot be compared."
        )
    cost = at("learned", "small") - at("learned", "unfitted")
    cost_without = at("none", "small") - at("none", "moved")
    return Claim(
        "V4",
        r"\text{cost}(\text{move, positions unfitted}) >"
        r"\text{cost}(\text{move, without positions}),\quad"
        r"\text{accuracy}(\text{fitted}) > \text{accuracy}(\text{unfitted})",
        "Of its accuracy above chance, a model whose learned grid is repeated over the whole "
        "images loses a larger share by the move than one without positions, from whose patches "
        "the move takes the same; and a model reads more test images with its positions fitted "
        "(interpolated, stretched) than with the same positions unfitted (repeated, counted on).",
        (
            _gain("share lost by the move, unfitted grid less no positions", excess),
            *(
                _gain(f"{MOVES[scheme]}: gain by fitting, not tuned",
                      at(scheme, "moved") - at(scheme, "unfitted"))
                for scheme in config.schemes
            ),
        ),
        note="The model without positions tells what it costs that a patch of the same size sees "
        "half as much of the image.",
        beside=f"{beside} In accuracy the unfitted grid loses {_interval(cost - cost_without)} "
        "more.",
        printed_equation=r"\text{a new (…) that fits the new dimensions may be needed}",
    )  # fmt: skip


def _crop_and_pad(result: Result) -> Claim:
    at = partial(accuracy_of, result)
    masked, unmasked = result.padding_effects
    grid = at("learned", "tuned")
    beside = "; ".join(
        f"{MOVES[method]}, {_interval(at(method, 'tuned') - grid)}" for method in ("pad", "crop")
    )
    of_padding = at("pad", "small") - at("learned", "small")
    after_padding = at("pad", "tuned") - at("pad", "small")
    after_cropping = at("crop", "tuned") - at("learned", "small")
    return Claim(
        "V5",
        r"\text{accuracy}(\text{at the wanted size}) >"
        rf"\text{{accuracy}}(\text{{before}}) - {MARGIN}",
        f"Up to {MARGIN} of accuracy, small images that are padded to the size of whole ones are "
        "read as well as by a model of their own size, and then, after tuning, whole ones as well "
        "as those before; what the padding holds changes no logit, as it does without the mask. "
        "Whole images cropped to the small size are not read as well as small ones.",
        (
            _gain("padded small images, less small ones", of_padding, -MARGIN),
            _gain("whole images, tuned, less padded small ones", after_padding, -MARGIN),
            equal("largest change of a logit by what the padding holds", 0, Exact(masked), unmasked,
                  "without the mask"),
        ),
        beyond=(
            _gain("cropped whole images, tuned, less small ones", after_cropping, -MARGIN),
        ),
        note="Condition: nothing is cut off that is to be read; a crop to half the side leaves a "
        "quarter of the pixels.",
        beside=f"Accuracy less that of the interpolated grid, all tuned: {beside}; tuned on whole "
        f"images, that grid reads {_interval(grid - at('learned', 'small'))} more than before, on "
        "small ones.",
        printed_equation=r"\text{proposed: crop and pad the input to reach the wanted dimensions}",
    )  # fmt: skip


def _by_convolutions(result: Result) -> Claim:
    at = partial(accuracy_of, result)
    (small, whole), (_, patches) = result.tokens
    changes = {
        phase: (at("conv", phase) - at("conv", "small"))
        - (at("learned", phase) - at("learned", "small"))
        for phase in ("moved", "tuned")
    }
    reads = _interval(at("conv", "tuned") - at("learned", "tuned"))
    return Claim(
        "V6",
        r"\Delta\text{accuracy}(\text{CNN}) > \Delta\text{accuracy}(\text{interpolated grid})"
        rf"- {MARGIN},\quad \Delta = \text{{after the move}} - \text{{before}}",
        "Strided convolutions bring an image of either size to one number of tokens, and after the "
        "move and as many steps of tuning a model with them has lost no more of its own accuracy "
        f"than one with the interpolated grid, up to {MARGIN}.",
        (
            _gain("change of accuracy by move and tuning, less that of the grid", changes["tuned"],
                  -MARGIN),
            equal("tokens of a whole image", small, Exact(whole), patches, "patches"),
        ),
        beside=f"Without tuning the same difference is {_interval(changes['moved'])}. Accuracy "
        f"less that of the grid, both tuned: {reads}, which is of the architecture and not of the "
        "move.",
        printed_equation=r"\text{proposed: CNNs, to reach the wanted dimensions of the input}",
    )  # fmt: skip


def _gain(name: str, samples: np.ndarray, bound: float = 0.0) -> Evidence:
    """That the mean over trainings is above the bound."""
    mean = Mean.of_normal(samples)
    # accuracies are shares of so many images, and those of a few trainings may well be alike
    return above(name, bound, mean if mean.error > 1e-9 else mean._replace(error=np.nan))


def _interval(samples: np.ndarray) -> str:
    value, low, high = Mean.of_normal(samples).interval(LEVEL)
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _with_power(claim: Claim) -> Claim:
    """The claim, which says as well which differences so many trainings can see at its level."""
    seen = ", ".join(
        f"{smallest_seen(e.measured, claim.level):.3f} ({e.name})"
        for e in (*claim.right, *claim.beyond)
        if isinstance(e.measured, Mean) and e.relation == ">"
    )
    power = f" A distance from the bound that so many seeds see with {POWER:.0%} probability: "
    return replace(claim, beside=f"{claim.beside}{power}{seen}.".strip())


def smallest_seen(mean: Mean, level: float) -> float:
    """How far from a bound the true mean has to be to be told from it with probability `POWER`."""
    degrees = mean.number - 1
    return float((stats.t.isf(level / 2, degrees) + stats.t.ppf(POWER, degrees)) * mean.error)


# ---- figure -------------------------------------------------------------------------------------


def plot(config: Config, result: Result) -> "Figure":
    """Accuracy by way and phase, what the claims rest on, and positions and attention."""
    from experiments.figures import BLACK, BLUE, before_and_after, new_figure, phases_by_method

    figure = new_figure(12.5, 11)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 0.95))[:, 0]
    left, right = upper.subplots(1, 2)
    phases_by_method(left, result.methods, result.phases, result.accuracies, MOVES)

    rows = [
        (claim.id, judged)
        for claim in claims(config, result)
        for several in claim.evidence.values()
        for judged in several
        if judged.relation == ">"
    ]
    for y, (_, e) in enumerate(rows):
        right.plot([e.low, e.high], [y, y], color=BLUE)
        right.plot(e.measured, y, "o", color=BLUE)
        right.plot([e.predicted] * 2, [y - 0.4, y + 0.4], color=BLACK)
    labels = [textwrap.fill(f"{id_}: {e.name}", 40) for id_, e in rows]
    right.set_yticks(range(len(rows)), labels, fontsize=7)
    right.set(xlabel="measured with its interval, and the bound", ylim=(len(rows) - 0.5, -0.5))
    right.grid(alpha=0.3, axis="x")
    titles = [f"{side} × {side}{how}" for side, how in (
        (result.images_small.shape[1], ", as trained"), (result.images_whole.shape[1], ", moved"),
        (result.images_whole.shape[1], ", tuned"))]  # fmt: skip
    before_and_after(
        lower,
        titles,
        [result.images_small, result.images_whole, result.images_whole],
        [result.attention_small, result.attention_moved, result.attention_tuned],
        [result.similarity_small, result.similarity_moved, result.similarity_tuned],
    )
    return figure
