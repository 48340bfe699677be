"""Frequencies of rotary embeddings, and what changes them beyond the length of training."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from rnnattn.checks import Check


def geometric(dim, base, first=0):
    """ω_m = base^(−2m/d) in float64."""
    m = np.arange(first, first + dim // 2)
    return float(base) ** (-2 * m / dim)


class Scaling:
    """What changes the frequencies of `rope`, so that it reaches beyond its training length.

    The fields of a scaling are named as in the `rope_scaling` of a checkpoint's `config.json`;
    where one has a default, None stands for it, as it does there.
    """

    def __post_init__(self):
        check = Check(type(self).__name__)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is None and field.default is not dataclasses.MISSING:
                object.__setattr__(self, field.name, field.default)  # the class is frozen
            elif not isinstance(value, bool):
                values = value if isinstance(value, list | tuple) else [value]
                positive = all(x is not None and x > 0 for x in values)
                check(positive, field.name, "positive", repr(value))

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        """The frequencies of the `dim` / 2 pairs, in radians per step."""
        raise NotImplementedError

    @property
    def amplitude(self) -> float:
        """a, the length that a rotated pair of length 1 gets."""
        return 1.0

    def _check_below(self, low, high):
        below, above = getattr(self, low), getattr(self, high)
        got = f"{below!r} and {above!r}"
        Check(type(self).__name__)(below < above, low, f"below `{high}`", got)


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation: ω_m / factor (Chen et al. 2023, arXiv 2306.15595).

    Example:
        >>> LinearScaling(4.0).frequencies(4, 10_000.0).tolist()
        [0.25, 0.0025]
    """

    factor: float | int

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        return geometric(dim, base) / self.factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base, base · factor^(d/(d−2)): ω_0 stays, the last is divided by factor.

    Peng et al. 2023, arXiv 2309.00071, §3.1.

    Example:
        >>> NTKScaling(4.0).frequencies(4, 10_000.0).tolist()
        [1.0, 0.0025]
    """

    factor: float | int

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        if dim == 2:  # ω_0 alone
            return geometric(dim, base)
        return geometric(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class DynamicNTKScaling(Scaling):
    """`NTKScaling` by what a sequence of `length` needs: factor · length / original − (factor − 1).

    Within the original length nothing is changed. Peng et al. 2023, arXiv 2309.00071, §3.3.

    Args:
        original_max_position_embeddings: the length of training, in steps.
        length: of the sequence at hand, in steps, known when a function is traced. Cached keys of
            another length have other angles.
    Example:
        >>> DynamicNTKScaling(2.0, 2048, length=4096).frequencies(4, 10_000.0)[-1].round(6).item()
        0.003333
    """

    factor: float | int
    original_max_position_embeddings: int
    length: int

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        grown = max(self.length / self.original_max_position_embeddings, 1)
        return NTKScaling(self.factor * grown - (self.factor - 1)).frequencies(dim, base)


@dataclass(frozen=True)
class YaRNScaling(Scaling):
    """Fast pairs stay, slow ones are interpolated, those between are mixed; y grows by a.

        ω'_m = (1 − r_m) ω_m + r_m ω_m / factor,      a = 0.1 ln(factor) + 1

    r_m rises from 0 to 1, linearly in m, between the pair that turns `beta_fast` times within the
    original length and the one that turns `beta_slow` times: as in the code of Peng et al. 2023,
    arXiv 2309.00071, and in the models trained with it. (In its text r is linear in the turns.)

    Args:
        original_max_position_embeddings: the length of training, in steps.
        attention_factor: a; None computes it. DeepSeek's `mscale` s and `mscale_all_dim` t mean
            (0.1 s ln(factor) + 1) / (0.1 t ln(factor) + 1).
        truncate: let r begin and end at whole m.
    Example:
        >>> scaling = YaRNScaling(4.0, original_max_position_embeddings=2048)
        >>> (scaling.frequencies(16, 10_000.0) * 10_000.0 ** (np.arange(8) / 8)).round(4).tolist()
        [1.0, 1.0, 1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    """

    factor: float | int
    original_max_position_embeddings: int
    beta_fast: float | int | None = 32.0
    beta_slow: float | int | None = 1.0
    attention_factor: float | int | None = None
    truncate: bool | None = True

    def __post_init__(self):
        super().__post_init__()
        self._check_below("beta_slow", "beta_fast")

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        ω = geometric(dim, base)
        slowed = lambda turns: self.original_max_position_embeddings / (2 * math.pi * turns)
        start, end = (
            dim * math.log(slowed(turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, dim - 1)
        r = np.clip((np.arange(dim // 2) - start) / max(end - start, 1e-3), 0, 1)
        return (1 - r) * ω + r * ω / self.factor

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return max(0.1 * math.log(self.factor) + 1, 1.0)


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Fast pairs stay, slow ones are interpolated, those between are mixed by how often they turn.

        ω'_m = s_m ω_m + (1 − s_m) ω_m / factor,      s_m = (n_m − low) / (high − low) in [0, 1]

    n_m is how often the pair turns within the original length, low and high are
    `low_freq_factor` and `high_freq_factor`. The defaults are those of Llama 3.1 (Llama team 2024,
    arXiv 2407.21783; formula from the code published with it).

    Example:
        >>> scaled = Llama3Scaling().frequencies(128, 500_000.0)
        >>> scaled[0].item(), round(500_000.0 ** (-126 / 128) / scaled[-1].item(), 6)
        (1.0, 8.0)
    """

    factor: float | int = 8.0
    low_freq_factor: float | int = 1.0
    high_freq_factor: float | int = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        super().__post_init__()
        self._check_below("low_freq_factor", "high_freq_factor")

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        ω = geometric(dim, base)
        turns = self.original_max_position_embeddings * ω / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        s = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return s * ω + (1 - s) * ω / self.factor


@dataclass(frozen=True)
class LongRoPEScaling(Scaling):
    """Each pair has a factor of its own, ω_m / factor_m, and y grows by a.

        a = √(1 + ln(max / original) / ln(original))

    The factors are found by search: one list for sequences within the original length, one for
    longer ones (Ding et al. 2024, arXiv 2402.13753; formula as in Phi-3).

    Args:
        short_factor, long_factor: of each of the d/2 pairs.
        original_max_position_embeddings: the length of training, in steps.
        max_position_embeddings: the length that is reached.
        length: of the sequence at hand, in steps, known when a function is traced: it says which
            list is read. None is the length that is reached.
        attention_factor: a; None computes it.
    Example:
        >>> scaling = LongRoPEScaling((1.0, 1.5), (1.0, 32.0), 4096, 131_072)
        >>> scaling.frequencies(4, 10_000.0).tolist(), round(scaling.amplitude, 4)
        ([1.0, 0.0003125], 1.1902)
    """

    short_factor: tuple[float | int, ...]
    long_factor: tuple[float | int, ...]
    original_max_position_embeddings: int
    max_position_embeddings: int
    length: int | None = None
    attention_factor: float | int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists come from a config

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        length = self.max_position_embeddings if self.length is None else self.length
        is_long = length > self.original_max_position_embeddings
        name = "long_factor" if is_long else "short_factor"
        factors = getattr(self, name)
        expected = f"of {dim // 2} factors, one for each pair"
        Check(type(self).__name__)(len(factors) == dim // 2, name, expected, f"{len(factors)}")
        return geometric(dim, base) / np.asarray(factors, np.float64)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        original = self.original_max_position_embeddings
        grown = max(self.max_position_embeddings / original, 1.0)
        return math.sqrt(1 + math.log(grown) / math.log(original))


@dataclass(frozen=True)
class PRoPEScaling(Scaling):
    """The highest frequencies alone: the first ⌊p d/2⌋ pairs turn, the others stand still.

    A product of two pairs that stand still is one of contents, at any distance (Barbero et al.
    2024, arXiv 2410.06205, §6). `rotary_dim` has frequencies of its own for the part that turns.

    Args:
        p: the share of the pairs, at most 1.
    Example:
        >>> PRoPEScaling(0.5).frequencies(8, 10_000.0).round(4).tolist()
        [1.0, 0.1, 0.0, 0.0]
    """

    p: float | int

    def __post_init__(self):
        super().__post_init__()
        Check(type(self).__name__)(self.p <= 1, "p", "at most 1", repr(self.p))

    def frequencies(self, dim: int, base: float | int) -> np.ndarray:
        turning = np.arange(dim // 2) < int(self.p * (dim // 2))
        return np.where(turning, geometric(dim, base), 0.0)
