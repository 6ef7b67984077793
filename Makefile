# Everything runs in .venv; `make demo` and `make test` need only python3, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev

.PHONY: install demo test fast check clean

install: $(STAMP)

# torch comes first and by itself: the pin in constraints.txt is a CPU build where pip is offered one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# One or two minutes on two cores: what happens to taking the harmful resource when punishment stops, with and without
# internalised norms. Prints a table and draws runs/demo/overview.png.
demo: $(STAMP)
	$(BIN)/dualhead study norms_small --out runs/demo

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto

fast: $(STAMP)
	$(BIN)/pytest --numprocesses auto -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto -m "not slow"

clean:
	rm -rf $(VENV) .venv-second build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
