# make quickstart   train, distill, evaluate and generate on the embedded corpus
# make test         the whole test suite
# make lint         style, and the types of everything but the tests
# make bench-cpu    measures the tables of docs/results.md on the CPU into results/cpu, under 45 minutes on two cores; trainings
#                   that are finished in runs/ are taken as they are. BENCH_TEXT=DIR prepares another text
# make gpu-check    on a GPU: its tests, and whether it computes what the CPU does, 5 minutes; see docs/training.md
# make bench-gpu    on a GPU: the tables of docs/results.md into results/gpu, 20 minutes; STAGES="conv loss" measures some
# make gpu-train    on a GPU: DATA=DIR, a folder of text or prepared data: trains 340M for some minutes, kills and resumes
#                   it, and tries FSDP, DDP, Muon and checkpointing. These three install nothing: they take .venv if it is
#                   there, else PYTHON. TOY=--toy runs them in toy sizes on a CPU
# make test-oldest  the test suite with the oldest versions that pyproject.toml allows, in an environment of its own
# make experiments  the papers' figures and ours, docs/experiments.md, into results/experiments: under two hours on two
#                   cores, the half of it lra. EXPERIMENTS="recall text" runs some, SIZE=--quick or SIZE=--full another size;
#                   with FLASH_STU_EXTRA_DATA text.py runs on the text there too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := $(BIN)/python scripts/bench
INSTALLED := $(VENV)/.installed

# GNU OpenMP's threads busy-wait for each other; on a machine shared with other work that costs far more than it saves.
export GOMP_SPINCOUNT ?= 10000

ifdef FLASH_STU_EXTRA_DATA
BENCH_TEXT ?= $(FLASH_STU_EXTRA_DATA)/text
export TIKTOKEN_CACHE_DIR ?= $(FLASH_STU_EXTRA_DATA)/tiktoken
endif
BENCH_TEXT ?= embedded

.PHONY: quickstart test test-oldest lint bench-cpu gpu-check bench-gpu gpu-train experiments clean

quickstart: $(INSTALLED)
	$(BIN)/python scripts/quickstart.py

# Two files of tests at a time, in the order in which they are found: the long ones are not left for the end.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(BIN)/python $(PYTEST)

OLDEST := .venv-oldest
TORCH ?= $(shell grep '^torch==' constraints-oldest.txt)
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch==' constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --progress-bar off '$(TORCH)' -c $(OLDEST)/constraints.txt -e '.[dev]'
	$(OLDEST)/bin/python $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

PUBLISHED := model.stu_branches=shared optimizer.name=adamw optimizer.learning_rate=3e-3
bench-cpu: export CUDA_VISIBLE_DEVICES :=
bench-cpu: $(INSTALLED)
	$(BENCH)/conv.py --dtype float32 --output results/cpu
	$(BENCH)/conv.py --dtype bfloat16 --output results/cpu
	$(BENCH)/layers.py --output results/cpu
	$(BENCH)/hotspots.py --config configs/quickstart.yaml $(PUBLISHED) --output results/cpu
	$(BENCH)/training.py --config configs/quickstart.yaml $(PUBLISHED) --output results/cpu
	OMP_NUM_THREADS=1 $(BENCH)/generation.py --output results/cpu  # a token is too little work for more threads
	$(BENCH)/fits.py --output results/cpu
	$(BENCH)/lds.py --output results/cpu
	$(BENCH)/loss.py --output results/cpu
	$(BENCH)/data.py --text $(BENCH_TEXT) --output results/cpu
	$(BENCH)/imports.py --output results/cpu
	$(BENCH)/optimizers.py --output results/cpu
	$(BENCH)/tables.py

GPU = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON)) scripts/gpu.py $(TOY)
STAGES ?= bench
gpu-check:
	$(GPU) check

bench-gpu:
	$(GPU) $(STAGES)

gpu-train:
	$(GPU) train --data "$(DATA)"

BOOKS = --name books $(or $(SIZE),--steps 120) --bpe 4096 --output results/experiments \
	data.dataset=$(FLASH_STU_EXTRA_DATA)/text data.max_documents=2000
EXPERIMENTS ?= $(basename $(notdir $(shell grep -l '^def render' scripts/experiments/*.py)))
experiments: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev,experiments,robotics]'
	set -e; for name in $(EXPERIMENTS); do $(BIN)/python scripts/experiments/$$name.py $(SIZE) --output results/experiments; done
	$(if $(and $(FLASH_STU_EXTRA_DATA),$(filter text,$(EXPERIMENTS))),$(BIN)/python scripts/experiments/text.py $(BOOKS))
	$(BENCH)/tables.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .ruff_cache *.egg-info
