# Each target makes .venv with pip if it is missing or older than pyproject.toml.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-slow test-faults lint docs

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/yolosearch run studies/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not faults'

# Processes are killed at random for five minutes a test; by themselves these tests do it for one.
test-faults: $(STAMP)
	YOLOSEARCH_FAULT_SECONDS=$${YOLOSEARCH_FAULT_SECONDS:-300} $(BIN)/python -m pytest -m faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The references and figures that are generated; a test fails while they are stale.
docs: $(STAMP)
	$(BIN)/python docs/make.py
