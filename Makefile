# Two commands on a fresh machine (Python 3.11+, make, g++):  make demo   and   make test
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP  := $(VENV)/.installed
TORCH  ?= torch>=2.10,<2.14
# Machines without an NVIDIA driver take the CPU build of torch, also where PyPI would give the CUDA one: a version
# with "+cpu" sorts above the same version without. Unset to use only the index pip is configured with.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_FLAGS := $(if $(shell command -v nvidia-smi),,$(if $(TORCH_CPU_INDEX),--extra-index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 10))

.PHONY: demo test test-all install build lint bench gpu-check clean

demo: $(STAMP)
	$(BIN)/python recipes/demo/run.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py

install: $(STAMP)

# torch first and no build isolation: DeepSpeed's build imports the torch that is there, and would else fetch another.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip 'setuptools>=77' wheel ninja packaging
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH_FLAGS) '$(TORCH)' numpy
	$(PIP) install --no-build-isolation -e '.[dev]'
	$(BIN)/python -m mlm_cli.ops.build
	touch $@

build: $(STAMP)
	$(BIN)/python -m mlm_cli.ops.build

clean:
	rm -rf $(VENV) build dist *.egg-info demo mlm_cli/ops/_lib .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
