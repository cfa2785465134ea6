# Every target makes what it needs; nothing outside this directory is touched.
PYTHON3 ?= python3
VENV := .venv
VENV_SGLANG := .venv-sglang
VENV_PEERS := .venv-peers
VENV_AUDIT := .venv-audit
PYTHON := $(VENV)/bin/python
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist loadfile
READY := $(VENV)/.ready$(addprefix -,$(TORCH))
ifneq ($(TORCH),)
ifeq ($(VENV),.venv)
$(error TORCH=$(TORCH) needs an environment of its own: add VENV=.venv-$(TORCH))
endif
endif
# LOCKED=cuda or LOCKED=cpu, as torch is built: installs only files whose hashes the locks have.
LOCKS := requirements.lock requirements-$(LOCKED).lock
REQUIREMENTS := $(if $(LOCKED),--require-hashes $(addprefix --requirement ,$(LOCKS)),--requirement requirements.txt)
# The draft that test-sglang serves: that of `make train`, if there is one, else a small random one.
RUN ?= $(wildcard outputs/tiny-eagle3)
JUDGES ?= tests/sglang

.DEFAULT_GOAL := help
.PHONY: help setup setup-sglang train test test-all test-sglang lint audit lock bench

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## the virtual environment with pinned dependencies; LOCKED=cuda|cpu: with the locks' hashes; TORCH=VERSION

$(READY): pyproject.toml requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON3) is older than 3.11; name a newer one: make PYTHON3=python3.12 …" >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(REQUIREMENTS)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(if $(TORCH),$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH))
	touch $@

train: $(READY)  ## make the embedded target, train an EAGLE-3 draft for it, measure it (no GPU, no download)
	$(PYTHON) recipes/train_eagle3.py $(ARGS)

test: $(READY)  ## the fast part of the test suite (minutes, every package), on as many processes as there are cores
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## the whole test suite; ARGS="-m slow": what `make test` leaves out
	$(PYTEST) $(ARGS)

test-sglang: $(VENV_SGLANG)/.ready  ## the real SGLang on a CPU as reference; RUN=DIR: the draft of that run, JUDGES=FILES: some of the tests
	$(if $(RUN),NEMO_RUN=$(abspath $(RUN))) HF_HUB_OFFLINE=1 $(VENV_SGLANG)/bin/python -m pytest $(JUDGES) --confcutdir=tests/sglang -rs --numprocesses auto --dist loadfile $(ARGS)

setup-sglang: $(VENV_SGLANG)/.ready  ## SGLang's own environment, for a CPU

$(VENV_SGLANG)/.ready: pyproject.toml requirements-sglang.txt containers/install.sh
	PYTHON3=$(PYTHON3) containers/install.sh cpu $(VENV_SGLANG)
	touch $@

lint: $(READY)  ## style, types, imports between packages, plain language
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) -m tools.plain_language

audit: $(VENV_AUDIT)/.ready  ## the lock against pyproject.toml, the package index, .venv and known vulnerabilities
	$(VENV_AUDIT)/bin/python -m tools.audit

lock: $(VENV_AUDIT)/.ready  ## the locks anew from requirements.txt; WHEELS=FILES adds CPU builds of torch
	$(VENV_AUDIT)/bin/python -m tools.lock $(WHEELS)

$(VENV_AUDIT)/.ready: requirements-audit.txt
	$(PYTHON3) -m venv $(VENV_AUDIT)
	$(VENV_AUDIT)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-audit.txt
	touch $@

bench: $(READY) $(VENV_PEERS)/.ready  ## speed and memory of a training step beside the peers' own
	$(PYTHON) -m benchmarks.training_step $(or $(ARGS),--table short)

$(VENV_PEERS)/.ready: requirements-peers.txt
	$(PYTHON3) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-peers.txt
	$(VENV_PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0 hs-connectors==0.9.0 \
	  nemo-automodel==0.7.0 specforge==0.2.0 speculators==0.9.0
	touch $@
