"""What a vision transformer trained on small images makes of large ones (notes, V1–V6).

Images are shrunk to half their size by area means. A model trained on those is moved to the whole
images in several ways, used as it is, and tuned for a few steps; beside it stand models trained on
the whole images from the start, with as many operations in all, and with as many steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rnnattn
from experiments.claims.vit_resolution import verdicts
from experiments.claims.vit_resolution.moves import (
    MOVES,
    Method,
    Network,
    configs_of,
    make_networks,
    move,
    shrink,
)
from experiments.claims.vit_resolution.verdicts import Result
from experiments.data.images import Images, image_batches
from experiments.data.sources import DataConfig, load_images
from experiments.engine.config import Count, Positive, Seed, Size, UsageError, on_same_data
from experiments.engine.cost import Row, count, step_cost, table
from experiments.engine.devices import ParallelConfig
from experiments.engine.session import SILENT, Session
from experiments.engine.training import TrainConfig, fit, make_optimizer
from experiments.models.vit import (
    ViTConfig,
    attention_received,
    build,
    check_memory,
    check_model,
    functional,
    position_similarity,
    read,
)
from experiments.report.evidence import Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = {
    "V1": "An image is a sequence of patches",
    "V2": "Another image size is another number of patches",
    "V3": "Train at low resolution, tune at high resolution",
    "V4": "Positions have to be fitted to a new image size",
    "V5": "Crop and pad the image to the wanted size",
    "V6": "A CNN brings the image to the wanted size",
}

PHASES = ("small", "moved", "tuned", "equal compute", "equal steps")
"""Trained on small images and read on them; moved; tuned; and trained on whole images alone."""

SHOWN = 3
"""Test images whose attention is kept."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: a minute on two cores, with no download."""

    seed: Seed = 0
    """The first random seed."""
    runs: Size = 1
    """Number of seeds; each has its own split, initial weights and order of the data."""
    tune_steps: Count = 40
    """Fine-tuning steps on full-size images after moving a model."""
    tune_learning_rate: Positive = 2e-3
    """Peak learning rate of the fine-tuning."""
    methods: tuple[Method, ...] = get_args(Method)
    """The ways to be tried; a claim about one that is not is undecided. The first is needed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=lambda: ViTConfig(patch_size=1, width=24, depth=2))
    """The model; its position and stem are those of each way to move it."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=250, batch_size=32, learning_rate=4e-3)
    )
    """Training on small images, and on full-size ones from scratch."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


TINY = Config(
    tune_steps=2,
    methods=("learned", "pad"),
    model=ViTConfig(width=8),
    train=TrainConfig(steps=4, batch_size=4, log_every=2, evaluate_every=2),
)


class Training(NamedTuple):
    """What a model has been through: its parameters, and what they cost."""

    params: Any
    steps: tuple[int, int]
    flops: float
    peak_bytes: float
    seconds: float


def check(config: Config) -> None:
    """Raise a `UsageError` if the data or the model will not do."""
    data = load_images(config.data, config.seed, "float32")
    rows, columns, channels = data.train.pixels.shape[1:]
    if rows % 2 or columns % 2:
        raise UsageError(f"vit_resolution: images of {rows, columns} pixels have no half size")
    if len(set(data.test.labels)) < 9:
        raise UsageError("vit_resolution: needs test images of nine classes, for its figure")
    if config.seed + config.runs > 2**32:
        raise UsageError(
            f"runs: the last seed, {config.seed} + {config.runs} − 1, should be less than {2**32}"
        )
    if "learned" not in config.methods:
        raise UsageError('--methods: "learned" is needed: the others are compared with it')
    # several methods move the same model
    for small, whole in dict.fromkeys(configs_of(config.model, each) for each in config.methods):
        check_model(small, (rows // 2, columns // 2, channels), len(data.classes))
        model = check_model(whole, (rows, columns, channels), len(data.classes))
        check_memory(model, data[:3], config.train)


def quick(config: Config) -> Config:
    """The defaults on the images of `config`, of which those of MNIST need its larger patches."""
    small = on_same_data(config)
    if config.data.source == "digits":
        return small
    return replace(small, model=replace(small.model, patch_size=config.model.patch_size))


def run(config: Config, session: Session = SILENT) -> Result:
    """Train and move everything with each seed, and count what it cost."""
    data = load_images(config.data, config.seed, "float32")
    shape = data.train.pixels.shape[1:]
    networks = make_networks(config.model, config.methods, shape, len(data.classes))
    # a step is compiled once for all seeds if its optimiser is one object
    optimizer_of = cache(make_optimizer)
    studies = [
        _study(config, networks, optimizer_of, config.seed + n, session) for n in range(config.runs)
    ]
    first = studies[0]
    keys = list(first)
    correct = np.array([[study[key].correct for study in studies] for key in keys])
    rows = []
    for key, of_seeds in zip(keys, correct, strict=True):
        seconds = float(np.mean([study[key].training.seconds for study in studies]))
        training = first[key].training
        rows.append(
            Row(
                _title(*key),
                of_seeds.mean(axis=1),
                count(training.params),
                seconds,
                training.flops,
                training.peak_bytes,
            )
        )
    models = [first[key].network.model for key in keys]
    return Result(
        methods=np.array([method for method, _ in keys]),
        phases=np.array([phase for _, phase in keys]),
        correct=correct,
        steps=np.array([first[key].training.steps for key in keys]),
        flops=np.array([row.flops for row in rows]),
        peak_bytes=np.array([row.peak_bytes for row in rows]),
        parameters=np.array([row.parameters for row in rows]),
        tokens=np.array([first[key].tokens for key in keys]),
        patch_values=np.array([int(np.prod(model.patch_size)) for model in models]),
        sizes=np.array([shape[0] // 2, shape[0]]),
        padding_effect=_padding_effect(data.test, config.seed, first.get(("pad", "small"))),
        **_pictures(data.test, networks["learned"], first),
        table=table(rows),
        scores=_scores(keys, rows) | data.origin,
    )


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """What the study says of V1 to V6."""
    return verdicts.claims(result, config.model.patch_size)


class Outcome(NamedTuple):
    """One row of the study, with one seed."""

    network: Network
    training: Training
    correct: np.ndarray
    tokens: int


def _study(
    config: Config,
    networks: dict[str, tuple[Network, Network]],
    optimizer_of: Callable[[TrainConfig], optax.GradientTransformation],
    seed: int,
    session: Session,
) -> dict[tuple[str, str], Outcome]:
    """Everything with one seed, by method and phase."""
    data = load_images(config.data, seed, "float32")
    test, size = data.test, config.train.batch_size
    shift, flip = config.data.shift, config.data.flip
    whole_batch = image_batches(data.train, seed, size, shift=shift, flip=flip)
    key = jax.random.key(seed)
    outcomes: dict[tuple[str, str], Outcome] = {}

    def small_batch(step: int) -> Images:
        images = whole_batch(step)
        return images._replace(pixels=shrink(images.pixels))

    def initial(network: Network) -> Training:
        params, _ = functional(build(network.config, network.shape, network.classes, seed))
        return Training(params, (0, 0), 0.0, 0.0, 0.0)

    # the study logs what each training comes to
    quiet = replace(session, log=SILENT.log)

    def train(
        name: str, network: Network, before: Training, steps: int, small: bool, rate: float
    ) -> Training:
        plan = replace(
            config.train, steps=steps, learning_rate=rate, log_every=steps, evaluate_every=steps
        )
        optimizer = optimizer_of(plan)
        batch, start = small_batch if small else whole_batch, before.params
        cost = step_cost(
            network.loss, start, optimizer, batch(0), key, accumulate=config.train.accumulate
        )
        trained = fit(
            network.loss,
            start,
            optimizer,
            batch,
            key,
            plan,
            evaluations={},
            final={},
            session=quiet,
            name=f"seed {seed}, {name}",
        )
        return Training(
            trained.params,
            (before.steps[0] + steps * small, before.steps[1] + steps * (not small)),
            before.flops + steps * cost.flops,
            max(before.peak_bytes, cost.peak_bytes),
            before.seconds + trained.train_seconds,
        )

    def keep(method: str, phase: str, network: Network, training: Training, small: bool) -> None:
        pixels = jnp.asarray(shrink(test.pixels) if small else test.pixels)
        logits = np.asarray(_read(network.apply, training.params, pixels))
        correct = logits.argmax(axis=1) == test.labels
        tokens = jax.eval_shape(
            lambda p: network.apply(p, pixels[:1], capture=True)[1].embedded, training.params
        ).shape[1] - network.model.prefix  # fmt: skip
        outcomes[method, phase] = Outcome(network, training, correct, tokens)
        session.log(
            {
                "step": sum(training.steps),
                "split": "test",
                "method": method,
                "phase": phase,
                "seed": seed,
                "accuracy": float(correct.mean()),
            }
        )

    rate, steps = config.train.learning_rate, config.train.steps
    for method, (small, whole) in networks.items():
        same = [o for o in outcomes.values() if o.network is small and o.training.steps[1] == 0]
        before = (
            same[0].training
            if same
            else train(f"{method}, small", small, initial(small), steps, True, rate)
        )
        keep(method, "small", small, before, True)
        params = move(method, small, whole, before.params)
        keep(method, "moved", whole, before._replace(params=params), False)
        start = before._replace(params=params)
        tuned = train(
            f"{method}, tuned", whole, start, config.tune_steps, False, config.tune_learning_rate
        )
        keep(method, "tuned", whole, tuned, False)
        if method not in ("crop", "pad"):
            for phase in ("equal compute", "equal steps"):
                total = steps + config.tune_steps
                if phase == "equal compute":
                    of_step = (tuned.flops - before.flops) / config.tune_steps
                    total = max(1, round(tuned.flops / of_step))
                trained = train(f"{method}, {phase}", whole, initial(whole), total, False, rate)
                keep(method, phase, whole, trained, False)
    return outcomes


_read = jax.jit(read, static_argnums=0)


def _padding_effect(test: Images, seed: int, outcome: Outcome | None) -> np.ndarray:
    """How much logits change when what pads the small images is noise, and not zeros."""
    if outcome is None:
        return np.array(np.nan)
    pixels = shrink(test.pixels[:20])
    fitted, valid = rnnattn.crop_and_pad(jnp.asarray(pixels), outcome.network.shape[:2])
    noise = np.random.default_rng(seed).random(fitted.shape, np.float32)
    noisy = jnp.where(valid[..., None], fitted, noise)
    _, plain = functional(outcome.network.model)
    read = jax.jit(lambda x: plain(outcome.training.params, x, valid=valid))
    return np.asarray(jnp.max(jnp.abs(read(noisy) - read(fitted))))


def _pictures(
    test: Images,
    networks: tuple[Network, Network],
    outcomes: dict[tuple[str, str], Outcome],
) -> dict[str, np.ndarray]:
    """Positions and attention of the model with learned positions, before and after."""
    _, chosen = np.unique(test.labels, return_index=True)
    whole = test.pixels[chosen[[2, 4, 8]][:SHOWN]]
    pictures = {"images_small": shrink(whole), "images_whole": whole}
    for phase in ("small", "moved", "tuned"):
        network = networks[phase != "small"]
        images = pictures["images_small" if phase == "small" else "images_whole"]
        params = outcomes["learned", phase].training.params
        model = nnx.clone(network.model)
        nnx.update(model, params)
        attention = attention_received(model, network.apply, params, jnp.asarray(images))
        pictures[f"attention_{phase}"] = attention[:, -1].mean(axis=1)
        pictures[f"similarity_{phase}"] = position_similarity(model, images.shape[1:3])
    return pictures


def _title(method: str, phase: str) -> str:
    """The row's name in the table."""
    what = {
        "small": "small images",
        "moved": "moved, not tuned",
        "tuned": "moved and tuned",
        "equal compute": "whole images, equal compute",
        "equal steps": "whole images, equal steps",
    }
    return f"{MOVES[method]}: {what[phase]}"


def _scores(keys: list[tuple[str, str]], rows: list[Row]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for (method, phase), row in zip(keys, rows, strict=True):
        name = f"{method}_{phase.replace(' ', '_')}"
        scores[f"{name}_accuracy"] = float(np.mean(row.accuracy))
        if len(row.accuracy) > 1:
            scores[f"{name}_accuracy_deviation"] = float(np.std(row.accuracy, ddof=1))
        costs = {"flops": row.flops, "peak_bytes": row.peak_bytes, "train_seconds": row.seconds}
        scores |= {f"{name}_{what}": value for what, value in costs.items() if np.isfinite(value)}
    return scores


# ---- figure -----------------------------------------------------------------------------------


def plot(config: Config, result: Result) -> "Figure":
    """Accuracy by way and phase, accuracy against operations, positions and attention."""
    from experiments.figures import before_and_after, new_figure, phases_by_cost, phases_by_method

    figure = new_figure(12.5, 10.5)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.05))[:, 0]
    left, right = upper.subplots(1, 2, width_ratios=(1.25, 1))
    accuracy = result.correct.mean(axis=2)
    phases_by_method(left, result.methods, result.phases, accuracy, MOVES)
    phases_by_cost(right, result.methods, result.phases, accuracy.mean(axis=1), result.flops)
    titles = [f"{n} × {n}{how}" for n, how in zip(
        result.sizes[[0, 1, 1]], (", as trained", ", moved", ", tuned"), strict=True)]  # fmt: skip
    before_and_after(
        lower,
        titles,
        [result.images_small, result.images_whole, result.images_whole],
        [result.attention_small, result.attention_moved, result.attention_tuned],
        [result.similarity_small, result.similarity_moved, result.similarity_tuned],
    )
    return figure
