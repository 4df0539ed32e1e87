# make demo    the whole way on a real model: set up, fetch it, compile it, run it, compare with onnxruntime
# make test    set up, check, and run the tests, two files at a time, in a quarter of an hour
# make slow    the tests that take longer: every node test of ONNX, 20,000 damaged models, the large real models
# make setup   the environment (.venv, every extra in) and the models that the tests use
# make check   linters, types and the floors of the package        make format   put the code in its form
# make clean   what can be made again, except .venv and the models
# make models-real   the large models too (145 MB), which slow tests and 'benchmarks.models' use
#
# Needs python3 (3.10 or newer, with venv), make and g++. PYTHON=python3.12 takes another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS := .cache/models

INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test slow check format clean models-demo models-eval models-all models-real
.DELETE_ON_ERROR:

setup: $(INSTALLED) models-all

demo: $(INSTALLED) models-demo
	@$(BIN)/python examples/demo.py

test: setup check
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

slow: setup models-real
	@$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

check: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo "run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format

clean:
	rm -rf build dist demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find tvm_ternary tests examples -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is older than 3.10; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/2] making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) \
	    || { echo "cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "[2/2] installing tvm-ternary and what it needs into it (about 1 GB, some minutes)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Leaves alone what is there already.
models-demo models-eval models-all models-real: models-%: $(INSTALLED)
	@$(BIN)/python examples/fetch_models.py --folder $(MODELS) $*
