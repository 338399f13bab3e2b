# make demo | quick | test | mutations | gpu-test | bench | figures | lint | docs | clean | help. Needs python3 (3.11 or later), make and g++; brings the rest in .venv.
PYTHON ?= python3
# The interpreter that runs things; `make gpu-test RUN=python3` uses one that has everything already, and builds no .venv.
RUN ?= .venv/bin/python
BENCH ?=
# A process of tests per core; `make test ASIDE=` runs one after another.
ASIDE ?= -n auto --dist worksteal

PIP := .venv/bin/python -m pip -qq --disable-pip-version-check --no-input install --no-deps
export PYTHONPATH := $(CURDIR)

ifeq ($(RUN),.venv/bin/python)
BASE := .venv/base.stamp
TEST := .venv/test.stamp
LINT := .venv/lint.stamp
PLOT := .venv/bench.stamp
DOCS := .venv/docs.stamp
endif

.PHONY: help demo quick test test-cpu mutations gpu-test bench figures lint format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      what Vidrial does, in a minute; needs no GPU"
	@echo "make quick     the tests that take no time, within a minute"
	@echo "make test      all tests; those that need a GPU are skipped without one"
	@echo "make test-cpu  the tests that need none, a process per core"
	@echo "make mutations plant 46 mistakes in the examples, and see each found by vidrial check (an hour or less)"
	@echo "make gpu-test  the tests that need a GPU"
	@echo "make bench     the benchmarks beside the peers, on a GPU (BENCH=... passes arguments)"
	@echo "make figures   the figures of examples/charlm, from its results"
	@echo "make lint      ruff and mypy"
	@echo "make format    ruff's formatter, in place"
	@echo "make docs      the documentation as a site, in build/site"
	@echo "make clean     remove .venv, build and tool caches"
	@echo "RUN=python3    use this interpreter as it is, and build no .venv"

demo: $(BASE)
	@$(RUN) -m vidrial demo

# What tests/slow.txt names is left out; tests that have become slow show below the dots.
quick: $(TEST)
	@$(RUN) -m pytest $(ASIDE) -m "not slow and not gpu" --durations 5 --durations-min 3

test: test-cpu gpu-test

test-cpu: $(LINT)
	@$(RUN) -m pytest $(ASIDE) -m "not gpu"

mutations: $(TEST)
	@$(RUN) tests/mutations/run.py

# Tests that share a GPU run one after another.
gpu-test: $(LINT)
	@$(RUN) -m pytest tests/gpu

bench: $(PLOT)
	@for script in benchmarks/compile.py benchmarks/power_retention.py benchmarks/flash_attention.py; do $(RUN) $$script $(BENCH) || exit 1; done

figures: $(PLOT)
	@$(RUN) examples/charlm/figures.py

lint: $(LINT)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy --strict vidrial examples

format: $(LINT)
	@$(RUN) -m ruff format .

docs: $(DOCS)
	@$(RUN) -m zensical build --strict --clean

clean:
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Vidrial needs Python 3.11 or later, not {v[0]}.{v[1]}; make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

.venv/base.stamp: requirements/base.txt | .venv/bin/python
	@echo "installing $<"
	@$(PIP) -r $<
	@touch $@

# Where torch's wheel is the CUDA one it needs its libraries, GPU or not.
.venv/test.stamp: requirements/test.txt requirements/torch-cuda.txt .venv/base.stamp
	@echo "installing $<"
	@$(PIP) -r $<
	@.venv/bin/python -c 'import torch' 2>/dev/null || { echo "installing requirements/torch-cuda.txt"; $(PIP) -r requirements/torch-cuda.txt; }
	@touch $@

.venv/lint.stamp: requirements/lint.txt .venv/test.stamp
	@echo "installing $<"
	@$(PIP) -r $<
	@touch $@

.venv/bench.stamp: requirements/bench.txt .venv/test.stamp
	@echo "installing $<"
	@$(PIP) -r $<
	@touch $@

.venv/docs.stamp: requirements/docs.txt .venv/lint.stamp
	@echo "installing $<"
	@$(PIP) -r $<
	@touch $@
