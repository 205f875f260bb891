# Everything runs in a virtual environment of its own; the first target that needs it makes it.
#   make demo    build the embedded index, answer questions, evaluate, print the table
#   make test    the tests (under 8 minutes); make test-all adds the slow tier
#   make check   all that must be green before a change lands
#   make verify  rerun the cheap evaluations and compare them with the committed results

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-all lint docs check verify clean
.DEFAULT_GOAL := demo

# torch first and pinned: a looser request may bring gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "odqa needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/odqa demo

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m 'not labs'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python scripts/make_docs.py

check: lint test
	$(BIN)/python scripts/make_docs.py --check

verify: install
	$(BIN)/odqa eval eval/embedded.yaml

clean:
	rm -rf $(VENV) artifacts runs .mypy_cache .ruff_cache .pytest_cache
