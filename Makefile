# Each makes .venv first, once; running it again installs nothing.

PYTHON ?= python3
CONFIG ?= lstm_digits
# The groups of pyproject.toml that `make test` installs; GROUPS=test,oracles adds the live peers.
GROUPS ?= test

comma := ,
venv := .venv/bin
native := setup.py $(wildcard rnnattn/native/src/*)

.PHONY: help run test quick thorough lint types format docs bench report accelerators aarch64 clean

help:
	@echo 'make run            trains the default experiment, CONFIG=NAME another one'
	@echo 'make test           lint, types and all tests; GROUPS=test,oracles beside live peers'
	@echo 'make quick          lint, and the tests that are not slow'
	@echo 'make thorough       the tests of the tests, and others that only a release waits for'
	@echo 'make docs           the site, into site/'
	@echo 'make bench          the usual benchmarks, one round of small shapes'
	@echo 'make report         every claim of the notes, measured: outputs/report/index.html'
	@echo 'make format         ruff and clang-format'
	@echo 'make accelerators   what can be seen of GPUs and TPUs without one'
	@echo 'make aarch64        a wheel of the kernels for AArch64, and their tests in an emulator'
	@echo 'make clean          removes what these made'

run: .venv/installed-experiments
	$(venv)/python -m experiments run $(CONFIG)

test: .venv/installed-$(subst $(comma),-,$(GROUPS)) lint types
	$(venv)/python -m pytest

quick: .venv/installed-$(subst $(comma),-,$(GROUPS)) lint
	$(venv)/python -m pytest -m "not slow and not thorough"

thorough: .venv/installed-$(subst $(comma),-,$(GROUPS))
	$(venv)/python -m pytest -m thorough

lint: .venv/installed-$(subst $(comma),-,$(GROUPS))
	$(venv)/ruff format --check --quiet
	$(venv)/ruff check --quiet
	$(venv)/clang-format --dry-run --Werror rnnattn/native/src/*

types: .venv/installed-$(subst $(comma),-,$(GROUPS))
	$(venv)/mypy

docs: .venv/installed-docs
	$(venv)/python -m mkdocs build --quiet --strict

bench: .venv/installed-$(subst $(comma),-,$(GROUPS))
	$(venv)/python -m benchmarks all --quick

report: .venv/installed-experiments
	$(venv)/python -m experiments report

format: .venv/installed-test
	$(venv)/ruff format
	$(venv)/ruff check --fix
	$(venv)/clang-format -i rnnattn/native/src/*

# How each C++ source is compiled, for clangd and other tools that read C++.
compile_commands.json: .venv/installed-$(subst $(comma),-,$(GROUPS))
	$(venv)/python setup.py --quiet compile_commands

# pip 25.1 is the first that knows groups.
.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rnnattn needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(venv)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	touch $@

install = $(venv)/python -m pip install --quiet --disable-pip-version-check --editable '.[nn,files]'

.venv/installed-experiments: .venv/python pyproject.toml $(native)
	$(install) --group experiments
	touch $@

.venv/installed-docs: .venv/python pyproject.toml $(native)
	$(install) --group docs
	touch $@

.venv/installed-$(subst $(comma),-,$(GROUPS)): .venv/python pyproject.toml $(native)
	$(install) $(patsubst %,--group %,$(subst $(comma), ,$(GROUPS)))
	touch $@

# Programs compiled for an H100 and for TPUs, and Pallas' interpreter, with the newest jax: see CONTRIBUTING.md.
# Which of these Pythons are there? The first that is new enough is taken.
pythons = $(PYTHON) python3.14 python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[234].*/bin/python)
lane := .venv-accelerators/bin/python
exports := attention recurrent position patches

accelerators: .venv-accelerators/installed
	JAX_PLATFORMS=cpu $(lane) -m pytest -rs tests/test_accelerators.py tests/test_pallas.py tests/test_tpu.py \
	  tests/test_attention_pallas.py tests/test_attention_tpu.py \
	  $(exports:%=tests/test_%.py::test_everything_exports_for_gpu_and_tpu) \
	  tests/test_parallel.py::test_exports_for_gpu_and_tpu

# Of CUDA only the compilers: what else the plug-in asks for is of use on a GPU alone.
.venv-accelerators/installed: pip = $(lane) -m pip install --quiet --disable-pip-version-check
.venv-accelerators/installed:
	@for python in $(pythons); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then \
	    exec $$python -m venv --clear .venv-accelerators; \
	  fi; \
	done; \
	echo 'the newest jax needs Python 3.12 or newer, and none was found: make accelerators PYTHON=…' >&2; exit 1
	$(pip) jax jaxtyping beartype pytest pytest-xdist hypothesis matplotlib
	@version=$$($(lane) -c 'import jaxlib; print(jaxlib.__version__)'); \
	$(pip) --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-nvvm || \
	  echo 'the plug-in for CUDA does not install here: nothing is compiled for a GPU'; \
	$(pip) "jax[tpu]==$$version" || echo 'libtpu does not install here: nothing is compiled for TPUs'
	touch $@

# The kernels for AArch64: see CONTRIBUTING.md.
aarch64: .venv/installed-test
	PYTHON=$(venv)/python tests/aarch64.sh

clean:
	rm -rf .venv .venv-accelerators build dist site *.egg-info rnnattn/native/*.so compile_commands.json .pytest_cache .mypy_cache .ruff_cache
