# The two commands of the README are `make demo` and `make test`; both set up .venv first.
#
#   PYTHON=python3.12   another interpreter for .venv (when it is made)
#   CONSTRAINTS=        the newest of every dependency instead of the tested versions
#   ARGS="--data DIR"   passed to the example by `make demo`; `make bench` and `make bench-gpu` take
#                       them instead of --save

PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Stamps: the dependencies are there, the kernels are compiled from the sources as they are now.
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
KERNEL_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP_FILES := $(KERNEL_SOURCES) $(shell find tests/cpp -name '*.cpp' -o -name '*.h')

# What `build-system.requires` names, and torchvision so that pip picks a pair that fits.
BUILD_REQUIRES := "setuptools>=77" "cmake>=3.26" ninja "torch>=2.11" torchvision

.PHONY: help demo test test-python test-gpu-static test-isas test-cpp test-gpu bench bench-gpu measure-gpu lint \
    types clean
help:
	@echo "make demo       train on MNIST at alpha = 1, 1.5 and 2, prune, print the table, write plots"
	@echo "make test       the whole test suite: Python, GPU code, each instruction set, C++ with sanitizers"
	@echo "make bench      measure the ops against this machine's own limits and their rivals"
	@echo "make bench-gpu  the same on a GPU, after its test suite; one sentence where there is none"
	@echo "make lint       ruff, clang-format and mypy"
	@echo "make clean      remove .venv and everything built"

demo: $(COMPILED)
	$(PY) examples/mnist.py $(ARGS)

# ---- tests

test: test-python test-gpu-static test-isas test-cpp
	@echo "make test: all passed"

test-python: $(COMPILED)
	$(PY) -m pytest

# The Triton kernels, compiled for GPUs that need not be there, against bench/results/gpu_static.json.
test-gpu-static: $(COMPILED)
	@if $(PY) -c "import triton" 2>/dev/null; then \
	    $(PY) -m bench.gpu_static --check; \
	else \
	    echo "GPU kernels not compiled: this install has no Triton"; \
	fi

# The kernels for this processor were tested above, Triton's as well; here the lesser instruction
# sets.
test-isas: test-python
	@case $$($(PY) -c "import ppkernels; print(ppkernels.cpu_capability())") in \
	    avx512) isas="avx2 baseline" ;; \
	    avx2) isas="baseline" ;; \
	    *) isas="" ;; \
	esac; \
	for isa in $$isas; do \
	    echo "contract tests, PPKERNELS_CPU=$$isa"; \
	    PPKERNELS_CPU=$$isa $(PY) -m pytest tests/test_contract.py tests/ops -k "not triton" \
	        || exit 1; \
	done

CTEST_BUILD := build/cpp-tests
test-cpp: $(COMPILED)
	@if [ "$$($(PY) -c 'import ppkernels; print(ppkernels.cpu_capability())')" = reference ]; then \
	    echo "C++ tests skipped: this install has no compiled kernels"; \
	else \
	    echo "C++ tests with the address and undefined-behaviour sanitizers" && \
	    $(VENV)/bin/cmake -S . -B $(CTEST_BUILD) -G Ninja \
	        -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" \
	        -DPPKERNELS_MODULE=OFF -DPPKERNELS_TESTS=ON -DPPKERNELS_SANITIZE=ON && \
	    $(VENV)/bin/cmake --build $(CTEST_BUILD) && \
	    $(VENV)/bin/ctest --test-dir $(CTEST_BUILD) --output-on-failure; \
	fi

# Without a GPU one sentence, and nothing else.
bench-gpu: $(INSTALLED)
	@sentence="$$($(PY) -m bench.gpu)" || exit 1; \
	if [ -n "$$sentence" ]; then \
	    echo "$$sentence"; \
	else \
	    $(MAKE) --no-print-directory measure-gpu; \
	fi

test-gpu: $(COMPILED)
	$(PY) -m pytest -m gpu

# Time, and memory though a row of the first has failed; the exit code is the worse of the two.
MEASURE = $(1) --save; time=$$?; $(1) --memory --save; memory=$$?; exit $$((time > memory ? time : memory))

measure-gpu: test-gpu
ifdef ARGS
	$(PY) -m bench --device cuda $(ARGS)
else
	$(call MEASURE,$(PY) -m bench --device cuda)
endif

bench: $(COMPILED)
ifdef ARGS
	$(PY) -m bench $(ARGS)
else
	$(call MEASURE,$(PY) -m bench)
endif

# ---- lint

lint: $(INSTALLED) types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

types: $(INSTALLED)
	$(PY) -m mypy

# ---- setting up

$(PY):
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) was not found; name a Python >= 3.10: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	    echo "ppkernels needs Python >= 3.10, got $$($(PYTHON) --version 2>&1);" \
	        "name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" || { \
	    echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "pip>=22"

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	@echo "Installing the dependencies into $(VENV): torch is large, this takes minutes"
	$(PY) -m pip install $(CONSTRAINTS) $(BUILD_REQUIRES)
	$(PY) -m pip install $(CONSTRAINTS) --no-build-isolation --editable ".[dev]"
	@touch $@

# The install above has compiled them the first time, and this finds nothing to do.
$(COMPILED): $(INSTALLED) setup.py CMakeLists.txt $(KERNEL_SOURCES)
	$(PY) setup.py build_ext --inplace
	@$(PY) -c "import ppkernels; print('CPU kernels:', ppkernels.cpu_capability())"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info ppkernels/*.so .pytest_cache .mypy_cache .ruff_cache
