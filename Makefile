# make demo and make test do all set-up on a machine with python3, its venv module, and make.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
# One thread a process: the tests run side by side, and more threads than cores make them slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Root installs as it is; others where sudo asks for no password.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -n)
HAS_COMPILER := command -v g++ >/dev/null && test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
HAS_FFCV_LIBRARIES := pkg-config --exists opencv4 libturbojpeg 2>/dev/null

.PHONY: help demo test lint clean compiler ffcv

help:
	@echo "make demo       create $(VENV), install fahooks into it (editable: the files here are what runs), run its quickstart"
	@echo "make test       the same with what the tests need, then run every test"
	@echo "make ffcv       add FFCV to $(VENV), and the libraries that it is built against to the system (Debian, Ubuntu)"
	@echo "make lint       ruff and pyright"
	@echo "make clean      remove $(VENV) and everything else that was built"

demo: $(VENV)/installed
	@echo "== Running the quickstart: $(BIN)/fahooks quickstart"
	$(BIN)/fahooks quickstart

test: $(VENV)/installed-dev compiler
	@if $(HAS_FFCV_LIBRARIES); then $(MAKE) --no-print-directory ffcv; fi || true
	@test -e $(VENV)/installed-ffcv || echo "== FFCV is not in $(VENV), where make ffcv puts it: the tests that need it are skipped"
	@echo "== Running the tests on $(WORKERS) workers; those on real data look under FAHOOKS_DATA ($${FAHOOKS_DATA:-not set: they are skipped})"
	$(PYTEST)

compiler:
	@$(HAS_COMPILER) || { echo "== Installing g++ and Python's headers, which torch.compile needs"; \
		{ $(AS_ROOT) apt-get update --quiet && $(AS_ROOT) apt-get install --quiet --yes g++ python3-dev; } \
		|| echo "== They could not be installed: the tests that need them are skipped"; }

ffcv: $(VENV)/installed-ffcv

lint: $(VENV)/installed-dev
	@echo "== Checking style, format and types: ruff, pyright"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/created:
	@echo "== Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "fahooks needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "== Installing fahooks into $(VENV), with the tested versions of constraints.txt"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml constraints.txt
	@echo "== Installing fahooks and what its tests need into $(VENV), with the tested versions of constraints.txt"
	$(INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/installed-ffcv: $(VENV)/installed | compiler
	@$(HAS_FFCV_LIBRARIES) || { echo "== Installing OpenCV and libjpeg-turbo, which FFCV is built against"; \
		$(AS_ROOT) apt-get update --quiet && \
		$(AS_ROOT) apt-get install --quiet --yes --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config; }
	@echo "== Building FFCV into $(VENV)"
	$(INSTALL) --editable ".[ffcv]"
	$(BIN)/python -c "import ffcv"
	@touch $@

clean:
	rm -rf $(VENV) build dist fahooks.egg-info .pytest_cache .ruff_cache .hypothesis
