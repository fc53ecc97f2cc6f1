# README's two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUT ?= imu-fast-demo
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench roofline clean

demo: $(VENV)/.demo
	$(BIN)/imu-fast demo --out $(DEMO_OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest --cov=imu_fast --cov-report=term --cov-fail-under=90

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Throughput suites: ratios against baselines in the same run, one thread.
bench: $(VENV)/.test
	$(BIN)/python -m pytest bench --benchmark-json=bench/results/cpu.json

# Predicted time per kernel on an H200, from counted bytes and FLOPs.
roofline: $(VENV)/.test
	$(BIN)/python bench/roofline.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info imu_fast/*.so
