# Everything a fresh clone needs: `make demo` and `make test` build their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH = $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
BASE = $(VENV)/.base.stamp
TOOLS = $(VENV)/.tools.stamp

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-fast test-gpu faults lint types format check bench bench-quick bench-gpu clean

help: ## Say what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'

demo: $(BASE) ## Run the whole pipeline on the embedded world
	$(BIN)/alignpipe run

PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(TOOLS) ## Run the tests
	$(PYTEST) -m "not slow"

test-all: $(TOOLS) ## Run the slow tests too: kills and restarts, real data, a built wheel
	$(PYTEST)

test-fast: $(TOOLS) ## Run the tests of what needs no pipeline
	$(PYTEST) -m "not slow" tests/losses tests/data tests/toy tests/training tests/evaluation

faults: $(TOOLS) ## Kill, damage, fill and attack it, every case, and print what came of it
	$(PYTEST) tests/faults --all-faults

test-gpu: $(TOOLS) ## Run what needs a GPU, and print its table (docs/launch.md)
	$(BIN)/python -m benchmarks.gpu

BENCH = $(BIN)/python -m benchmarks
ROWS = $(if $(DATA),--data $(DATA))

bench: $(TOOLS) ## Time everything against the peers, on DATA=FOLDER or the embedded world: hours (docs/performance.md)
	$(BENCH).pipeline
	$(BENCH).growth $(ROWS)
	$(BENCH) $(ROWS)

bench-gpu: $(TOOLS) ## The same on a GPU: a Llama of a billion weights in bf16 against the peers
	$(BENCH).gpu_peers $(ROWS)

bench-quick: $(TOOLS) ## The cheapest of it, in minutes: small model, few rows, one setting of each peer
	$(BENCH) $(ROWS) --quick sft dpo-precomputed

lint: $(TOOLS) ## Look for slips in style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS) ## Check types
	$(BIN)/mypy

format: $(TOOLS) ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test ## lint, types and test

clean: ## Remove the environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: it is by far the largest, and a failed download is then repeated by itself.
$(VENV)/.torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "alignpipe needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	touch $@

$(BASE): $(VENV)/.torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# The last TRL with PPO lies apart, since the one beside it has the same name; tests compare with both.
$(TOOLS): $(VENV)/.torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peers/trl-1.9.0 trl==1.9.0
	touch $@
