# For a fresh machine: `make quickstart`, `make train-demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# The release that the figures in this repository were measured with. On Linux, PyPI's wheel brings CUDA along.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Two processes of one thread each are faster than one of two: much of the time is the start of Python.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What the tests need. Those of `dev` include them: nothing more is installed after `make quality`.
EXTRAS ?= test

# Where the oldest packages are installed that pyproject.toml allows.
LOWEST ?= .venv-lowest

.PHONY: quickstart train-demo test test-all test-lowest quality style clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: what is installed is not installed again.
$(VENV)/.installed-%: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

quickstart: $(VENV)/.installed-cli,benchmark
	$(BIN)/hyperflow quickstart

# Yours instead of the images that are drawn: make train-demo DATA="a.parquet folder" UNSEEN="b.parquet" OUT=outputs/mine
OUT ?= outputs/demo
train-demo: $(VENV)/.installed-train
	$(BIN)/python -m training.demo.run $(if $(DATA),--dataset $(DATA)) $(if $(UNSEEN),--unseen $(UNSEEN)) --output_dir $(OUT)

# The fast tier: what a change should pass before it is shown to anybody.
test: $(VENV)/.installed-$(EXTRAS)
	$(PYTEST) -m "not slow and not browser and not hub"

test-all: $(VENV)/.installed-$(EXTRAS)
	$(PYTEST) --durations 20

# The library's own tests with the oldest packages allowed. torch is the one that the figures were measured with: older
# ones have no wheel for the CPU at every registry, and pull in gigabytes of CUDA.
test-lowest: $(LOWEST)/.installed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile \
	  -m "not slow and not browser and not hub" tests/modeling tests/data tests/finetuning

$(LOWEST)/.installed: pyproject.toml .ci/lowest.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet "$(TORCH)" $$($(PYTHON) .ci/lowest.py)
	touch $@

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info model_cards/build model_cards/*.egg-info
