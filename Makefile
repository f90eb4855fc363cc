# Everything runs in a virtual environment of its own, .venv, which is made when it is missing and installed into again
# only when one of the files that describe the package has changed. To start afresh: rm -rf .venv
#
#     make test PYTHON=python3.12                     another interpreter (takes effect when .venv is made)
#     make train ARGS="--env Hopper-v5 --seed 1"      options of examples/train.py

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DESCRIPTION := setup.cfg pyproject.toml constraints.txt $(wildcard setup.py)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test format clean
unexport PYTHONPATH PYTHONHOME

help:
	@echo "make train    train DIPO on a MuJoCo task and show what it learned (ARGS=\"--help\" lists the options)"
	@echo "make test     lint, check the format and the types, run the tests"
	@echo "make format   format the code and sort the imports"
	@echo "make clean    remove caches and build leftovers; .venv and runs stay"

train: $(VENV)/.installed
	$(BIN)/python examples/train.py $(ARGS)

test: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

format: $(VENV)/.installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sb3_dipo hyperparams tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts there: where it is, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "sb3_dipo needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not one of them ($$($(PYTHON) --version 2>&1))." >&2; \
		echo "Name one that is, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyTorch goes first and alone: it is by far the largest part, and a build that is already in .venv (one for the CPU only,
# say) is kept if its version fits.
$(VENV)/.torch: constraints.txt | $(BIN)/pip
	@echo "Installing PyTorch into $(VENV); the first time this is a large download ..."
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed: $(DESCRIPTION) | $(VENV)/.torch
	@echo "Installing sb3_dipo into $(VENV) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-tests: $(DESCRIPTION) | $(VENV)/.torch
	@echo "Installing sb3_dipo and its test tools into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[tests]'
	@touch $@ $(VENV)/.installed
