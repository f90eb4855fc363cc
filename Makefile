# Everything runs in a virtual environment of its own, .venv, which is made when it is missing and installed into again
# only when one of the files that describe the package has changed. To start afresh: rm -rf .venv
#
#     make test PYTHON=python3.12                     another interpreter (takes effect when .venv is made)
#     make train ARGS="--seed 1"                      another seed of the first look (ARGS="--help" lists the options)
#     make train ENV=HalfCheetah-v5                   the real thing: through the RL Zoo, at the task's full budget
#     make train ENV=Hopper-v5 ARGS="--seed 1"        the same with options of rl_zoo3.train

PYTHON ?= python3
ENV :=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DESCRIPTION := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard sb3_dipo/zoo/startup/*)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test docs format clean
unexport PYTHONPATH PYTHONHOME

help:
	@echo "make train    train DIPO on Pendulum-v1 for a few minutes, and film it before and after"
	@echo "              ENV=HalfCheetah-v5 trains another task through the RL Zoo, at its full budget, which takes hours"
	@echo "make test     lint, check the format and the types, run the tests"
	@echo "make docs     build the documentation: docs/_build/index.html"
	@echo "make format   format the code and sort the imports"
	@echo "make clean    remove caches and build leftovers; .venv and runs stay"

train: $(VENV)/.installed
ifeq ($(ENV),)
	$(BIN)/python examples/train.py $(ARGS)
else
	$(BIN)/python -m rl_zoo3.train --algo dipo --env $(ENV) --log-folder runs --eval-freq 10000 --progress $(ARGS)
	$(BIN)/python -m rl_zoo3.enjoy --algo dipo --env $(ENV) --folder runs --no-render --n-timesteps 4000 --load-best
	-$(BIN)/python -m rl_zoo3.record_video --algo dipo --env $(ENV) --folder runs --n-timesteps 1000 --load-best
endif

test: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --cov --numprocesses auto --dist worksteal

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs -d docs/_build/.doctrees . docs/_build
	@echo "The documentation is in docs/_build/index.html."

format: $(VENV)/.installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
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
	@$(PIP_INSTALL) --editable '.[zoo]'
	@touch $@

$(VENV)/.installed-docs: $(DESCRIPTION) | $(VENV)/.torch
	@echo "Installing sb3_dipo and Sphinx into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.installed-tests: $(DESCRIPTION) | $(VENV)/.torch
	@echo "Installing sb3_dipo and its test tools into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[zoo,box2d,docs,export,plots,tests,cluster]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-docs
