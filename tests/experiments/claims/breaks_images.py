"""What breaks V1 to V6: see `tests.experiments.claims.breaks`.

V3 to V6 compare trainings, and no size of a second decides them: there, accuracies take the place
of those that were measured which say the opposite of the claim.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rnnattn import patchify, unpatchify
from rnnattn.nn import ViT
from tests.experiments.claims.breaks import Break


def _dropped(images, patch_size):
    """Of each patch the first pixel in the place of the others."""
    tokens = patchify(images, patch_size)
    channels = images.shape[3]
    return jnp.tile(tokens[..., :channels], tokens.shape[2] // channels)


def _repeated(images, patch_size):
    """The first patch in the place of the second as well."""
    tokens = patchify(images, patch_size)
    return tokens.at[:, 1].set(tokens[:, 0])


def _overlapping(images, patch_size):
    """Patches at a distance of half their side."""
    sides = tuple(patch_size)
    patches = jax.lax.conv_general_dilated_patches(
        images, sides, tuple(side // 2 for side in sides), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return patches.reshape(len(images), -1, patches.shape[3])


def _upside_down(tokens, size, patch_size):
    return unpatchify(tokens, size, patch_size)[:, ::-1]


def _constant_number(images, patch_size):
    """As many patches of images of any size: those of a corner."""
    p, q = patch_size
    return patchify(images[:, : 3 * p, : 6 * q], patch_size)


def _stretched(kernel, patch_size):
    size = (patch_size, patch_size, *kernel.shape[2:])
    return jax.image.resize(kernel, size, "bilinear")


_call = ViT.__call__


def _mask_ignored(self, images, valid=None, **options):
    return _call(self, images, None, **options)


def accuracies(shares, seeds=16):
    """In the place of `accuracy_of`: by method and phase, or by phase, with a spread of 0.01."""

    def accuracy_of(result, method, phase):
        share = shares.get((method, phase), shares.get(phase))
        noise = np.random.default_rng(sum(map(ord, method + phase))).standard_normal(seeds)
        return share + 0.01 * noise

    return accuracy_of


READ = {
    "small": 0.8,
    "moved": 0.6,
    ("none", "small"): 0.5,
    ("none", "moved"): 0.4,
    "unfitted": 0.2,
    "tuned": 0.9,
    ("crop", "tuned"): 0.5,
    "equal compute": 0.7,
}
"""Accuracies with which V3 to V6 hold."""

ACCURACY_OF = "experiments.claims.vit_resolution.accuracy_of"

BREAKS = (
    Break("V1", "rnnattn.patchify", _dropped),
    Break("V1", "rnnattn.patchify", _repeated),
    Break("V1", "rnnattn.unpatchify", _upside_down),
    Break("V1", "rnnattn.nn.vit.patchify", _dropped),
    Break("V1", "rnnattn.nn.vit.patchify", _overlapping),
    Break("V2", "rnnattn.nn.vit.patchify", _constant_number),
    Break("V2", "rnnattn.resize_patch_kernel", _stretched),
    Break("V3", ACCURACY_OF, accuracies(READ | {"equal compute": 0.95})),
    Break("V3", ACCURACY_OF, accuracies(READ | {("learned", "tuned"): 0.7})),
    Break("V4", ACCURACY_OF, accuracies(READ | {"unfitted": 0.7})),
    Break("V4", ACCURACY_OF, accuracies(READ | {("none", "moved"): 0.12})),
    Break("V5", "rnnattn.nn.ViT.__call__", _mask_ignored),
    Break("V5", ACCURACY_OF, accuracies(READ | {("pad", "small"): 0.7})),
    Break("V6", ACCURACY_OF, accuracies(READ | {("conv", "tuned"): 0.7})),
)
