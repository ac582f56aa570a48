# Everything a reader or the checks do. Needs make and Python 3.11 to 3.13; the rest is installed into .venv.
# Another Python: make setup PYTHON=python3.12      Another set of packages: LLM_DEPLOY_ENV=cpu|gpu make setup
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

export GPTQMODEL_CPU_WORKERS ?= 2
export HF_HUB_DISABLE_TELEMETRY ?= 1
export JUPYTER_PREFER_ENV_PATH ?= 1
export VLLM_NO_USAGE_STATS ?= 1

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup autogptq frameworks run test lab notebooks lint format lock clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*##  *\(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup:  ## make .venv with the exact packages; does nothing when it is there
	@$(PYTHON) env/setup.py

autogptq: setup  ## make .venv-autogptq and its kernel, for the AutoGPTQ notebook (Python 3.11)
	@$(PYTHON) env/setup.py autogptq

frameworks: setup  ## make .venv-frameworks and its kernel, for llama.cpp, CTranslate2, MNN, AirLLM and LMDeploy
	@$(PYTHON) env/setup.py frameworks

run: setup  ## run the series and write build/index.html (ARGS="--help" lists the choices)
	@$(BIN)/python -m helpers run $(ARGS)

test: setup  ## every check: style, tests, stored outputs, other parameters
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python env/check.py

lab: setup  ## open the notebooks in JupyterLab
	@$(BIN)/python -m jupyter lab notebooks $(ARGS)

notebooks: setup  ## run the notebooks on a CPU and store their outputs
	@OMP_NUM_THREADS=1 $(BIN)/python -m helpers run --store $(ARGS)

lint: setup  ## check style and layout
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: setup  ## put style and layout right
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: setup  ## resolve the pins anew (ARGS=--upgrade renews them all)
	@$(BIN)/python env/lock.py $(ARGS)

clean:  ## remove what runs and checks left; the environments stay
	@rm -rf build .pytest_cache .ruff_cache
	@find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
