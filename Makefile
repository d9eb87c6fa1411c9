# Everything runs from .venv, which `make setup` builds with nothing but Python and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
# Each worker has an embedded server of its own; one that all share is crashed by some tests.
PARALLEL = $(if $(EHUB_TEST_DATABASE_URL),,-n $(or $(WORKERS),auto) --maxprocesses 4 --dist worksteal)

.PHONY: demo test lint types check bench bench-road soak fuzz setup clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ehub needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup  ## load real embeddings and search them, from Python and from SQL
	$(BIN)/ehub demo

test: setup  ## the tests, on the embedded Postgres or on EHUB_TEST_DATABASE_URL
	$(BIN)/pytest $(PARALLEL) $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

check: lint types test

bench: setup  ## beside raw hnswlib, and beside pgvector's HNSW with EHUB_TEST_DATABASE_URL; needs FILE=glove.txt
	$(BIN)/python tests/bench/bench.py $(FILE)
	$(BIN)/python tests/bench/bench_versions.py $(FILE)
	$(BIN)/python tests/bench/bench_parts.py $(FILE)
	$(if $(EHUB_TEST_DATABASE_URL),$(BIN)/python tests/bench/bench_sql.py $(FILE))
	$(if $(EHUB_TEST_DATABASE_URL),$(BIN)/python tests/bench/bench_access.py $(FILE))
	$(if $(EHUB_TEST_DATABASE_URL),$(BIN)/python tests/bench/bench_filters.py $(FILE))
	$(if $(EHUB_TEST_DATABASE_URL),$(BIN)/python tests/bench/bench_attach.py $(FILE))
	$(if $(EHUB_TEST_DATABASE_URL),$(BIN)/python tests/bench/bench_writers.py)

bench-road: setup  ## searches in SQL beside pgvector's HNSW, part by part; FILE=embeddings.npz, EHUB_TEST_DATABASE_URL
	$(BIN)/python tests/bench/bench_road.py $(FILE)

soak: setup  ## writers and searchers beside a service that is restarted; EHUB_TEST_DATABASE_URL
	$(BIN)/python tests/bench/soak.py --minutes $(or $(MINUTES),20)

fuzz: setup  ## a million damaged answers for extension ehub_link, under an address sanitizer
	$(BIN)/python tests/faults/fuzz_link.py --answers $(or $(ANSWERS),1000000)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
