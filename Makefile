# Everything is set up in .venv, with the exact versions of constraints.txt. Needs Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard neighborhood/csrc/*)
# of TensorFlow, in which `make tensorflow-versions` checks the native operations
VERSIONS ?= 2.16.2 2.19.1
# what `make oldest-versions` runs
OLDEST_TESTS := $(addprefix tests/,test_oldest_versions.py modelspec/test_images.py checkpoints/test_writing.py \
	models/test_golden.py models/test_float64.py models/test_checkpoints.py models/test_layers.py \
	neighborhood/test_torch.py neighborhood/test_tensorflow.py training/test_torch_loop.py \
	training/test_keras_fit.py::test_sample_and_class_weights_weigh_the_own_loss \
	training/test_fine_tuning.py::test_both_halves_take_the_same_steps training/test_gradient_checkpointing.py \
	parity/test_reports_written.py)
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test full lint notebooks notebooks-store tensorflow-versions oldest-versions wheels clean

demo: $(VENV)/ready  ## four families, two frameworks, one photograph
	$(BIN)/python -m parity check nat-mini dinat-mini swiftformer-xs vit-msn-small

test: $(VENV)/ready-oracle  ## the tests, those that need transformers too
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not notebook"

full: $(VENV)/ready-oracle wheels tensorflow-versions oldest-versions  ## everything, the slow tests and whole variants too
	TWINZOO_WHEELS=dist $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
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

oldest-versions: $(VENV)-oldest/ready  ## the tests of the models, under the oldest versions that setup.cfg allows
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not oracle" $(OLDEST_TESTS)

$(VENV)-oldest/ready: $(VENV)/ready constraints-oldest.txt
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-oldest.txt
	@touch $@

wheels: $(VENV)/ready-wheels  ## dist/: the sdist, and wheels for x86-64 and aarch64, checked
	$(BIN)/python wheels/build_wheels.py

$(VENV)/ready-wheels: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,wheels]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-tensorflow-* $(VENV)-oldest build dist *.egg-info neighborhood/*.so
