# make demo: set up and run the search on warped digits (those of scikit-learn), from training to a slim, saved network.
# make test: set up and run the whole check, but for what takes minutes. make test-export: nine networks through every runtime, a
# quarter of an hour. make docs: build the documentation into build/site.
# All need Python 3.10 or later and a package index; PYTHON=python3.12 chooses one.

PYTHON ?= python3
DEMO := --data warped-digits --model fxprune.models:warped_digits_net --train-epochs 5 --distill-epochs 2 --target macs=0.1
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-export docs clean

demo: $(VENV)/search.stamp
	$(BIN)/fxprune-search $(DEMO)

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not long and not gpu"

test-export: $(VENV)/dev.stamp $(VENV)/executorch.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "export and long"

docs: $(VENV)/dev.stamp
	$(BIN)/mkdocs build --strict

# An install is done again only when what is to be installed may have changed.
$(VENV)/search.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[search]'
	touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev,docs,search,optuna,ray,onnx,openvino,torchao]'
	touch $(VENV)/search.stamp $@

# ExecuTorch has no wheel for some systems and versions of Python; its tests are skipped there and say so.
$(VENV)/executorch.stamp: $(VENV)/dev.stamp
	-$(BIN)/python -m pip install --editable '.[executorch]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("fxprune needs Python 3.10 or later; try make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
