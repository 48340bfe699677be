"""What the study of image sizes says of V1 to V6, from its saved result alone."""

from typing import Any, NamedTuple

import numpy as np

from experiments.claims.vit_resolution.moves import MOVES
from experiments.report.evidence import (
    Claim,
    Estimate,
    Evidence,
    above,
    below,
    equal,
    known,
    mean_interval,
    share,
)


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
    """Sides of the small images and of the whole ones, in pixels."""
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
    scores: dict[str, Any]


def claims(result: Result, patch: int) -> tuple[Claim, ...]:
    """One claim for each of V1 to V6; a patch of the model has sides of `patch` pixels."""
    return (
        _patches_are_tokens(result, patch),
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
    """That `row` reads more digits than `other`, with every seed."""
    correct = result.correct.astype(float)
    gains = np.atleast_2d(_at(result, correct, *row) - _at(result, correct, *other))
    value, low, high = mean_interval(gains.ravel(), share(intervals))
    of_seeds = gains.mean(axis=1)
    return above(name, 0, Estimate(value, min(low, *of_seeds), max(high, *of_seeds)))


PAIRED = (
    "Differences are between the same test images. An interval is over the images of all seeds, "
    "given these trainings, and is widened until it holds the mean of each seed: what the seeds do "
    "not agree on is undecided."
)


def _patches_are_tokens(result: Result, patch: int) -> Claim:
    small, whole = (int(n) for n in result.sizes)
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
