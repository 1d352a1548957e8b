# Every target makes its own environment in .venv first; nothing has to be installed by hand but Python 3.11 or newer.
#   make demo        a running guest moves to another daemon and back, verified, with its downtime breakdown
#   make demo-qemu   the same with a Linux guest in stock QEMU, beside QEMU's own migration of it
#   make demo-fleet  three hosts and etcd on this machine; one host is emptied
#   make test lint   what CI runs
# Sizes of bench, prove and calibrate come from the environment: see docs/operators.md, "Measuring on your own hosts".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What standard output is for (JSON) must stay clean of what an installation says.
INSTALL_LOG := $(VENV)/install.log

.PHONY: demo demo-qemu demo-fleet test lint bench prove calibrate clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@$(BIN)/python -m scripts.demo $(DEMO_OPTIONS)

demo-qemu: $(INSTALLED)
	@$(BIN)/python -m scripts.demo_qemu $(DEMO_OPTIONS)

demo-fleet: $(INSTALLED)
	@$(BIN)/python -m scripts.demo_fleet $(DEMO_OPTIONS)

test: $(INSTALLED)
	@echo "Running tests; all of them take some minutes (make test PYTEST_OPTIONS='-m \"not slow\"' for fewer)." >&2
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(INSTALLED)
	@$(BIN)/python -m scripts.bench

prove: $(INSTALLED)
	@$(BIN)/python -m scripts.prove all

calibrate: $(INSTALLED)
	@$(BIN)/python -m scripts.calibration

clean:
	rm -rf $(VENV) build dist run .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "migrated needs Python 3.11 or newer, and $(PYTHON) is older or missing; name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in $(VENV) (once; a minute or so)..." >&2
	@$(PYTHON) -m venv $(VENV) >&2 || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu install python3-venv." >&2; exit 1; }
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,lint]' > $(INSTALL_LOG) 2>&1 || \
	  { tail -n 20 $(INSTALL_LOG) >&2; echo "The installation failed; all of its output is in $(INSTALL_LOG)." >&2; exit 1; }
	@touch $@
