# Needs Linux (or macOS), Python 3.11 or later, and make. Everything goes into .venv and out/.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt
# One thread per process: the models of the tests are tiny, and threads only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo demo-smoke results refining test test-slow mutants check docs constraints clean

help:
	@echo "make demo         train two tiny students on the embedded almanac and compare them (minutes, CPU)"
	@echo "make results      train the fifteen students of the full table (hours; says how long, can be interrupted)"
	@echo "make refining     refine students beyond their teacher, the whole table (hours; can be interrupted)"
	@echo "make test         run the tests"
	@echo "make test-slow    run the longer ones too"
	@echo "make mutants      change the mathematics of refinement in small ways; its tests should notice"
	@echo "make check        lint, format, types, documentation"
	@echo "make docs         regenerate the generated parts of the documentation"
	@echo "make constraints  write the installed versions to constraints.txt"
	@echo "make clean        remove what was built; the virtual environment and out/ stay"

.venv/installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "expected Python 3.11 or later, found " + sys.version.split()[0] + "; call make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	touch $@

# Stamps: pip runs again only when what is asked for has changed.
.venv/installed-all: .venv/installed pyproject.toml constraints.txt
	$(INSTALL) -e '.[all]'
	touch $@

.venv/installed-dev: .venv/installed pyproject.toml constraints.txt
	$(INSTALL) -e '.[all,dev]'
	touch $@ .venv/installed-all

demo: .venv/installed-all
	$(BIN)/whyrank demo -o out/demo

# The whole road with next to no training: shows that it runs, not what it reaches.
demo-smoke: .venv/installed-all
	rm -rf out/demo-smoke
	$(BIN)/whyrank demo --num-steps 3 --num-queries 2 -o out/demo-smoke

# Results that are recorded in results/ are not measured again; remove a file there to repeat it.
results: .venv/installed-all
	OMP_NUM_THREADS=1 $(BIN)/python scripts/explaining_table.py out/explaining
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fairness.py

refining: .venv/installed-all
	OMP_NUM_THREADS=1 $(BIN)/python scripts/refining_table.py out/refining

test: .venv/installed-dev
	$(PYTEST) -n 2

test-slow: .venv/installed-dev
	$(PYTEST) -m 'slow or not slow'

# Survivors are listed at the end; docs/refine.md says why each may survive.
mutants: .venv/installed-dev
	$(INSTALL) 'mutmut>=3.8,<4'
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 1
	$(BIN)/python -m mutmut results

check: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src tests scripts benchmarks
	$(BIN)/python scripts/docs.py --check

docs: .venv/installed-dev
	$(BIN)/python scripts/docs.py

constraints: .venv/installed-dev
	$(BIN)/python scripts/constraints.py

clean:
	rm -rf mutants build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
