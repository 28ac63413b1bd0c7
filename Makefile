# make demo   the main job on embedded real data          make check      linter, formatter, types
# make test   the tests not marked slow                   make test-all   also the slow ones
# make dev    only the environment, .venv                 make fuzz       recipes and command lines at random, CASES= SEED=
# make docs   the documents as HTML, in build/docs
# make study-sources, study, study-full   do the papers' findings hold here? an hour, an hour and a half, and two more
# make chaos  100 kills, an hour (docs/results/reliability.md)
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
CASES ?= 1000
SEED ?= 0
export HF_HUB_OFFLINE ?= 1
# the environment is installed uncompiled, which halves its time; python keeps what it compiles at the first import
export PYTHONDONTWRITEBYTECODE :=

.PHONY: dev docs demo test test-all test-slow fuzz chaos check study-sources study study-full
dev: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON="; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# type checkers cannot follow the editable install's mapping; these links, made after it, show them the way
	@ln -sfn ../recipes dlm_lightning/recipes; ln -sfn ../callbacks dlm_lightning/callbacks; ln -sfn ../configs dlm_lightning/configs
	@touch $@

# Train the AR source once, convert it, print what happened.
demo: dev
	@if ls runs/ar_source/*/model/config.json >/dev/null 2>&1; then echo "the AR source is there: $$(ls -d runs/ar_source/*/model | sort -V | tail -n 1)"; \
	else $(BIN)/dlm fit ar_source; fi
	@set -o pipefail; $(BIN)/dlm fit block_causal | tee runs/demo.log
	@$(BIN)/dlm summary "$$(sed -n 's/^run: //p' runs/demo.log | tail -n 1)"

test: dev
	$(BIN)/pytest

test-slow: dev
	$(BIN)/pytest -m slow

test-all: test test-slow

study-sources: dev
	$(BIN)/python benchmarks/study.py sources

study: study-sources
	$(BIN)/python benchmarks/study.py context
	$(BIN)/python benchmarks/study.py masking
	$(BIN)/python benchmarks/study.py verdicts

study-full: study
	$(BIN)/python benchmarks/study.py full
	$(BIN)/python benchmarks/study.py verdicts

chaos: dev
	$(BIN)/python benchmarks/chaos.py --kills 100 --seed 0 --write

# As many cases of each property as CASES says, the same ones for the same SEED; in the tests there are 40.
fuzz: dev
	DLM_FUZZ_CASES=$(CASES) $(BIN)/pytest -n 0 --timeout 7200 --hypothesis-seed $(SEED) --hypothesis-show-statistics tests/test_fuzz.py

# The documents and a reference from docstrings as HTML, in build/docs; a link that leads nowhere is an error.
docs: dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --jobs auto docs build/docs
	@echo build/docs/index.html

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
