# make run   trains the default experiment      make test   lint, types and tests
#                                               make quick  lint, and the tests that are not slow
# Each makes .venv first, once; running it again installs nothing.

PYTHON ?= python3
CONFIG ?= lstm_digits
# What `make test` installs besides the package; EXTRAS=test,oracles adds the live peers.
EXTRAS ?= test

comma := ,
venv := .venv/bin
native := setup.py $(wildcard rnnattn/native/src/*)

.PHONY: run test quick lint types format clean

run: .venv/installed-experiments
	$(venv)/python -m experiments run $(CONFIG)

test: .venv/installed-$(subst $(comma),-,$(EXTRAS)) lint types
	$(venv)/python -m pytest

quick: .venv/installed-$(subst $(comma),-,$(EXTRAS)) lint
	$(venv)/python -m pytest -m "not slow"

lint: .venv/installed-$(subst $(comma),-,$(EXTRAS))
	$(venv)/ruff format --check --quiet
	$(venv)/ruff check --quiet
	$(venv)/clang-format --dry-run --Werror rnnattn/native/src/*

types: .venv/installed-$(subst $(comma),-,$(EXTRAS))
	$(venv)/mypy

format: .venv/installed-test
	$(venv)/ruff format
	$(venv)/ruff check --fix
	$(venv)/clang-format -i rnnattn/native/src/*

# How each C++ source is compiled, for clangd and other tools that read C++.
compile_commands.json: .venv/installed-$(subst $(comma),-,$(EXTRAS))
	$(venv)/python setup.py --quiet compile_commands

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rnnattn needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed-experiments: .venv/python pyproject.toml $(native)
	$(venv)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	touch $@

.venv/installed-$(subst $(comma),-,$(EXTRAS)): .venv/python pyproject.toml $(native)
	$(venv)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info rnnattn/native/*.so compile_commands.json .pytest_cache .mypy_cache .ruff_cache
