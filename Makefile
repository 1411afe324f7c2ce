# make train | make test | make lint | make types
# JAX=cuda13 or JAX=tpu installs jax for that accelerator; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
JAX ?= cpu
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(JAX)
JAX_EXTRA := $(if $(filter-out cpu,$(JAX)),[$(JAX)])

.PHONY: train test lint types format clean
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(BIN)/python train.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' 'jax$(JAX_EXTRA)'
	touch $@
