# Two commands for a fresh machine: `make quickstart` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# The release that the figures in this repository were measured with. On Linux, PyPI's wheel brings CUDA along.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: quickstart test quality style clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: what is installed is not installed again.
$(VENV)/.installed-%: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

quickstart: $(VENV)/.installed-ode
	$(BIN)/hyperflow quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
