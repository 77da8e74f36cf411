# The two commands: `make demo` and `make test`. Each sets up what is missing, once.

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal

# One thread for each process: workers run side by side, and results do not depend on the number of cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-weights test check lint types layers duplicates fast-tests clean

help: ## this text
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing into the active environment, else .venv
	@$(PYTHON) tools/setup_environment.py --venv "$(VENV)"

demo: setup ## embedded data, a short training, AP on held-out clips, overlay pictures
	@"$(PY)" tools/run_demo.py

demo-weights: setup ## make the checkpoint that the demo continues from, anew (long)
	@"$(PY)" tools/run_demo.py --make-weights

test: setup ## all tests
	@"$(PY)" -m pytest $(PARALLEL)

check: lint types layers duplicates fast-tests ## the gates: lint, format, types, layers, duplicate blocks, fast tests

lint: setup
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .

types: setup
	@"$(PY)" -m mypy vis

layers: setup
	@"$(VENV)/bin/lint-imports" --no-logo

duplicates: setup
	@"$(PY)" tools/check_duplicates.py

fast-tests: setup
	@"$(PY)" -m pytest $(PARALLEL) -m "not slow"

clean: ## remove caches and build leftovers; keeps the environment, data sets and results
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -rf datasets/__pycache__
	find vis tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
