# README's two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUT ?= imu-fast-demo
# As the extra [docs] of pyproject.toml, without the package and its torch.
DOCS = 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1.0' 'ruff'
# Bytecode is written as modules are imported, which are few of all that is installed.
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test coverage lint docs integration options zoo fuzz bench bench-report studies sanitize roofline clean

demo: $(VENV)/.demo
	$(BIN)/imu-fast demo --out $(DEMO_OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto

# The same, slower, with the lines that no test runs.
coverage: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --cov=imu_fast --cov-report=term --cov-fail-under=90

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in build/site, in an environment of its own: the package is read, not imported.
docs: $(VENV)-docs/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build

# The trainers in open-unlearning itself: OPEN_UNLEARNING names a checkout of it, and PYTHON_OF an
# interpreter that has what it needs (without: this one).
integration: $(VENV)/.test
	$(if $(OPEN_UNLEARNING),,$(error OPEN_UNLEARNING names no checkout of open-unlearning))
	OPEN_UNLEARNING=$(abspath $(OPEN_UNLEARNING)) OPEN_UNLEARNING_PYTHON=$(or $(PYTHON_OF),$(abspath $(BIN)/python)) \
	    $(BIN)/python -m pytest -v -s tests/integrations/test_open_unlearning.py -k real_package

# Throughput suites: ratios against baselines in the same run, one thread.
# The solvers apart, with those of dattri, pyDVL and captum that are installed.
SOLVERS = bench/test_cholesky.py bench/test_solvers.py bench/test_margin_edit.py
bench: $(VENV)/.test
	$(BIN)/python -m pytest bench $(SOLVERS:%=--ignore=%) --benchmark-json=bench/results/cpu.json
	$(BIN)/python -m pytest $(SOLVERS) --benchmark-json=bench/results/solvers.json

# One table and one figure of all results in bench/results; bench/gpu.sh adds a GPU's.
bench-report: $(VENV)/.test
	$(BIN)/python bench/report.py

# Two hundred classifiers of timm, torchvision and transformers against autograd in float64.
zoo: $(VENV)/.test
	$(BIN)/python bench/zoo.py

# Score orderings by curvature, and preconditioners; DATA names CIFAR-10 as an .npz of JPEG files.
studies: $(VENV)/.test
	$(BIN)/python bench/orderings.py $(if $(DATA),--data $(DATA))
	$(BIN)/python bench/preconditioners.py $(if $(DATA),--data $(DATA))

# Every method of unlearning with every option of every other: used, or refused.
options: $(VENV)/.test
	$(BIN)/python tests/every_option.py

# Damaged files of every format and random inputs of every function: right, or refused. CASES of each.
CASES ?= 2000
fuzz: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/fuzz/damage.py $(CASES)
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz.py $(CASES)

# The extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined -g
SANITIZED = solvers/cholesky/test_cholesky.py ops/test_parity_conjugate_gradient.py \
    ops/test_parity_head_ascent.py ops/test_parity_softmax_residual.py ops/test_squared_products.py \
    ops/test_tokens.py
sanitize: $(VENV)/.test
	rm -rf $(VENV)/sanitized && mkdir -p $(VENV)/sanitized
	cp -r imu_fast kernels csrc setup.py pyproject.toml README.md $(VENV)/sanitized
	rm -f $(VENV)/sanitized/imu_fast/*.so
	$(PIP) --target $(VENV)/sanitized/build-requires 'pybind11>=2.12'
	cd $(VENV)/sanitized && PYTHONPATH=build-requires IMU_FAST_BUILD_EXT=1 IMU_FAST_BUILD_CUDA=0 \
	    CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	    $(abspath $(BIN))/python setup.py -q build_ext --inplace
	nm -D $(VENV)/sanitized/imu_fast/*.so | grep -q __asan_init
	cd $(VENV)/sanitized && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.:$(abspath tests) $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	    $(SANITIZED:%=$(abspath tests)/%) --rootdir . -c /dev/null --import-mode=importlib

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

$(VENV)-docs/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs build dist *.egg-info imu_fast/*.so
