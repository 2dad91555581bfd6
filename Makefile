# make demo   align the playground model and write a report
# make test   lint, types and every test
# make lint   lint and types only
# make weights   pre-train the playground model again (tens of minutes)
# make unet-weights   the same for the playground's U-Net, on that model's autoencoder and text encoder
# make clean  remove caches and build products (keeps .venv and outputs)
#
# Variables: PYTHON=python3.12 chooses the interpreter, ARGS="key=value ..." overrides the demo's configuration.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Every value that `accelerate launch` would otherwise guess and warn about; a GPU is used where there is one.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
THREADS = $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1))

.PHONY: help demo test lint weights unet-weights clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.installed
	@echo "aligning the playground model: configs/demo.yaml $(ARGS)"
	@OMP_NUM_THREADS=$(THREADS) $(LAUNCH) -m align.train configs/demo.yaml $(ARGS)

# One torch thread per test process: two processes with two threads each are several times slower on two cores.
test: lint
	@echo "tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.installed-test
	@echo "lint"
	@$(BIN)/ruff check .
	@echo "types"
	@$(BIN)/mypy

weights: $(VENV)/.installed
	@echo "pre-training the playground model into align/playground/weights"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m align.playground.pretrain --out align/playground/weights $(ARGS)

unet-weights: $(VENV)/.installed
	@echo "pre-training the playground's U-Net into align/playground/unet_weights"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m align.playground.pretrain --base unet --out align/playground/unet_weights $(ARGS)

clean:
	@echo "removing caches and build products"
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf

# The first interpreter of the list that is new enough makes the environment.
$(BIN)/python:
	@python=; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3.14; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11 or newer is needed and $(PYTHON) is not: install it or run make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$$python cannot create environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing the package (PyTorch included: several GB the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing the package and its test tools (PyTorch included: several GB the first time)"
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.installed $@
