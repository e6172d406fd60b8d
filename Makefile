# Two commands: `make demo` runs the main job, `make test` the tests. Both set up .venv first.
# `make test PYTHON=python3.13` does so with another Python, in place of the .venv that is there.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUNS := $(VENV)/.runs-$(VERSION)
STAMP := $(VENV)/.installed-$(VERSION)

.PHONY: demo test slow check docs floors clean

demo: $(RUNS)
	$(BIN)/lopt train demo

test: $(STAMP) check
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/_build

# The lowest versions that pyproject.toml allows, in an environment of their own; best with 3.11.
floors:
	$(PYTHON) -m venv --clear $(VENV)/floors
	$(VENV)/floors/bin/python -m pip install --quiet uv
	$(VENV)/floors/bin/uv pip install --quiet --python $(VENV)/floors --resolution lowest-direct --editable '.[test]'
	$(VENV)/floors/bin/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal tests/core tests/learned tests/experiment tests/test_border.py

# Debian keeps ensurepip in a package of its own; without it, the pip at hand installs another.
$(RUNS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lopt needs Python 3.11 or newer; try make $(MAKECMDGOALS) PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What tests need besides is large: PyTorch, Transformers, Lightning.
$(STAMP): $(RUNS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
