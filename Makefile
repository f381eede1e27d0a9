# Every target makes the virtual environment it needs. Linux, Python >= 3.10, make and g++ are all that is assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On a host without an NVIDIA GPU a pinned build of torch comes first, so that no dependency chooses one with CUDA.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-gpu test-slow quality style audit docs bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.installed  ## set up, then finetune a small Llama on real long text, with and without fpdt
	$(BIN)/python examples/finetune_long_context.py --output_dir outputs/demo --compare_with sdpa

test: $(VENV)/.installed  ## set up, then run the CPU tests
	$(BIN)/python -m pytest

test-gpu:  ## the tests that need a GPU, in the current environment
	$(PYTHON) -m pytest -m gpu

test-slow: $(VENV)/.installed  ## the CPU tests that take minutes
	$(BIN)/python -m pytest -m slow

quality: $(VENV)/.installed  ## lint and format check
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

style: $(VENV)/.installed  ## lint and format, fixing what can be fixed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

audit: $(VENV)/.installed  ## known vulnerabilities of what is installed; asks a database on the internet
	$(BIN)/python -m pip install --quiet "pip-audit>=2.7"
	$(BIN)/python -m pip_audit --skip-editable

docs: $(VENV)/.installed  ## the documentation as a website, in outputs/docs
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -q -W --keep-going docs outputs/docs

bench:  ## the training-step benchmark on this machine's GPU, in the current environment
	$(PYTHON) -m benchmarks.train_step --help

clean:  ## remove the virtual environment and outputs
	rm -rf $(VENV) outputs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
