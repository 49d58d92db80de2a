# Every target makes the virtual environment and the build that it needs, and redoes neither without cause.
#
#   make demo      decode a batch of requests and check the result
#   make test      lint, then all tests (those that need a GPU are skipped where there is none)
#   make docs      build the documentation as a site, in site/
#   make sanitize  run the kernels under compute-sanitizer, on a GPU
#   make faults    plant faults in the kernels, and see that compute-sanitizer finds them
#
# PYTHON          interpreter that the environment is made from (python3)
# VENV            the environment (.venv)
# FLASH_MLA_CUDA  0: no CUDA kernels; 1: fail where they cannot be built; else they are built if possible
# DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS, SANITIZE_ARGS, FAULTS_ARGS  passed on

PYTHON ?= python3
VENV ?= .venv
FLASH_MLA_CUDA ?= auto
export FLASH_MLA_CUDA

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

REQUIREMENTS := $(VENV)/requirements-$(FLASH_MLA_CUDA).txt
BUILT := $(VENV)/built-$(FLASH_MLA_CUDA)
BUILD_SOURCES := setup.py pyproject.toml flash_mla/_version.py $(wildcard build_tools/*.py) $(shell find csrc -type f 2>/dev/null)
CPP_SOURCES := $(shell find csrc -type f \( -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' \) 2>/dev/null)

.PHONY: demo test build lint format bench docs sanitize faults clean distclean
.DELETE_ON_ERROR:

demo: build
	@$(BIN)/python examples/decode_demo.py $(DEMO_ARGS)

test: build lint
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

build: $(BUILT)

lint: $(REQUIREMENTS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))
	@$(BIN)/mypy

format: $(REQUIREMENTS)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

bench: build
	@$(BIN)/python -m build_tools.requirements --extra benchmark > $(VENV)/requirements-benchmark.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements-benchmark.txt
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Not --quiet, which would also hide from --strict what it warns of.
docs: $(REQUIREMENTS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

sanitize: build
	@$(BIN)/python -m build_tools.sanitize $(SANITIZE_ARGS)

faults: build
	@$(BIN)/python -m build_tools.planted_faults $(FAULTS_ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.10; give another one with PYTHON="; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments; install python3-venv or give another one with PYTHON="; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(REQUIREMENTS): pyproject.toml build_tools/requirements.py build_tools/toolchain.py | $(BIN)/python
	@echo "Installing torch, the build requirements and the tools into $(VENV) (about 3 GB to download the first time)"
	@$(BIN)/python -m build_tools.requirements --extra test --extra lint --extra docs > $@
	@$(BIN)/pip install --quiet --disable-pip-version-check --requirement $@

# The kernels are compiled in place, one object per source file, and recompiled only where a file they include has changed.
$(BUILT): $(REQUIREMENTS) $(BUILD_SOURCES)
	@echo "Building flash_mla in place"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/built-*
	@touch $@

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f flash_mla/_C.*.so flash_mla/_build_info.json $(VENV)/built-*

distclean: clean
	rm -rf $(VENV)
