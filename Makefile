# make train | make test | make test-all | make test-lowest | make lint | make types | make docs
# make accelerators
# JAX=cuda13 or JAX=tpu installs jax for that accelerator; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
JAX ?= cpu
ARGS ?=

BIN := $(VENV)/bin
# The longest files have few tests, and would come last if files were sorted by these.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
LOWEST := $(VENV)-lowest
TRAINING := $(VENV)/.installed-train-$(JAX)
ACCELERATORS := $(VENV)-accelerators
INSTALLED := $(VENV)/.installed-$(JAX)
JAX_EXTRA := $(if $(filter-out cpu,$(JAX)),[$(JAX)])

.PHONY: train test test-all test-lowest lint types docs accelerators format clean
.DELETE_ON_ERROR:

# Resumes a run that was stopped, and leaves a finished one.
train: $(TRAINING)
	$(BIN)/python train.py --auto-resume $(ARGS)

# Without most optimizations, programs compile faster; test-all compiles the library as it is used.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# With the lowest versions that pyproject.toml allows: the library alone with jax and optax, then the
# tests. Warnings are those of old packages about each other.
test-lowest: $(INSTALLED)
	$(BIN)/uv venv --quiet --clear --python 3.11 $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct .
	$(LOWEST)/bin/python -I -m optax_autoscale
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --upgrade --editable . --group dev
	$(LOWEST)/bin/python -m pytest $(PARALLEL) -W default $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: export PATH := $(abspath $(BIN)):$(PATH)
types: $(INSTALLED)
	pyright
	pyright --verifytypes optax_autoscale --ignoreexternal

docs: $(VENV)/.installed-docs
	rm -rf docs/_build
	$(BIN)/sphinx-build --fail-on-warning --nitpicky -d docs/_build/doctrees docs docs/_build/html

# Compiles for a TPU and a GPU, neither of which has to be here: see benchmarks/README.md.
accelerators: $(ACCELERATORS)/.installed
	$(ACCELERATORS)/bin/python -m benchmarks.compiled $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(ACCELERATORS)

# Groups of dependencies need pip 25.1; older Pythons bring an older one.
$(BIN)/.pip:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	touch $@

# Sizes as du shows them with JAX=cpu, Python 3.11 on Linux. Python compiles what it imports; pip would
# compile all of it, which takes a third of the time.
$(TRAINING): pyproject.toml | $(BIN)/.pip
	@echo 'Installing what train.py needs into $(VENV), once: about 800 MB (more with JAX=cuda13 or tpu) ...'
	$(BIN)/python -m pip install --quiet --no-compile --editable . --group train 'jax$(JAX_EXTRA)'
	touch $@

$(INSTALLED): pyproject.toml | $(BIN)/.pip
	@echo 'Installing what the tests need into $(VENV), once: about 1.3 GB (more with JAX=cuda13 or tpu) ...'
	$(BIN)/python -m pip install --quiet --no-compile --editable . --group dev 'jax$(JAX_EXTRA)'
	touch $@ $(TRAINING)

$(VENV)/.installed-docs: $(INSTALLED)
	@echo 'Installing what the site needs into $(VENV) ...'
	$(BIN)/python -m pip install --quiet --no-compile --editable . --group docs
	touch $@

$(ACCELERATORS)/.installed: benchmarks/compiled/requirements.txt
	@echo 'Installing the compilers of a TPU and a GPU into $(ACCELERATORS), once: about 2 GB ...'
	$(PYTHON) -m venv --clear --upgrade-deps $(ACCELERATORS)
	$(ACCELERATORS)/bin/python -m pip install --quiet --no-compile --requirement $< --editable . --group train
	touch $@
