# Everything is set up in .venv, with the exact versions of constraints.txt. Needs Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg pyproject.toml constraints.txt
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test full lint clean

demo: $(VENV)/ready  ## two models, two frameworks, one photograph
	$(BIN)/python -m parity check swiftformer-xs vit-msn-small

test: $(VENV)/ready-oracle  ## the tests, those that need transformers too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

full: $(VENV)/ready-oracle  ## everything, the slow tests and whole variants too
	$(BIN)/python -m pytest
	$(BIN)/python -m parity check --all --full

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: $(SOURCES)
	@echo "Setting up $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

$(VENV)/ready-oracle: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,oracle]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
