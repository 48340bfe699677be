"""Figures: pure functions of results, in one palette that colour-blind readers can tell apart."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.engine.config import UsageError
from experiments.engine.files import written

# Okabe and Ito's palette
BLACK, BLUE, ORANGE, GREEN, RED = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00"
SPLITS = {
    "train": (BLUE, "-"),
    "validation": (ORANGE, "--"),
    "validation_ema": (RED, "--"),
    "test": (GREEN, ""),
    "test_ema": (BLACK, ""),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format that the path ends in, whole or not at all.

    Raises:
        UsageError: if there is no such format.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise UsageError(f"{path}: a figure should end in one of .{', .'.join(sorted(kinds))}")
    with written(path) as file:
        figure.savefig(file, format=kind)


def curves(records: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> Figure:
    """The metrics that have a label, of every split, against the step."""
    names = list(labels)
    figure = new_figure(5.5 * len(names), 4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for split, (colour, line) in SPLITS.items():
            points = [(r["step"], r[name]) for r in records if r["split"] == split and name in r]
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if len(points) == 1 else ""
                axes.plot(x, y, color=colour, linestyle=line, marker=marker, label=split)
        if name == "loss":
            axes.set_yscale("log")
        axes.set(xlabel="optimiser step", ylabel=labels[name])
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def overlaid_curves(
    rows: Mapping[str, Sequence[Sequence[dict[str, Any]]]], labels: Mapping[str, str]
) -> Figure:
    """The metrics that have a label by step, a colour for each row, a line for each split.

    Where a row is of several runs, the line is their mean, in a band of their standard deviation.
    """
    names = list(labels)
    figure = new_figure(5.5 * len(names), 4.4)
    colours = itertools.cycle((BLUE, ORANGE, GREEN, RED, BLACK))
    of_rows = dict(zip(rows, colours, strict=False))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for row, runs in rows.items():
            for split, line in {"train": "-", "validation": "--"}.items():
                points = [
                    {r["step"]: r[name] for r in records if r["split"] == split and name in r}
                    for records in runs
                ]
                steps = sorted(set.intersection(*map(set, points)))
                if not steps:
                    continue
                values = np.array([[of_run[step] for step in steps] for of_run in points])
                mean = values.mean(axis=0)
                label = row if split == "train" else None
                axes.plot(steps, mean, color=of_rows[row], linestyle=line, label=label)
                if len(runs) > 1:
                    spread = values.std(axis=0, ddof=1)
                    axes.fill_between(
                        steps, mean - spread, mean + spread, color=of_rows[row], alpha=0.2,
                        linewidth=0,
                    )  # fmt: skip
        if name == "loss":
            axes.set_yscale("log", nonpositive="clip")
        axes.set(xlabel="optimiser step", ylabel=labels[name])
        axes.grid(alpha=0.3)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), fontsize=8)
    title = "solid: training; dashed: validation"
    if any(len(runs) > 1 for runs in rows.values()):
        title += "; bands: ± standard deviation of the runs"
    figure.suptitle(title, fontsize=10)
    return figure


def scores_by_row(scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    """For each score, a panel: by row its mean, and a dot for each run."""
    rows = list(next(iter(scores.values()), {}))
    figure = new_figure(5.5 * max(len(scores), 1), 1.6 + 0.4 * len(rows))
    panels = figure.subplots(1, max(len(scores), 1), squeeze=False, sharey=True)[0]
    for axes, (label, of_rows) in zip(panels, scores.items(), strict=False):
        for y, row in enumerate(rows):
            values = of_rows[row]
            axes.plot(values, np.full(len(values), y), ".", color=BLACK, markersize=5)
            if len(values):
                axes.plot(values.mean(), y, "o", color=BLUE, markersize=8, markerfacecolor="none")
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set(xlabel=f"{label}, test (circle: mean)", ylim=(len(rows) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    return figure


def loss_curve(axes: Axes, steps: Any, losses: Any, baseline: str, level: float) -> None:
    """The training loss on a log scale, with a level to be beaten."""
    axes.plot(steps, losses, color=BLUE, label="training loss")
    axes.axhline(level, color=BLACK, linestyle="--", label=baseline)
    axes.set(xlabel="optimiser step", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def error_bars(axes: Axes, x: Any, estimates: Any, colour: str, label: str) -> None:
    """Points with their intervals; the last axis of the estimates is (value, low, high)."""
    value, low, high = np.atleast_2d(estimates).T
    reach = np.maximum([value - low, high - value], 0)
    axes.errorbar(x, value, reach, color=colour, fmt="o", markersize=4, capsize=3, label=label)


def figure_of_text(
    test: Any, nats: Any, curve: Any, validation_curve: Any, scores: Mapping[str, Any]
) -> Figure:
    """What a model of text learned: its loss against what needs no memory, what each place in a
    word costs, and an excerpt.

    Args:
        test: code points of the test text; `nats` is what each but the first cost.
    """
    figure = new_figure(13, 7.6)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.7))[0]
    upper, lower = left.subplots(2, 1)
    levels = {
        "single characters": scores["validation_unigram_loss"],
        "pairs of characters": scores["validation_bigram_loss"],
    }
    loss_of_text(upper, curve, validation_curve, levels)
    text, bits = [chr(point) for point in test[1:]], nats / np.log(2)
    cost_by_place(lower, _places(text), bits)
    cost_of_text(right, text, bits)
    shown = scores["test_bits_per_character"]
    figure.suptitle(f"{shown:.3f} bits per character on {len(nats):,} of test text")
    return figure


def _places(text: Sequence[str]) -> np.ndarray:
    """For each letter how many of its word it is, from 1; for anything else 0."""
    places, place = [], 0
    for character in text:
        place = place + 1 if character.isalpha() else 0
        places.append(place)
    return np.array(places)


def loss_of_text(axes: Axes, training: Any, validation: Any, levels: Mapping[str, float]) -> None:
    """Bits per character of the two splits by step, with levels to be beaten."""
    bits = 1 / np.log(2)
    for split, (steps, nats) in {"train": training.T, "validation": validation.T}.items():
        colour, line = SPLITS[split]
        axes.plot(steps, nats * bits, color=colour, linestyle=line, label=split)
    for (name, level), line in zip(levels.items(), (":", "-."), strict=True):
        label = f"{name}, {level * bits:.2f}"
        axes.axhline(level * bits, color=BLACK, linestyle=line, linewidth=1, label=label)
    axes.set(xlabel="optimiser step", ylabel="bits per character", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def cost_by_place(axes: Axes, places: Any, bits: Any, longest: int = 12) -> None:
    """Mean bits of the first, second, … letter of a word, and of what is no letter (place 0)."""
    shown = [place for place in range(longest + 1) if np.any(places == place)]
    means = [bits[places == place].mean() for place in shown]
    colours = [ORANGE if place == 0 else BLUE for place in shown]
    axes.bar(shown, means, color=colours, alpha=0.8)
    axes.axhline(bits.mean(), color=BLACK, linestyle="--", linewidth=1, label="mean of all")
    axes.set_xticks(shown, ["no\nletter" if place == 0 else str(place) for place in shown])
    axes.set(xlabel="place of the letter in its word", ylabel="bits per character (test)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


def cost_of_text(figure: SubFigure, text: Sequence[str], bits: Any, width: int = 80) -> None:
    """The first 28 lines of a text, each character on a colour that says what it cost."""
    rows: list[list[tuple[str, float]]] = [[]]
    for character, cost in zip(text, bits, strict=True):
        rows[-1].append(("↵" if character == "\n" else character, cost))
        if character == "\n" or len(rows[-1]) == width:
            rows.append([])
        if len(rows) > 28:
            break
    rows = [row for row in rows if row]
    costs = np.full((len(rows), width), np.nan)
    for costs_of_row, row in zip(costs, rows, strict=True):
        costs_of_row[: len(row)] = [cost for _, cost in row]
    axes = figure.subplots()
    image = axes.imshow(costs, cmap="Oranges", vmin=0, vmax=8, aspect="auto")
    for (y, x), cost in np.ndenumerate(costs):
        shown = rows[y][x][0] if np.isfinite(cost) else " "
        # the font lacks some characters, and control characters have no glyph
        colour = "0.6" if shown == "↵" else "white" if cost > 5 else BLACK
        if (shown.isascii() and shown.isprintable() and shown != " ") or shown == "↵":
            axes.text(
                x, y, shown, ha="center", va="center", fontsize=6.5, family="monospace",
                parse_math=False, color=colour, in_layout=False,
            )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.set_title("The first lines of the test text: what each character cost", fontsize=10)
    figure.colorbar(image, ax=axes, label="bits", extend="max", shrink=0.5, pad=0.01)


def predicted_against_true(axes: Axes, true: Any, predicted: Any, tolerance: float) -> None:
    """A scatter round the diagonal, with a band of the tolerance."""
    ends = np.array([min(true.min(), predicted.min()), max(true.max(), predicted.max())])
    band = f"true sum ± {tolerance}"
    axes.fill_between(ends, ends - tolerance, ends + tolerance, color=ORANGE, alpha=0.4, label=band)
    axes.scatter(true, predicted, s=9, color=BLUE, alpha=0.6, linewidths=0, label="test sequence")
    axes.set(xlabel="true sum", ylabel="predicted sum", aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _show(axes: Axes, image: Any) -> None:
    """An image (rows, columns, channels): three channels in colour, else their mean, inverted."""
    if image.shape[-1] == 3:
        axes.imshow(image)
    else:
        axes.imshow(image.mean(axis=-1), cmap="gray_r", vmin=0, vmax=1)


def image_gallery(
    figure: SubFigure, images: Any, labels: Any, probabilities: Any, classes: Any
) -> None:
    """30 images with prediction and probability: the wrong ones first, framed."""
    grid = figure.subplots(5, 6)
    predictions = probabilities.argmax(axis=-1)
    order = np.argsort(predictions == labels, kind="stable")
    # of long names, each has a line
    before, after = ("\n", "\n") if max(map(len, classes)) > 2 else (", ", "  ")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.axis("off")
    for axes, index in zip(grid.flat, order, strict=False):
        guess, label = predictions[index], labels[index]
        right = guess == label
        axes.axis("on")
        _show(axes, images[index])
        text = classes[guess] if right else f"{classes[guess]}{before}is {classes[label]}"
        text += f"{after}({probabilities[index, guess]:.0%})"
        axes.set_title(text, fontsize=8, color=BLACK if right else RED)
        for spine in axes.spines.values():
            spine.set(color="0.8" if right else RED, linewidth=0.8 if right else 2.5)
    figure.suptitle("Named (probability); mistakes first, framed", fontsize=10)


MOST_NUMBERS = 20
"""A confusion matrix of more classes has no room for its numbers and names."""


def confusion_matrix(figure: SubFigure, labels: Any, predictions: Any, classes: Any) -> None:
    """How many images of each class, by its name, were taken for which."""
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    axes = figure.subplots()
    # the square root keeps a single mistake visible beside dozens of hits
    axes.imshow(np.sqrt(counts), cmap="Blues")
    axes.set(xlabel="named", ylabel="is")
    figure.suptitle("Confusion matrix, in test images", fontsize=10)
    if len(classes) > MOST_NUMBERS:
        return
    for (row, column), count in np.ndenumerate(counts):
        if count:
            bright = count > counts.max() / 3
            colour = "white" if bright else BLACK if row == column else RED
            weight = "normal" if row == column else "bold"
            axes.text(
                column, row, str(count), ha="center", va="center", color=colour, fontweight=weight
            )
    upright = 90 if max(map(len, classes)) > 2 else 0
    axes.set_xticks(range(len(classes)), classes, rotation=upright)
    axes.set_yticks(range(len(classes)), classes)


def attention_maps(figure: SubFigure, images: Any, attention: Any) -> None:
    """Each image, and beside it where the attention of each block goes.

    Args:
        images: (images, rows, columns, channels).
        attention: (images, blocks, rows, columns), of patches.
    """
    depth = attention.shape[1]
    grid = figure.subplots(len(images), 1 + depth, squeeze=False)
    for row, image, blocks in zip(grid, images, attention, strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        _show(row[0], image)
        for axes, shares in zip(row[1:], blocks, strict=True):
            _attention_map(axes, image, shares)
    for n, axes in enumerate(grid[0]):
        axes.set_title(f"block {n}" if n else "image", fontsize=9)
    title = "Where the attention goes (darker: more)"
    if images.shape[-1] == 1:
        title += ", with the outline"
    figure.suptitle(title, fontsize=10)


def _attention_map(axes: Axes, image: Any, shares: Any) -> None:
    """Shares of attention by patch, over the whole image; in one of one channel, its outline."""
    rows, columns, channels = image.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(shares, cmap="Blues", vmin=0, extent=extent)
    # a picture in colours has no one outline
    if channels == 1 and image.min() < 0.5 < image.max():
        axes.contour(image[..., 0], levels=[0.5], colors=[RED], linewidths=1)


def similarity_maps(figure: SubFigure, similarity: Any, title: str = "") -> None:
    """For some patches, how like each patch's position is to theirs.

    Args:
        similarity: cosines (rows, columns, rows, columns).
    """
    rows, columns = similarity.shape[:2]
    shown = [
        sorted({round(i * (length - 1) / (min(length, 4) - 1 or 1)) for i in range(min(length, 4))})
        for length in (rows, columns)
    ]
    grid = figure.subplots(len(shown[0]), len(shown[1]), squeeze=False)
    for (n, m), axes in np.ndenumerate(grid):
        row, column = shown[0][n], shown[1][m]
        drawn = axes.imshow(similarity[row, column], cmap="PuOr_r", vmin=-1, vmax=1)
        axes.plot(column, row, "o", color=BLACK, markersize=3)
        axes.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid, label="cosine", shrink=0.8, pad=0.02)
    title = title or "How like each patch's position is to that of the marked one"
    figure.suptitle(title, fontsize=10)


PHASE_STYLES = {
    "small": (BLACK, "s", "small images, as trained"),
    "moved": (ORANGE, "v", "moved to whole images"),
    "tuned": (BLUE, "o", "moved and tuned"),
    "equal compute": (RED, "x", "whole from scratch, equal compute"),
    "equal steps": (GREEN, "+", "whole from scratch, equal steps"),
}


def phases_by_method(
    axes: Axes, methods: Any, phases: Any, accuracy: Any, names: Mapping[str, str]
) -> None:
    """Accuracy (rows, seeds) of each phase of each method: the mean, and a dot for each seed."""
    names = {method: name for method, name in names.items() if method in methods}
    places = {method: n for n, method in enumerate(names)}
    for n, (phase, (colour, marker, label)) in enumerate(PHASE_STYLES.items()):
        chosen = np.flatnonzero(phases == phase)
        y = np.array([places[methods[row]] for row in chosen]) + 0.14 * (n - 2)
        axes.plot(
            accuracy[chosen].mean(axis=1), y, marker, color=colour, markersize=8,
            markeredgewidth=2 if marker in "x+" else 0, label=label,
        )  # fmt: skip
        for values, height in zip(accuracy[chosen], y, strict=True):
            axes.plot(values, [height] * len(values), ".", color=colour, markersize=3)
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names.values()])
    axes.set(xlabel="test accuracy (mean; a dot for each seed)", ylim=(len(names) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    for n in range(1, len(names)):
        axes.axhline(n - 0.5, color="0.85", linewidth=0.8)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9
    )


def phases_by_cost(axes: Axes, methods: Any, phases: Any, accuracy: Any, flops: Any) -> None:
    """Mean accuracy of every row against the operations of its training."""
    for phase, (colour, marker, _) in PHASE_STYLES.items():
        chosen = phases == phase
        axes.plot(
            flops[chosen] / 1e12, accuracy[chosen], marker, color=colour, markersize=8,
            markeredgewidth=2 if marker in "x+" else 0,
        )  # fmt: skip
    tuned = phases == "tuned"
    _name_beside(axes, methods[tuned], flops[tuned] / 1e12, accuracy[tuned])
    axes.set(xlabel="operations of training (TFLOP, by XLA)", ylabel="test accuracy", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")


def _name_beside(axes: Axes, names: Any, x: Any, y: Any) -> None:
    """Write each point's name right of the axes, as high as it is where that leaves room."""
    order = np.argsort(y)
    low, high = axes.get_ylim()
    heights = (y[order] - low) / (high - low)
    step = 0.055  # of the axes' height: a line of text
    for n in range(1, len(heights)):
        heights[n] = max(heights[n], heights[n - 1] + step)
    heights -= max(heights[-1] - 1, 0)
    for n in range(len(heights) - 2, -1, -1):
        heights[n] = min(heights[n], heights[n + 1] - step)
    for n, height in zip(order, heights, strict=True):
        axes.annotate(
            names[n], (x[n], y[n]), (1.03, height), textcoords="axes fraction", va="center",
            fontsize=8, arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
        )  # fmt: skip


def before_and_after(
    figure: SubFigure, titles: Sequence[str], images: Any, attention: Any, similarity: Any
) -> None:
    """For each stage, a row: where the attention goes over some images, and a patch's position."""
    shown = len(images[0])
    grid = figure.subplots(len(titles), 2 * shown, squeeze=False)
    for n, (row, title) in enumerate(zip(grid, titles, strict=True)):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes, image, shares in zip(row, images[n], attention[n], strict=False):
            _attention_map(axes, image, shares)
        row[0].set_ylabel(title, fontsize=9)
        rows, columns = similarity[n].shape[:2]
        for m, axes in enumerate(row[shown:]):
            # the same places of the image, whatever the grid
            place = int((m + 0.5) * rows / shown), int((m + 0.5) * columns / shown)
            drawn = axes.imshow(similarity[n][place], cmap="PuOr_r", vmin=-1, vmax=1)
            axes.plot(place[1], place[0], "o", color=BLACK, markersize=3)
    outlined = ", with the outline" if images[0].shape[-1] == 1 else ""
    grid[0, shown // 2].set_title(f"attention of the last block{outlined}", fontsize=10)
    middle = shown + shown // 2
    grid[0, middle].set_title("positions like that of the marked patch", fontsize=10)
    figure.colorbar(drawn, ax=grid, label="cosine of positions", shrink=0.7, pad=0.01)
