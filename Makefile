# Needs make and Python 3.11 or later; everything else is installed into .venv by the first target that needs it.
#   make demo    new digits within a budget of 1 % changed predictions: a table, a certificate, plots in runs/demo
#   make test    the tests (PYTEST_ARGS="-x -k path" to choose)
#   make docs    the documentation, in docs/_build/html; every warning is an error
#   make bench   all benchmarks, in a quarter of an hour: tables, JSON and a plot in benchmarks/results
#   make lint    ruff and mypy          make format   ruff's fixes
#   make clean   remove .venv and the caches; results in runs/ stay
# PYTHON=/path/to/python picks the interpreter that .venv is made with.

SHELL := /bin/sh
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := fipoptim recipes tests docs $(wildcard benchmarks)
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Interpreters tried in this order when PYTHON is not given.
CANDIDATES := python3.11 python3 python3.12 python3.13 python

.DEFAULT_GOAL := help
.PHONY: help demo test docs bench lint format clean

help:
	@sed -n 's/^#   //p' Makefile

# More digits are remembered than by default, as 1 % has to be measured on a part of them.
demo: $(STAMP)
	$(BIN) -m recipes.new_task --task1 digits-low --task2 digits-high --out runs/demo \
		--beta auto --max-flips 0.01 --anchors 450 --epochs 22 --baseline-epochs 100

# One thread a worker: the processes share the cores, and sums come out the same in every run.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN) -m pytest $(PYTEST_ARGS)

docs: $(STAMP)
	$(BIN) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(STAMP)
	$(BIN) -m benchmarks

lint: $(STAMP)
	$(BIN) -m ruff check $(SOURCES)
	$(BIN) -m ruff format --check $(SOURCES)
	$(BIN) -m mypy

format: $(STAMP)
	$(BIN) -m ruff check --fix $(SOURCES)
	$(BIN) -m ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fipoptim recipes tests $(wildcard benchmarks) -name __pycache__ -prune -exec rm -rf {} +

# The stamp is the last thing written, and removed before anything changes. A .venv without one is an
# installation that was interrupted, and pip would take its half-copied packages for installed ones: start over.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	fits() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if [ -f $@ ] && fits $(BIN); then \
		rm -f $@; \
	else \
		python='$(PYTHON)'; \
		if [ -n "$$python" ]; then \
			fits "$$python" || { echo "PYTHON=$$python is not Python 3.11 or later." >&2; exit 1; }; \
		else \
			for candidate in $(CANDIDATES); do \
				if fits "$$candidate"; then python=$$candidate; break; fi; \
			done; \
			[ -n "$$python" ] || { echo "No Python 3.11 or later on PATH (tried $(CANDIDATES)): install one, or run make PYTHON=/path/to/python." >&2; exit 1; }; \
		fi; \
		echo "Setting up $(VENV) with $$python; this is done once and takes a few minutes."; \
		rm -rf $(VENV); \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); echo "$$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }; \
	fi
	$(BIN) -m pip install --disable-pip-version-check --no-input -c constraints.txt -e ".[recipes,bench,docs,test,lint]"
	@touch $@
