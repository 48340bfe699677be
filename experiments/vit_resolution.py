"""What a vision transformer trained on small images makes of large ones (notes, V1–V6).

Images are shrunk to half their size by area means. A model trained on those is moved to the whole
images in several ways, used as it is, and tuned for a few steps; beside it stand models trained on
the whole images from the start, with as many operations in all, and with as many steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rnnattn
from experiments.claims import Claim, Evidence, above, below, equal, known, mean_interval, share
from experiments.config import Count, Positive, Seed, UsageError
from experiments.cost import Row, count, step_cost, table
from experiments.digits import Digits, digits_batch
from experiments.images import DataConfig, load_images
from experiments.training import Loss, Record, TrainConfig, fit, ignore, make_optimizer
from experiments.vit import (
    ViTConfig,
    attention_received,
    build,
    check_model,
    functional,
    loss_of,
    position_similarity,
    read,
)
from rnnattn.nn import ViT, load_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMS = ("V1", "V2", "V3", "V4", "V5", "V6")

LABELS: dict[str, str] = {}
"""One record for each model trained: no curve."""

PHASES = ("small", "moved", "tuned", "equal compute", "equal steps")
"""Trained on small images and read on them; moved; tuned; and trained on whole images alone."""

Method = Literal["learned", "sincos2d", "rope2d", "crop", "pad", "conv", "kernel"]

MOVES = {
    "learned": "learned grid, interpolated",
    "sincos2d": "2-D sinusoids, stretched",
    "rope2d": "2-D rotary, stretched",
    "crop": "cropped to the small size",
    "pad": "padded small images, masked",
    "conv": "convolutional stem",
    "kernel": "patch kernel, resized",
}
"""The ways from small images to large ones."""

SHOWN = 3
"""Test images whose attention is kept."""


@dataclass(frozen=True)
class Config:
    """The defaults are the size of the quick report: a minute on two cores, with no download."""

    seed: Seed = 0
    """The first of the seeds."""
    runs: Count = 1
    """Seeds that everything is repeated with; each draws split, weights and order anew."""
    tune_steps: Count = 40
    """Steps on whole images of a model that was moved."""
    tune_learning_rate: Positive = 2e-3
    """Highest learning rate of those."""
    methods: tuple[Method, ...] = get_args(Method)
    """The ways to be tried; a claim about one that is not is undecided. The first is needed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=lambda: ViTConfig(patch_size=1, width=24, depth=2))
    """The model; its position and stem are those of each way to move it."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=250, batch_size=32, learning_rate=4e-3)
    )
    """Training on small images, and on whole ones from the start."""


class Result(NamedTuple):
    """What each way reached, in rows (R), with every seed (S) and test image (I); and pictures."""

    methods: np.ndarray
    phases: np.ndarray
    correct: np.ndarray
    """Whether an image was read correctly (R, S, I)."""
    steps: np.ndarray
    """On small images and on whole ones (R, 2)."""
    flops: np.ndarray
    """Of all training (R,)."""
    peak_bytes: np.ndarray
    """Of the costliest step of it (R,)."""
    parameters: np.ndarray
    tokens: np.ndarray
    """Of an image as the model reads it (R,), and below the values of one patch."""
    patch_values: np.ndarray
    sizes: np.ndarray
    """Sides of the small images and of the whole ones, and of a patch, in pixels."""
    padding_effect: np.ndarray
    """Largest change of a logit when the padding holds something else (V5)."""
    similarity_small: np.ndarray
    """Of learned positions: as trained, interpolated, and tuned."""
    similarity_moved: np.ndarray
    similarity_tuned: np.ndarray
    images_small: np.ndarray
    images_whole: np.ndarray
    attention_small: np.ndarray
    """In the last block of the model with learned positions (images, rows, columns)."""
    attention_moved: np.ndarray
    attention_tuned: np.ndarray
    table: str
    verdicts: str
    scores: dict[str, Any]


class Network(NamedTuple):
    """A model whatever its weights, and how it takes its images."""

    config: ViTConfig
    size: tuple[int, int]
    """Of the images that its positions refer to."""
    model: ViT
    apply: Callable[..., Any]
    loss: Loss


class Training(NamedTuple):
    """What a model has been through: its parameters, and what they cost."""

    params: Any
    steps: tuple[int, int]
    flops: float
    peak_bytes: float
    seconds: float


def shrink(images: np.ndarray) -> np.ndarray:
    """Images (B, rows, columns) at half their size: the mean of each 2 × 2 pixels."""
    B, rows, columns = images.shape
    return images.reshape(B, rows // 2, 2, columns // 2, 2).mean(axis=(2, 4), dtype=images.dtype)


def make_network(
    config: ViTConfig, size: tuple[int, int], fit_to: tuple[int, int] | None = None
) -> Network:
    """The network whose positions refer to images of `size`.

    Args:
        fit_to: all images are cropped and padded to it, and the padding is masked.
    """
    model = build(config, size)
    _, plain = functional(model)

    def apply(params, images, key=None, **options):
        if fit_to is None:
            return plain(params, images, key, **options)
        fitted, valid = rnnattn.crop_and_pad(images[..., None], fit_to)
        return plain(params, fitted[..., 0], key, valid=valid, **options)

    return Network(config, size, model, apply, loss_of(apply))


def make_networks(config: Config, size: tuple[int, int]) -> dict[str, tuple[Network, Network]]:
    """By method, the networks for small images and for whole ones of `size`."""
    half = (size[0] // 2, size[1] // 2)
    # methods that share a network share its training and its compiled steps
    network = cache(make_network)
    networks: dict[str, tuple[Network, Network]] = {}
    for method in config.methods:
        small, whole = _configs(config, method)
        if method == "pad":
            both = network(whole, size, fit_to=size)
            networks[method] = both, both
        elif method == "crop":
            networks[method] = network(small, half), network(small, half, fit_to=half)
        else:
            # the stem's grid, and what sinusoids and rotations are stretched to, stay those of
            # small images
            own = size if method in ("learned", "kernel") else half
            networks[method] = network(small, half), network(whole, own)
    return networks


def move(method: str, small: Network, whole: Network, params: Any) -> Any:
    """The parameters of the network for small images, for that of whole ones."""
    tree = nnx.to_pure_dict(params)
    if method == "kernel":
        kernel = tree["stem"]["kernel"]
        tree["stem"]["kernel"] = rnnattn.resize_patch_kernel(kernel, whole.model.patch_size)
    if method == "learned":
        old, new = (network.model.grid(network.size) for network in (small, whole))
        position, prefix = tree["position"], small.model.prefix
        tree["position"] = rnnattn.resample_grid(position, old, new, prefix_tokens=prefix)
    model = nnx.clone(whole.model)
    load_weights(model, tree)
    return functional(model)[0]


def check(config: Config) -> None:
    """Raise a `UsageError` if the data or the model will not do."""
    train, _, _ = load_images(config.data, config.seed, "float32")
    size = train.images.shape[1:]
    if size[0] % 2 or size[1] % 2:
        raise UsageError(f"vit_resolution: images of {size} pixels have no half size")
    if "learned" not in config.methods:
        raise UsageError('--methods: "learned" is needed: the others are compared with it')
    for method in config.methods:
        small, whole = _configs(config, method)
        check_model(small, (size[0] // 2, size[1] // 2))
        check_model(whole, size)


def _configs(config: Config, method: str) -> tuple[ViTConfig, ViTConfig]:
    """The model for small images, and that for whole ones."""
    position = method if method in ("sincos2d", "rope2d") else "learned"
    stem = "conv" if method == "conv" else "patch"
    small = replace(config.model, position=position, stem=stem)  # type: ignore[arg-type]
    larger = 2 * small.patch_size if method == "kernel" else small.patch_size
    return small, replace(small, patch_size=larger)


def run(config: Config, log: Callable[[Record], None] = ignore) -> Result:
    """Train and move everything with each seed, and count what it cost."""
    size = load_images(config.data, config.seed, "float32")[0].images.shape[1:]
    networks = make_networks(config, size)
    # a step is compiled once for all seeds if its optimiser is one object
    optimizer_of = cache(make_optimizer)
    studies = [
        _study(config, networks, optimizer_of, config.seed + n, log) for n in range(config.runs)
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
    result = Result(
        methods=np.array([method for method, _ in keys]),
        phases=np.array([phase for _, phase in keys]),
        correct=correct,
        steps=np.array([first[key].training.steps for key in keys]),
        flops=np.array([row.flops for row in rows]),
        peak_bytes=np.array([row.peak_bytes for row in rows]),
        parameters=np.array([row.parameters for row in rows]),
        tokens=np.array([first[key].tokens for key in keys]),
        patch_values=np.array([int(np.prod(model.patch_size)) for model in models]),
        sizes=np.array([size[0] // 2, size[0], config.model.patch_size]),
        padding_effect=_padding_effect(config, first.get(("pad", "small"))),
        **_pictures(config, networks["learned"], first),
        table=table(rows),
        verdicts="",
        scores=_scores(keys, rows),
    )
    judged = claims(config, result)
    lines = [f"{c.id}  {c.verdict}: {c.title}\n    {c.criterion}\n" + _lines(c) for c in judged]
    return result._replace(verdicts="\n".join(lines))


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
    log: Callable[[Record], None],
) -> dict[tuple[str, str], Outcome]:
    """Everything with one seed, by method and phase."""
    data, _, test = load_images(config.data, seed, "float32")
    key = jax.random.key(seed)
    outcomes: dict[tuple[str, str], Outcome] = {}

    def batch_of(small: bool) -> Callable[[int], Digits]:
        def batch(step: int) -> Digits:
            digits = digits_batch(data, seed, step, config.train.batch_size, config.data.shift)
            return digits._replace(images=shrink(digits.images)) if small else digits

        return batch

    def initial(network: Network) -> Training:
        params, _ = functional(build(network.config, network.size, seed))
        return Training(params, (0, 0), 0.0, 0.0, 0.0)

    def train(network: Network, before: Training, steps: int, small: bool, rate: float) -> Training:
        optimizer = optimizer_of(replace(config.train, steps=steps, learning_rate=rate))
        batch, start = batch_of(small), before.params
        cost = step_cost(network.loss, start, optimizer, batch(0), key)
        trained = fit(
            network.loss,
            start,
            optimizer,
            batch,
            key,
            steps=steps,
            log_every=steps,
            evaluate_every=steps,
            evaluations={},
            final={},
        )
        return Training(
            trained.params,
            (before.steps[0] + steps * small, before.steps[1] + steps * (not small)),
            before.flops + steps * cost.flops,
            max(before.peak_bytes, cost.peak_bytes),
            before.seconds + trained.train_seconds,
        )

    def keep(method: str, phase: str, network: Network, training: Training, small: bool) -> None:
        images = jnp.asarray(shrink(test.images) if small else test.images)
        logits = np.asarray(_read(network.apply, training.params, images))
        correct = logits.argmax(axis=1) == test.labels
        tokens = jax.eval_shape(
            lambda p: network.apply(p, images[:1], capture=True)[1].embedded, training.params
        ).shape[1] - network.model.prefix  # fmt: skip
        outcomes[method, phase] = Outcome(network, training, correct, tokens)
        log(
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
        before = same[0].training if same else train(small, initial(small), steps, True, rate)
        keep(method, "small", small, before, True)
        params = move(method, small, whole, before.params)
        keep(method, "moved", whole, before._replace(params=params), False)
        start = before._replace(params=params)
        tuned = train(whole, start, config.tune_steps, False, config.tune_learning_rate)
        keep(method, "tuned", whole, tuned, False)
        if method not in ("crop", "pad"):
            for phase in ("equal compute", "equal steps"):
                total = steps + config.tune_steps
                if phase == "equal compute":
                    of_step = (tuned.flops - before.flops) / config.tune_steps
                    total = max(1, round(tuned.flops / of_step))
                keep(method, phase, whole, train(whole, initial(whole), total, False, rate), False)
    return outcomes


_read = jax.jit(read, static_argnums=0)


def _padding_effect(config: Config, outcome: Outcome | None) -> np.ndarray:
    """How much logits change when what pads the small images is noise, and not zeros."""
    if outcome is None:
        return np.array(np.nan)
    images = shrink(load_images(config.data, config.seed, "float32")[2].images[:20])
    fitted, valid = rnnattn.crop_and_pad(jnp.asarray(images)[..., None], outcome.network.size)
    noise = np.random.default_rng(config.seed).random(fitted.shape, np.float32)
    noisy = jnp.where(valid[..., None], fitted, noise)
    _, plain = functional(outcome.network.model)
    read = jax.jit(lambda x: plain(outcome.training.params, x[..., 0], valid=valid))
    return np.asarray(jnp.max(jnp.abs(read(noisy) - read(fitted))))


def _pictures(
    config: Config,
    networks: tuple[Network, Network],
    outcomes: dict[tuple[str, str], Outcome],
) -> dict[str, np.ndarray]:
    """Positions and attention of the model with learned positions, before and after."""
    _, _, test = load_images(config.data, config.seed, "float32")
    _, chosen = np.unique(test.labels, return_index=True)
    whole = test.images[chosen[[2, 4, 8]][:SHOWN]]
    pictures = {"images_small": shrink(whole), "images_whole": whole}
    for phase in ("small", "moved", "tuned"):
        network = networks[phase != "small"]
        images = pictures["images_small" if phase == "small" else "images_whole"]
        params = outcomes["learned", phase].training.params
        model = nnx.clone(network.model)
        nnx.update(model, params)
        attention = attention_received(model, network.apply, params, jnp.asarray(images))
        pictures[f"attention_{phase}"] = attention[:, -1].mean(axis=1)
        pictures[f"similarity_{phase}"] = position_similarity(model, images.shape[1:])
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


# ---- claims -----------------------------------------------------------------------------------


def claims(config: Config, result: Result) -> tuple[Claim, ...]:
    """What the study says of V1 to V6."""
    return (
        _patches_are_tokens(result),
        _count_changes(result),
        _low_then_high(result),
        _positions_must_fit(result),
        _against_interpolation(result, "V5", ("pad", "crop"), _padding(result)),
        _against_interpolation(result, "V6", ("conv",), ()),
    )


def _at(result: Result, array: np.ndarray, method: str, phase: str) -> Any:
    """What the array has in that row; NaN if the way was not tried."""
    rows = np.flatnonzero((result.methods == method) & (result.phases == phase))
    return array[rows[0]] if rows.size else np.full(array.shape[1:], np.nan)[()]


def _gain(
    result: Result, name: str, row: tuple[str, str], other: tuple[str, str], intervals: int
) -> Evidence:
    """That `row` reads more digits than `other`."""
    correct = result.correct.astype(float)
    gains = (_at(result, correct, *row) - _at(result, correct, *other)).ravel()
    return above(name, 0, mean_interval(gains, share(intervals)))


PAIRED = (
    "Differences are between the same test images, of all seeds; the intervals are over images, "
    "given these trainings, and the spread over seeds is in the table."
)


def _patches_are_tokens(result: Result) -> Claim:
    small, whole, patch = (int(n) for n in result.sizes)
    tokens = {small: "small", whole: "tuned"}
    counts = [
        equal(
            f"tokens of {n} × {n} pixels in patches of {patch} × {patch}",
            (n / patch) ** 2,
            _at(result, result.tokens, "learned", phase),
            0.0,
        )
        for n, phase in tokens.items()
    ]
    values = _at(result, result.patch_values, "learned", "small")
    return Claim(
        "V1",
        r"N = \frac{\text{rows}}{P} \cdot \frac{\text{columns}}{P},"
        r"\quad \text{tokens} \in \mathbb{R}^{N \times P^2 C}",
        "The model counts (side / P)² tokens of P² C values in images of either size.",
        (*counts, equal("values of a patch", patch**2, values, 0.0)),
    )


def _count_changes(result: Result) -> Claim:
    area = float((result.sizes[1] / result.sizes[0]) ** 2)

    def ratio(array: np.ndarray, method: str) -> float:
        small, tuned = (_at(result, array, method, phase) for phase in ("small", "tuned"))
        return float(tuned / small)

    of_patch = ratio(result.patch_values, "learned")
    return Claim(
        "V2",
        r"N \propto \text{rows} \cdot \text{columns} \text{ at fixed } P",
        "At a fixed patch size the number of tokens grows as the area of the image, and the patch "
        "does not change; with a resized kernel it is the other way round.",
        (
            equal("tokens, whole images over small", area, ratio(result.tokens, "learned"), 0, 1),
            equal("values of a patch, whole images over small", 1, of_patch, 0),
            equal("values of a patch, kernel resized", area, ratio(result.patch_values, "kernel"),
                  0, 1),
            equal("tokens, kernel resized", 1, ratio(result.tokens, "kernel"), 0),
        ),
        printed=(equal("values of a patch, said to change as well", area, of_patch, 0),),
        note="One of the two changes, not both: the number, or with a resized kernel the size.",
    )  # fmt: skip


def _low_then_high(result: Result) -> Claim:
    alone = (("learned", "small"), ("learned", "equal steps"))
    steps = [_at(result, result.steps, *row).sum() for row in alone]
    small, whole = (_at(result, result.flops, *row) for row in alone)
    operations = float((small / steps[0]) / (whole / steps[1]))
    small, whole = (_at(result, result.peak_bytes, *row) for row in alone)
    memory = float(small / whole)
    tuned = ("learned", "tuned")
    return Claim(
        "V3",
        r"\text{train small, tune large} \geq \text{train large, at equal compute}",
        "With a learned grid, training on small images and tuning on whole ones reads more test "
        "digits than training on whole ones with as many operations, and more than the model of "
        "small images reads on those; a step on small images takes fewer operations and less "
        f"memory. {PAIRED}",
        (
            _gain(result, "gain over whole images at equal compute", tuned,
                  ("learned", "equal compute"), 2),
            _gain(result, "gain by tuning on whole images", tuned, ("learned", "small"), 2),
            below("operations of a step, small images over whole", 1, known(operations)),
            below("memory of a step, small images over whole", 1, known(memory)),
        ),
        note="It is the number of tokens that falls; of the parameters only the table of positions "
        "does.",
    )  # fmt: skip


def _positions_must_fit(result: Result) -> Claim:
    tuned = [
        _gain(result, f"{MOVES[method]}: regained by tuning", (method, "tuned"),
              (method, "moved"), 4)
        for method in ("learned", "sincos2d", "rope2d")
    ]  # fmt: skip
    return Claim(
        "V4",
        r"p(\text{new grid}) \neq p(\text{old grid})",
        "Moved without tuning, a model whose patches stay and whose positions are interpolated "
        "reads fewer digits than before; with each scheme of positions tuning regains some. "
        + PAIRED,
        (
            _gain(result, "lost by moving, learned grid", ("learned", "small"),
                  ("learned", "moved"), 4),
            *tuned,
        ),
        note="At a fixed patch size a patch also sees half as much of the digit: what is lost is "
        "not of the positions alone. Resizing the patch kernel keeps both, and loses least.",
    )  # fmt: skip


def _padding(result: Result) -> tuple[Evidence, ...]:
    effect = float(result.padding_effect)
    return (equal("largest change of a logit by what the padding holds", 0.0, effect, 0.0),)


def _against_interpolation(
    result: Result, id: str, methods: tuple[str, ...], others: tuple[Evidence, ...]
) -> Claim:
    gains = tuple(
        _gain(result, f"{MOVES[method]}: gain over the interpolated grid, both tuned",
              (method, "tuned"), ("learned", "tuned"), len(methods))
        for method in methods
    )  # fmt: skip
    invariant = " What the padding holds changes no logit." if others else ""
    return Claim(
        id,
        r"\text{wanted size by this way} \geq \text{by interpolated positions}",
        "After as many steps of tuning it reads more test digits than the interpolated grid."
        f"{invariant} {PAIRED}",
        (*gains, *others),
    )


def _lines(claim: Claim) -> str:
    """The evidence of a claim, a line each."""
    lines = [
        f"    {e.name}: {e.measured:.4g} in [{e.low:.4g}, {e.high:.4g}], "
        f"predicted {e.relation} {e.predicted:.4g}: {e.status}"
        for e in (*claim.right, *claim.printed, *claim.beyond)
    ]
    return "\n".join(lines) + "\n"


# ---- figure -----------------------------------------------------------------------------------


def plot(result: Result) -> "Figure":
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
