# make demo: set up and run the search on the digits that scikit-learn brings along, from training to a slim, saved network.
# make test: set up and run the whole check. make docs: build the documentation into build/site.
# All need Python 3.10 or later and a package index; PYTHON=python3.12 chooses one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs clean

demo: $(VENV)/search.stamp
	$(BIN)/fxprune-search

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not long and not gpu"

docs: $(VENV)/dev.stamp
	$(BIN)/mkdocs build --strict

# An install is done again only when what is to be installed may have changed.
$(VENV)/search.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[search]'
	touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev,docs,search,onnx,openvino,torchao]'
	touch $(VENV)/search.stamp $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("fxprune needs Python 3.10 or later; try make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
