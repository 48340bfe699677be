# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Read and compare runs
#
# Experiments are run from the command line. Their folders are read from Python.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import experiments

outputs = Path(tempfile.mkdtemp())


def run(name, *options):
    command = [sys.executable, "-m", "experiments", "run", "lstm_digits", "--quick"]
    subprocess.run(
        [*command, "--output", str(outputs), "--name", name, *options],
        check=True,
        capture_output=True,
    )
    return experiments.open(next(outputs.rglob(name)))


# %% [markdown]
# Two runs of a size of seconds, that differ in the learning rate:

# %%
runs = {rate: run(f"rate-{rate}", "--train.learning-rate", rate) for rate in ("0.003", "0.03")}

# %%
plt.figure(figsize=(6, 2.5))
for rate, each in runs.items():
    loss = [(m["step"], m["loss"]) for m in each.metrics if "loss" in m]
    plt.plot(*zip(*loss, strict=True), label=rate)
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.tight_layout()

# %% [markdown]
# A run knows its config and its result, and gives the trained model back:

# %%
each = runs["0.003"]
each.config.train.steps, each.result

# %% [markdown]
# `model` is a function of inputs with the trained parameters in it: here it reads a blank image.

# %%
import numpy as np

each.model(np.zeros((1, 8, 8), np.float32)).shape
