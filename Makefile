# Everything is set up in .venv, with the exact versions of constraints.txt. Needs Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard neighborhood/csrc/*)
# of TensorFlow, in which `make tensorflow-versions` checks the native operations
VERSIONS ?= 2.16.2 2.19.1
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test full lint notebooks notebooks-store tensorflow-versions wheels clean

demo: $(VENV)/ready  ## four families, two frameworks, one photograph
	$(BIN)/python -m parity check nat-mini dinat-mini swiftformer-xs vit-msn-small

test: $(VENV)/ready-oracle  ## the tests, those that need transformers too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not notebook"

full: $(VENV)/ready-oracle tensorflow-versions  ## everything, the slow tests and whole variants too
	$(BIN)/python -m pytest -n 2 --dist loadfile
	mkdir -p build
	$(BIN)/python -m parity check --all --level all --json build/parity.json --html build/parity.html --junit build/parity.xml
	$(BIN)/python -m parity check --all --full
	$(BIN)/python -m benchmarks.neighborhood_attention

notebooks: $(VENV)/ready  ## all notebooks, each in a fresh kernel
	$(BIN)/python -m pytest -m notebook --durations=0 tests/test_notebooks.py

notebooks-store: $(VENV)/ready  ## the same, and their outputs are stored in them
	$(BIN)/python notebooks/execute.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror neighborhood/csrc/*.h neighborhood/csrc/*.cc tests/neighborhood/*.cc

$(VENV)/ready: $(SOURCES)
	@echo "Setting up $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

$(VENV)/ready-oracle: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,oracle]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation natten
	@touch $@

tensorflow-versions: $(VERSIONS:%=$(VENV)-tensorflow-%/checked)  ## one build, several versions of TensorFlow

$(VENV)-tensorflow-%/checked: $(VENV)/ready tests/neighborhood/check_op.py
	$(PYTHON) -m venv $(VENV)-tensorflow-$*
	$(VENV)-tensorflow-$*/bin/python -m pip install --quiet --disable-pip-version-check tensorflow-cpu==$*
	$(VENV)-tensorflow-$*/bin/python tests/neighborhood/check_op.py
	@touch $@

wheels: $(VENV)/ready-wheels  ## dist/: the sdist, and wheels for x86-64 and aarch64, checked
	$(BIN)/python wheels/build_wheels.py

$(VENV)/ready-wheels: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,wheels]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-tensorflow-* build dist *.egg-info neighborhood/*.so
