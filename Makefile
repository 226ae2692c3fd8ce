# Everything a contributor runs. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes; each uses one thread, so that they don't compete for cores.
JOBS ?= 2

# What `make quick` runs: each optimizer once, trees, loops, modules, the classes' ways.
QUICK := architecture conformance closed_forms trees schedules nn minimize optim_paths

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test quick demo bench lint format types docs check clean $(VENV)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv and install the development packages into it

$(VENV): $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "diffopt needs Python 3.11 or newer, but '$(PYTHON)' is" \
	       "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# Without TORCHINDUCTOR_VEC_ISA_OK inductor compiles a program for each instruction set of the CPU, to
# see if the compiler knows it: many seconds on a fresh machine. Without TENSORIFY_PYTHON_SCALARS=0
# torch.compile traces whatever takes 0-d float64 tensors twice (torch 2.13: it tries to read them as
# numbers, fails, and starts again); test_compiles_for_real runs as users do.
test: $(STAMP) ## Run the tests (ARGS="-k adam" and the like are passed on)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=1 TENSORIFY_PYTHON_SCALARS=0 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

quick: $(STAMP) ## Run in under a minute what most changes break; compiles nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q \
	  -m "not slow and not thorough" -k "not compile" $(QUICK:%=tests/test_%.py) $(ARGS)

demo: $(STAMP) ## Run the MAML few-shot example (ARGS=--help shows its options)
	$(BIN)/python examples/meta_learning/maml.py $(ARGS)

bench: $(STAMP) ## Measure other libraries, too; tables and plots into docs/ (ARGS=--help)
	$(BIN)/python benchmarks/bench.py $(ARGS)
	$(BIN)/python benchmarks/render.py

lint: $(STAMP) ## Check style, formatting and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## Fix style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types, also those that a user's program sees
	$(BIN)/pyright
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

check: lint types docs test ## All of the above checks

clean: ## Remove build outputs and caches, but not .venv
	rm -rf build dist site .cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
