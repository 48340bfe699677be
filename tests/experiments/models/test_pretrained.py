"""Checkpoints of timm's and of Google's, generated at a tiny size, are fitted to a model here."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import experiments
from experiments.__main__ import main
from experiments.engine.experiment import read
from experiments.models.pretrained import adopt
from experiments.models.vit import ViTConfig, build
from rnnattn.interop import vit_to_google, vit_to_timm
from rnnattn.nn import ViT

CONFIG = ViTConfig(
    patch_size=4, width=8, depth=2, num_heads=2, position="learned", pool="cls", stem="patch"
)
SMALL = (
    "--data.source digits --model.width 8 --model.depth 2 --model.num-heads 2 --model.mlp-ratio 2"
    " --train.batch-size 8 --train.steps 2"
).split()


def pretrained(**changes: Any) -> Any:
    """A model whose parameters are all random, those of the head and the class token, too."""
    options: dict[str, Any] = {
        "patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "classes": 10,
        "channels": 1, "image_size": 8, "pool": "cls",
    } | changes  # fmt: skip
    model = ViT(**options, rngs=nnx.Rngs(1))
    random = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        param[...] = jnp.asarray(random.standard_normal(param.shape), jnp.float32) / 3
    return model


def arrays_of(model: Any, form: Any) -> dict[str, Any]:
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if form == "timm":
        return vit_to_timm(weights)
    return vit_to_google(weights, form)


def built(config: ViTConfig, size: tuple[int, int]) -> Any:
    return build(config, (*size, 1), 10)


def adopted(model: ViT, arrays: dict[str, Any], num_heads: int) -> tuple[Any, list[str]]:
    found = adopt(model, arrays, num_heads)
    assert found is not None
    return found


FORMS = ["timm", "vision_transformer", "big_vision"]


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_the_same_sizes_answers_as_the_checkpoint_does(form):
    theirs, ours = pretrained(), built(CONFIG, (8, 8))
    _, changes = adopted(ours, arrays_of(theirs, form), 2)
    assert changes == []
    x = jnp.asarray(np.random.default_rng(1).random((3, 8, 8, 1)), jnp.float32)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_it_takes_to_fit_is_done_and_said(form):
    theirs = pretrained(channels=3, image_size=16, classes=1000)
    ours = built(replace(CONFIG, patch_size=2), (16, 16))
    params, changes = adopted(ours, arrays_of(theirs, form), 2)
    assert changes == [
        "the patch kernel's three colours are added up to one grey",
        "the patch kernel is resized from 4 × 4 to 2 × 2",
        "positions are resampled from 4 × 4 to 8 × 8 patches",
        "the head for 1,000 classes is replaced by a new one for 10",
    ]
    kept = nnx.to_pure_dict(params)
    assert kept["position"].shape == (1 + 64, 8) and not np.any(kept["head"]["kernel"])
    np.testing.assert_allclose(kept["norm"]["scale"], theirs.norm.scale[...])


def test_grey_is_seen_as_the_three_colours_that_it_is():
    theirs, ours = pretrained(channels=3), built(CONFIG, (8, 8))
    adopted(ours, arrays_of(theirs, "timm"), 2)
    grey = jnp.asarray(np.random.default_rng(1).random((3, 8, 8, 1)), jnp.float32)
    np.testing.assert_allclose(
        ours(grey), theirs(jnp.repeat(grey, 3, axis=-1)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"width": 16}, ["`position` must be of shape", "`head.kernel` must be of shape (8, 10)"]),
        ({"depth": 1}, ["blocks.1", "is missing"]),
        ({"pool": "mean"}, ["cls"]),
    ],
)
def test_what_does_not_fit_is_named_altogether(changes, parts):
    with pytest.raises(ValueError) as error:
        adopted(built(CONFIG, (8, 8)), arrays_of(pretrained(**changes), "timm"), 2)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "vision_transformer"])
def test_the_config_is_fine_tuned_from_a_file(form, tmp_path, capsys):
    arrays = arrays_of(pretrained(channels=3, image_size=16, classes=7), form)
    file = tmp_path / ("vit.safetensors" if form == "timm" else "vit.npz")
    save_file(arrays, file) if form == "timm" else np.savez(file, **arrays)
    options = [*SMALL, "--init", str(file), "--name", "x", "--output", str(tmp_path)]
    assert main(["run", "vit_finetune", *options]) == 0
    said = capsys.readouterr().err
    assert f"{file}: the head for 7 classes is replaced by a new one for 10" in said
    assert f"{file}: positions are resampled from 4 × 4 to 2 × 2 patches" in said
    folder = tmp_path / "vit_finetune" / "x"
    assert read(folder / "config.toml")[1].train.init == str(file)
    opened = experiments.open(folder)
    assert opened.evaluate()["test_loss"] == opened.scores["test_loss"]


def test_a_checkpoint_of_another_size_is_a_sentence(tmp_path, capsys):
    file = tmp_path / "vit.safetensors"
    save_file(arrays_of(pretrained(width=16), "timm"), file)
    options = [*SMALL, "--init", str(file), "--output", str(tmp_path / "outputs")]
    assert main(["run", "vit_finetune", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"--init: {file}: ") and message.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
