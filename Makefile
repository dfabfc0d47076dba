# Every target sets up .venv by itself; python3 (>= 3.11) with pip is all that is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
KERNELS := .venv/.kernels
DOCS := .venv/.docs
# The demo's training budget; with it the whole demo takes twelve to fifteen minutes on two cores. To train
# anew with another one: rm -r checkpoints/demo checkpoints/demo.run
DEMO_STEPS ?= 150
DEMO_MINUTES ?= 4
DEMO := checkpoints/demo
DEMO_PROMPT := def read_config(path):
# The checkpoint that `make bench` times.
CHECKPOINT ?= $(DEMO)

.PHONY: demo test test-fast fuzz kill-test lint format bench docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Only the tests need them: 340 MB. speculators, whose EAGLE-3 ours is compared with, asks for older
# versions of transformers and datasets, so it comes without what it requires but for what it imports.
$(KERNELS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[liger]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps speculators loguru openai sniffio hs-connectors xllamacpp
	touch $@

# Only `make docs` needs them: 60 MB.
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# make prints every command before it runs it: the demo is these seven lines.
demo: $(READY)
	$(BIN)/hispec fetch smollm2-135m
	$(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml train/ee_finetune.py recipe=smollm2-135m output=$(DEMO) steps=$(DEMO_STEPS) max_minutes=$(DEMO_MINUTES)
	$(BIN)/python eval/agreement.py checkpoint=$(DEMO)
	$(BIN)/hispec plan $(DEMO) --prompts 2 --max-new-tokens 24 --repeats 1
	$(BIN)/hispec generate $(DEMO) "$(DEMO_PROMPT)" --raw --max-new-tokens 64 --show-rungs --stats --compare
	$(BIN)/python eval/speed.py checkpoint=$(DEMO) prompts_from=builtin prompts=6 max_new_tokens=32 repeats=1 'baselines=[hf-lookup]'
	$(BIN)/hispec report $(DEMO) --prompts 3 --max-new-tokens 32
	@echo "pictures: $(DEMO)/agreement.png, plan.png, speed.png; all in one page: $(DEMO)/report.html"

# What a pass costs beside its bytes, where the time of a round goes, and every decoder side by side.
bench: $(READY)
	$(BIN)/python eval/passes.py checkpoint=$(CHECKPOINT)
	$(BIN)/python eval/rounds.py checkpoint=$(CHECKPOINT) prompts_from=builtin
	$(BIN)/python eval/speed.py checkpoint=$(CHECKPOINT)

test: $(READY) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-fast: $(READY) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow'

# 10,000 and more cases of files, rows and settings, each time new ones; prints a table of groups.
FUZZ_TIMES ?= 7
fuzz: $(READY)
	OMP_NUM_THREADS=1 FUZZ_TIMES=$(FUZZ_TIMES) $(BIN)/python -m pytest -m fuzz

# 50 kills of training, export, plan, fetch and push, each time at other moments.
KILLS ?= 10
kill-test: $(READY)
	OMP_NUM_THREADS=1 KILLS=$(KILLS) KILL_SEED=$${KILL_SEED:-$$(date +%s)} $(BIN)/python -m pytest -v -rP tests/test_kills.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The drawings are made of the code and of the tables in docs/benchmarks.md; the pages go to site/.
docs: $(DOCS)
	$(BIN)/python docs/drawings/import_graph.py docs/images/import-graph.svg
	$(BIN)/python docs/drawings/speed_bars.py docs/images/speed.svg
	$(BIN)/zensical build --clean --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis runs site
