# Everything a newcomer types: `make run`, `make test`. `make` alone lists the rest.
# The stamps in .venv remember what is installed, so a second call starts at once.

PYTHON ?= python3
# Options for installing torch, such as an index that holds CPU builds, where pip would otherwise
# take one with CUDA packages of several GB: make run TORCH_OPTIONS="--index-url ..."
TORCH_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# Two processes of one thread each; a file's tests stay together, for what its fixtures build
# (tests/conftest.py says which).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
PINS := pyproject.toml constraints.txt

# Where this is set, every `linnet` that a test starts would be compiled anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help run train test test-all check bench bench-million bench-serving bench-distributed bench-gpu clean

help: ## show this list
	@echo "linnet: train, load and run hybrid lightning-attention language models"
	@echo
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		while IFS='	' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  PYTHON=python3.12     which Python to use (3.11 or newer)"
	@echo "  TORCH_OPTIONS=...     pip options for torch, such as --index-url"

run: $(VENV)/run.stamp ## install linnet and serve the bundled model, with a chat page
	$(BIN)/linnet serve

train: $(VENV)/run.stamp ## train a small model for a few minutes and report on it
	$(BIN)/linnet train recipes/nano.toml --resume

test: $(VENV)/dev.stamp ## run the tests (a few minutes)
	$(PYTEST)

test-all: $(VENV)/dev.stamp ## run the slow tests as well, with coverage
	$(PYTEST) -m "slow or not slow" --cov=linnet --cov-report=term

check: $(VENV)/dev.stamp ## check format, lint, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/codespell

bench: $(VENV)/dev.stamp ## measure this machine and write benchmarks/results (about 15 minutes)
	$(BIN)/python benchmarks/lightning_attention.py
	$(BIN)/python benchmarks/bench_94m.py
	$(BIN)/python scripts/readme_figures.py
	$(BIN)/python scripts/performance_page.py

bench-million: $(VENV)/dev.stamp ## prefill a million tokens and draw docs/million.png
	$(BIN)/python benchmarks/million.py
	$(BIN)/python scripts/performance_page.py

bench-serving: $(VENV)/dev.stamp ## measure the engine against transformers (about 10 minutes)
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving.py --long 1048576
	$(BIN)/python benchmarks/serving.py --cold-start
	$(BIN)/python scripts/performance_page.py

bench-distributed: $(VENV)/dev.stamp ## measure one against two processes, and LASP+ (about 8 minutes)
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python scripts/performance_page.py

bench-gpu: $(VENV)/dev.stamp ## measure the GPU of this machine
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python scripts/performance_page.py

clean: ## delete .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist htmlcov .pytest_cache .ruff_cache .coverage
	find linnet tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) was not found; install Python 3.11 or newer, or pass PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "linnet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Pass PYTHON=..."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and pinned: left to the resolver, a newer build with other CUDA packages may win.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/python.stamp
	@echo "Installing torch (a large download the first time)"
	@$(PIP) install $(TORCH_OPTIONS) -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/run.stamp: $(PINS) $(VENV)/torch.stamp
	@echo "Installing linnet"
	@$(PIP) install -c constraints.txt -e '.[data,train,serve]'
	@$(BIN)/python -c 'from linnet.ops.native import library; library()'
	@touch $@

$(VENV)/dev.stamp: $(PINS) $(VENV)/torch.stamp
	@echo "Installing linnet with the tools for development"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/run.stamp $@
