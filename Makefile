# Every target creates or updates .venv by itself; nothing is reinstalled while pyproject.toml and
# constraints.txt are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
JOBS ?= 2
# One thread in each process: the tests use small tensors, and JOBS processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo test test-slow test-all lint docs bench tables clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "penult needs Python 3.10 or newer; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing penult into $(VENV) (first time: a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@$(INSTALL) --editable ".[all]"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(INSTALL) --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@$(INSTALL) --group docs
	@touch $@

demo: $(VENV)/.core  ## the main job on scikit-learn's digits; writes penult-demo/index.html
	@$(BIN)/penult demo

test: $(VENV)/.dev  ## the tests to run after a change: less than four minutes on two cores
	@$(PYTEST) $(ARGS)

test-slow: $(VENV)/.dev  ## the slow tests, which `make test` leaves out
	@$(PYTEST) --tier slow $(ARGS)

test-all: $(VENV)/.dev  ## both
	@$(PYTEST) --tier all $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into docs/_build/html
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.dev  ## run every benchmark that needs no data folder and refresh the tables
	@$(BIN)/python benchmarks/vmf.py
	@$(BIN)/python benchmarks/extract.py
	@$(BIN)/python benchmarks/families.py
	@$(BIN)/python benchmarks/tables.py

tables: $(VENV)/.dev  ## rewrite the tables of README and docs from benchmarks/results
	@$(BIN)/python benchmarks/tables.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) docs/_build penult-demo .pytest_cache .ruff_cache .mypy_cache
