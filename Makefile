# One word per chore. Everything lives in $(VENV); nothing outside this folder is changed.
VENV ?= .venv
export VENV
BIN = $(VENV)/bin
DEMO ?=
TESTS ?=
WORKERS ?= 2
BENCHES ?= fronts methods memory experts levers ceilings sizes workers

.PHONY: help demo up test test-slow lint format bench clean setup-user setup-dev

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: setup-user ## the whole job on the demo model, from nothing to a downloaded model
	$(BIN)/nullspace demo $(DEMO)

up: setup-user ## the service on this machine, until Ctrl-C
	$(BIN)/nullspace up

# Each worker has servers of its own. A worker steals half of what another has still to do, so
# modules stay together. The slow tests measure recovery times: they have the machine to themselves.
test: lint ## style, types, import contracts and every test that is not slow; WORKERS=0: one process
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(TESTS)

test-slow: setup-dev ## the slow tests: crash storms, every architecture's fast paths
	$(BIN)/python -m pytest -m slow $(TESTS)

lint: setup-dev ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## the measurements of bench/
	@for name in $(BENCHES); do \
		echo "bench.$$name"; $(BIN)/python -m bench.$$name || exit 1; done

clean: ## remove what make made (not your data)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-user:
	@./setup.sh worker,embedded

setup-dev:
	@./setup.sh worker,embedded,dev
