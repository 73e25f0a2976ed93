# `make demo` and `make test` need nothing but Python 3.11-3.13: they make .venv and install into it once.
#
# Variables:
#   PYTHON    the interpreter that .venv is made from
#   PIP_ARGS  extra arguments of pip install. On Linux the default torch wheel brings the CUDA libraries; for the
#             much smaller CPU-only one:
#             make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   DEMO_ARGS, TEST_ARGS  extra arguments of `m2rnn track` and pytest

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.demo-installed

.PHONY: demo test lint typecheck clean

demo: $(DEMO_INSTALLED)
	$(BIN)/m2rnn track --group S3 --compare m2rnn,gru,attention --train-length 128 \
		--test-lengths 4,16,64,128,256,512,1024,4096 --out runs/s3 $(DEMO_ARGS)

# Two workers, each on one thread: many small tests gain more from that than from threads inside each.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[demo]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
