# The two commands of a newcomer: `make launch` and `make test`. Both make .venv first where it is missing or outdated.
# The only things needed beforehand are Python 3.11, a C compiler and a package index.

PYTHON ?= python3.11
ifeq (, $(shell command -v $(PYTHON) 2>/dev/null))
  PYTHON := python3
endif
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# One thread a process: oversubscribed threads made a one-second trial take twelve.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Processes that run the tests. One of them takes all tests that share the Ray cluster, so that more than three gain little.
WORKERS ?= 2
# Tests start many processes of ours: without files of bytecode each would compile all of it again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(ONE_THREAD) $(BIN)/python -m pytest

.PHONY: help launch test test-fast test-long check format setup bench clean

help:
	@echo "make launch     run the digits sweep: from one command to a Pareto front"
	@echo "make test       checks and the whole test suite"
	@echo "make test-fast  the tests without Ray, a browser, or anything that takes long"
	@echo "make test-long  random kills, and every block of the documentation"
	@echo "make check      formatter, linter, type checker, import contracts"
	@echo "make format     let the formatter and the linter mend what they can"
	@echo "make bench      every benchmark, quick"
	@echo "make clean      remove the environment and caches (runs are kept)"

setup: $(READY)

$(READY): constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dsnet-orch needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[deploy,serve,test,check]"
	@touch $(READY)

# Only the tests need the second engine, which is large.
ENGINES := $(VENV)/.engines
$(ENGINES): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[openvino]"
	@touch $(ENGINES)

launch: $(READY)
	$(BIN)/dsnet-orch launch examples/digits.yaml

# The checks use the moments in which the tests wait; what they find is shown at the end.
test: $(ENGINES)
	@$(MAKE) --no-print-directory check > $(VENV)/check.log 2>&1 & checks=$$!; \
	$(PYTEST) -n $(WORKERS); tests=$$?; \
	wait $$checks; checks=$$?; cat $(VENV)/check.log; \
	exit $$((tests != 0 || checks != 0))

test-fast: $(ENGINES)
	$(PYTEST) -n $(WORKERS) -m "not (ray or browser or slow or long)"

test-long: $(ENGINES)
	$(PYTEST) -m long

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@for name in $$($(BIN)/python -m benchmarks | cut -d' ' -f1); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
