# Every target sets up .venv by itself; python3 (>= 3.11) with pip is all that is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The demo's training budget: with it the whole demo stays under ten minutes on two cores.
DEMO_MINUTES ?= 5
DEMO := checkpoints/demo
DEMO_PROMPT := import os\nimport sys\n\ndef main():\n

.PHONY: demo test test-fast lint format bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m 'not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
