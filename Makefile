# Two commands for a fresh machine: `make study` runs the main job on the embedded digits, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= digits
OUT ?= study

.PHONY: study test test-slow lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

study: $(VENV)/installed  ## the course sheet on the digits: study/report.pdf, study/report.html, study/results.json
	$(BIN)/periplus study --data $(DATA) --out $(OUT) --resume

test: $(VENV)/installed lint types  ## what continuous integration runs
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed  ## kills, bit flips and trained models: minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OUT)
