# make quickstart   train, distill, evaluate and generate on the embedded corpus
# make test         the whole test suite
# make bench        the README's benchmark tables
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# GNU OpenMP's threads busy-wait for each other; on a machine shared with other work that costs far more than it saves.
export GOMP_SPINCOUNT ?= 10000

.PHONY: quickstart test lint bench clean

quickstart: $(INSTALLED)
	$(BIN)/python scripts/quickstart.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .

bench: $(INSTALLED)
	$(BIN)/python scripts/bench/conv.py
	$(BIN)/python scripts/bench/fits.py
	$(BIN)/python scripts/bench/branches.py
	$(BIN)/python scripts/bench/lds.py
	$(BIN)/python scripts/bench/generate.py --output runs/bench
	$(BIN)/python scripts/bench/loss.py
	$(BIN)/python scripts/bench/optimizers.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache *.egg-info
