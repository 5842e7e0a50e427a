# A fresh machine needs Python >= 3.11, make and a C compiler. Everything else goes into .venv at the versions of constraints.txt.
# Variables: PYTHON (python3), VENV (.venv), WORKERS (test processes; 0: none), PYTEST_ARGS, SECONDS and SEED of fuzz.
# pip's own (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) choose where it looks, for a CPU build of torch say.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
SECONDS ?= 120
SEED ?= 0

BIN := $(VENV)/bin
SOURCES := sest cli cache tests benchmarks
# One thread a test process: on few cores, test processes and OpenMP threads would fight for them.
unit newest oldest faults: export OMP_NUM_THREADS ?= 1
# Tests start many processes: what these import is compiled once, also where the environment says otherwise.
unit slow newest oldest faults: export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint types unit slow newest oldest faults fuzz docs dist carry format hooks clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## install, then run the whole pipeline on made-up cells
	rm -rf build/demo
	$(BIN)/sest demo --out build/demo

test: lint types unit ## install, then lint, type-check and run the tests but for `slow` and `faults`

lint: $(VENV)/.installed-test ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test ## mypy, over the product and its tests
	$(BIN)/mypy

unit: $(VENV)/.installed-test ## the tests alone: make unit PYTEST_ARGS="tests/head/test_loss.py -k energy"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

slow: $(VENV)/.installed-test ## the tests that run whole pages, notebooks and benchmarks, or start many processes
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS)

newest: ## the tests with the newest versions that pip finds, and Triton's interpreter, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[test,triton]'
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# pip takes the newest that a bound allows; uv can take the lowest of each.
oldest: ## the tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'uv>=0.5'
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct -e '.[test]'
	.venv-oldest/bin/uv pip list --python .venv-oldest
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

faults: $(VENV)/.installed-test ## the whole fault sweep: kills, full disks, damaged files (long)
	$(BIN)/python -m pytest -n $(WORKERS) -m "full or not full" tests/faults $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test ## files of every kind with random damage: make fuzz SECONDS=600 SEED=1
	PYTHONPATH=tests $(BIN)/python -m helpers.fuzzing --seconds $(SECONDS) --seed $(SEED)

docs: $(VENV)/.installed-docs ## the documentation as a website, into build/docs
	$(BIN)/zensical build --strict

# setuptools would ship modules deleted since the last build. The wheel of a commit is the same bytes wherever it is built.
dist: $(VENV)/.installed-dev ## the sdist and the wheel as PyPI takes them, checked, into dist/
	rm -rf dist build/lib build/bdist.*
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# For the Python of $(VENV): an image with another one wants make carry PYTHON=python3.12 VENV=.venv-3.12.
carry: $(VENV)/.installed-demo ## the fewest wheels that an image with PyTorch needs for sest (carry.txt), into dist/carry/
	rm -rf dist/carry build/lib build/bdist.*
	mkdir -p dist/carry build
	sed '/^typer==/d' constraints.txt > build/carry-constraints.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: -c build/carry-constraints.txt -r carry.txt --dest dist/carry
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist/carry .
	du -sh dist/carry

format: $(VENV)/.installed-test ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev ## run ruff, mypy and the hygiene checks before each commit
	$(BIN)/pre-commit install

clean: ## remove build output and caches
	rm -rf build dist sest.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV) .venv-newest .venv-oldest

# The stamps keep a second `make test` from installing again. -x pip: an interrupted venv is made anew.
$(VENV)/.installed-demo: extras :=
$(VENV)/.installed-test: extras := [test]
$(VENV)/.installed-dev: extras := [test,dev]
$(VENV)/.installed-docs: extras := [docs]

$(VENV)/.installed-demo $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "sest needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing sest$(extras) into $(VENV)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.$(extras)'
	@touch $@
