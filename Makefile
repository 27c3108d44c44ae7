# Every target sets itself up: a machine with Python >= 3.11 and make is enough.
#
#   make demo          train the tiny model and write report.html
#   make test          the tests, without the slow ones (make test-slow for those)
#   make test-newest   the tests of models and trainers with the newest trl, transformers, diffusers and peft, whatever
#                      their number, in an environment of its own; PRE=--pre takes pre-releases too
#   make test-browser  the pages in a real browser; needs Chromium (Debian: apt-get install chromium)
#   make VENV=path ..  use another virtual environment; a torch that is already in it is kept
#   make PYTHON=python3.12 ..  create the environment with this Python

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
PRE ?=
WORKERS ?= 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.trl-unigrpo-installed

.PHONY: help install demo test test-slow test-newest test-browser bench lint format types docs dist clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# Installed again when the dependencies or their pins change. An installed torch is pinned to what it is, so that a
# CPU, CUDA or ROCm build that the user chose is not replaced.
$(STAMP): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trl-unigrpo needs Python 3.11 or newer, but $(PYTHON) is older or missing. Try: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true); \
	sed "s/^torch==.*/torch==$${torch:-$$(sed -n 's/^torch==//p' constraints-dev.txt)}/" constraints-dev.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(VENV)/constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/trl-unigrpo demo $(DEMO_ARGS)

# One thread per worker: more would fight over the same cores. A file per worker: what its tests share is made once.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not browser"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# First what is pinned, then the four as new as pip has them; torch stays. pip's warning of a newer major is expected.
test-newest:
	$(MAKE) VENV=$(NEWEST) install
	grep '^torch==' $(NEWEST)/constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(PRE) \
		trl transformers diffusers peft -c $(NEWEST)/torch.txt
	$(NEWEST)/bin/trl-unigrpo version
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not browser" \
		tests/models tests/trainer*

test-browser: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

bench: $(STAMP)
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
