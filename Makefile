# Two commands for a newcomer: `make train` and `make test`; `make check` is the part of the tests that
# guards the operator. All set themselves up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# pyproject.toml has the range. Without a GPU, one release of it: pip would take the newest, of which
# there may be nothing but a CUDA build of several GB. With a GPU, pip's choice.
# `make setup TORCH='torch==2.15.*'` asks for another.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.*)

# One thread per process: the launcher and the tests run several processes on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train check test test-all test-faults lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lasp needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)' -e '.[test]'
	touch $@

train: setup
	$(BIN)/python launch/prepare_data.py
	$(BIN)/torchrun --standalone --nproc_per_node 2 launch/train.py \
	  --job.config_file launch/configs/quickstart.toml

# The operator on every backend of this machine against the definition, alone and over three ranks
# in the ring; run it after editing a kernel. `make test` adds the other ranks and exchanges.
check: setup
	$(BIN)/python -m pytest tests/operator/test_conformance.py -m 'not slow' \
	  -k 'alone or (cpu_float64 and 3-ring)'

test: setup lint
	$(BIN)/python -m pytest -m 'not slow and not faults'

test-all: setup lint
	$(BIN)/python -m pytest -m 'not faults'

# Kills, damaged files, full disks, hung ranks, lost hosts: all of them takes minutes, the quick part
# is in `make test`.
test-faults: setup
	$(BIN)/python -m pytest tests/faults tests/network

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs data build *.egg-info
