# Everything runs from one environment, $(VENV), which scripts/install.sh builds where it is missing or outdated.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
METHODS ?= bd:robust seqkd
SEED ?= 42
OUT ?= runs/demo
MODE ?= offline

BIN := $(VENV)/bin

.PHONY: help install demo test check bench chaos clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  variables: VENV PYTHON TORCH_INDEX_URL (install); METHODS MODE SEED OUT (demo)'

install:  ## build $(VENV) from the lock file, if it is missing or outdated
	@VENV="$(VENV)" scripts/install.sh

demo: install  ## teacher -> store -> students -> evaluation on this machine, without a GPU; table and report in OUT
	$(BIN)/openrlhf-bd demo --methods "$(METHODS)" --mode $(MODE) --seed $(SEED) --output_dir "$(OUT)"

test: install  ## all tests but those that kill processes
	$(BIN)/python3 -m pytest --ignore=tests/chaos --durations=15 -ra

check: install  ## lint, format, types and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python3 -m pytest tests/unit

bench: install  ## benchmarks
	$(BIN)/python3 -m benchmarks

chaos: install  ## tests that kill processes at named points
	$(BIN)/python3 -m pytest -m chaos tests/chaos

clean:  ## remove caches and build outputs; keeps $(VENV) and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . \( -name .git -o -path './.venv*' -o -path ./runs \) -prune -o -type d -name __pycache__ -print0 | xargs -0 -r rm -rf
