# make demo and make test need only python3 (3.11 or newer) with its venv module: they make .venv.
# `make` alone lists the targets.
#
#   TORCH_INDEX=url    take torch's wheel from another index (CPU only, another CUDA)
#   PYTHON=program     the Python that makes .venv
#   TEST_WORKERS=n     test processes of one thread each; 0: one process with every thread
#   PYTEST_ARGS=...    passed on to pytest
#   EMULATED='80 90'   architectures that make test-emulated compiles for (90; make test-slow: 80)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The caller's Python settings must not reach into .venv.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT

TEST_WORKERS ?= 2
EMULATED ?= 90

py := .venv/bin/python
pip := -m pip --disable-pip-version-check --no-input
say := @printf '\n==> %s\n'
packaging := setup.py pyproject.toml constraints.txt engine/vitrail/_version.py $(wildcard csrc/*.*)

# One process with every core, or several with a core each: torch's threads would fight otherwise.
# worksteal gives a worker consecutive tests, so that most module fixtures are made by one worker.
pytest := $(py) -m pytest
ifneq ($(TEST_WORKERS),0)
pytest := OMP_NUM_THREADS=1 $(pytest) -n $(TEST_WORKERS) --dist worksteal
endif

# Tests that measure time or memory: one process, after the others, and only the files that have such
# tests, because collecting the whole suite takes longer than these tests.
alone = OMP_NUM_THREADS=1 $(py) -m pytest $$(grep -rl --include='test_*.py' pytest.mark.machine tests)

.PHONY: help demo test test-interpreted test-emulated test-slow test-all test-pillow12 test-triton36
.PHONY: lint install bench gpu pixels-golden golden-export wheel clean

help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

demo: .venv/run.stamp ## the bundled model on scenes and photos, and a contact sheet
	$(say) 'vitrail demo'
	.venv/bin/vitrail demo

test: .venv/dev.stamp ## the tests that need no GPU, without the slow tests
	$(say) 'Tests (not slow, not gpu)'
	$(pytest) -m 'not slow and not gpu and not interpreted and not machine' $(PYTEST_ARGS)
	$(alone) -m 'machine and not slow'
	$(MAKE) --no-print-directory test-interpreted test-emulated

test-interpreted: .venv/dev.stamp ## the kernels in Triton's interpreter, on the CPU
	$(say) 'Kernels in the interpreter'
	TRITON_INTERPRET=1 $(pytest) -m interpreted tests/interpreted

test-emulated: .venv/dev.stamp ## the same tests on compiled kernels, in the emulator
	$(say) 'Kernels in the emulator for $(EMULATED:%=sm_%)'
	for arch in $(EMULATED); do
	    VITRAIL_EMULATED=$$arch $(pytest) -m interpreted tests/interpreted
	done

test-slow: .venv/dev.stamp ## the tests of test-all that test does not run
	$(say) 'Tests (slow, not gpu)'
	$(pytest) -m 'slow and not gpu and not machine' $(PYTEST_ARGS)
	$(alone) -m 'machine and slow'
	$(MAKE) --no-print-directory test-emulated EMULATED=80

test-all: .venv/dev.stamp ## every test that needs no GPU
	$(say) 'Tests (not gpu)'
	$(pytest) -m 'not gpu and not interpreted and not machine' $(PYTEST_ARGS)
	$(alone) -m machine
	$(MAKE) --no-print-directory test-interpreted test-emulated EMULATED='80 90'

test-pillow12: .venv-pillow12/stamp ## the image tests under Pillow 12
	$(say) 'Image tests under Pillow 12'
	.venv-pillow12/bin/python -m pytest -m 'not slow and not gpu' $(PYTEST_ARGS) tests/image

test-triton36: .venv-triton36/stamp ## the tests of compiled kernels under triton 3.6
	$(say) 'Compiled kernels under triton 3.6'
	.venv-triton36/bin/python -m pytest -m 'not slow' $(PYTEST_ARGS) tests/kernels/test_compile.py tests/kernels/test_sass.py \
	    tests/benchmarks/test_calls.py::test_tritons_binding_is_compiled_without_a_driver

lint: .venv/dev.stamp ## ruff and mypy --strict
	$(say) 'ruff check, ruff format --check, mypy --strict'
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy

install: .venv/dev.stamp ## .venv with Vitrail (editable) and the development tools

bench: .venv/dev.stamp ## the CPU benchmarks against transformers
	$(say) 'CPU benchmarks'
	$(py) benchmarks/cpu.py
	$(py) benchmarks/host.py --device cpu

gpu: ## the benchmarks and tests on a GPU (benchmarks/gpu.sh)
	@bash benchmarks/gpu.sh

pixels-golden: .venv-pillow12/stamp ## compute the pixel hashes again, under Pillow 12
	$(say) 'Pixel hashes from transformers under Pillow 12'
	PYTHONPATH=engine:kernels .venv-pillow12/bin/python tests/pixels/make_goldens.py

golden-export: .venv/dev.stamp ## tests/exported/golden again, after PLAN_GRAMMAR or KERNEL_ABI was raised
	$(say) 'The golden exported folder'
	PYTHONPATH=engine:kernels:tests $(py) tests/exported/make_golden.py

wheel: .venv/dev.stamp ## dist/vitrail-*.whl
	$(say) 'The wheel, into dist/'
	rm -rf build dist
	$(py) $(pip) --quiet wheel --no-deps --wheel-dir dist .
	ls -l dist

clean: ## remove .venv and everything built
	rm -rf .venv .venv-pillow12 .venv-triton36 build dist *.egg-info engine/vitrail/_C.*.so
	rm -rf kernels/vitrail_kernels/binaries
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find csrc engine kernels tests -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up

# The first Python that is new enough and can make virtual environments; else the command that
# installs it.
.venv/bin/python:
	@sudo=; [ "$$(id -u)" = 0 ] || sudo='sudo '
	apt="$${sudo}apt-get update && $${sudo}apt-get install -y"
	old=; bare=
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1) || continue
	    if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	        old=$$version
	    elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	        bare=$${bare:-$$version}
	    else
	        printf '\n==> Making .venv with Python %s\n' "$$version"
	        "$$python" -m venv --clear .venv
	        exit
	    fi
	done
	if [ -n "$$bare" ]; then
	    printf 'Python %s is here without its venv module. This installs it:\n' "$$bare"
	    echo "  $$apt python$$bare-venv"
	elif [ -n "$$old" ]; then
	    printf 'Python 3.11 or newer is needed; found %s. This installs it:\n' "$$old"
	    echo "  $$apt python3.11 python3.11-venv"
	else
	    printf 'Python 3.11 or newer is needed; found none. This installs it:\n'
	    echo "  $$apt python3 python3-venv"
	fi >&2
	exit 1

# torch first, alone and by its pin, so that no later package chooses another build.
.venv/torch.stamp: constraints.txt | .venv/bin/python
	@torch=$$(grep '^torch==' constraints.txt)
	printf '\n==> Installing %s (TORCH_INDEX=url takes other wheels)\n' "$$torch"
	$(py) $(pip) install --progress-bar off -c constraints.txt "$$torch" \
	    $(if $(TORCH_INDEX),--no-deps --index-url '$(TORCH_INDEX)')
	touch $@

define native_note
$(py) -c 'import vitrail._C' 2>/dev/null || {
    echo 'Note: vitrail._C was not built; Vitrail runs without it. It takes a C++ compiler and the'
    echo 'Python headers (apt-get install g++ python3-dev), then make -W setup.py install.'
}
endef

.venv/run.stamp: .venv/torch.stamp $(packaging)
	$(say) 'Installing Vitrail and its dependencies'
	$(py) $(pip) --quiet install -c constraints.txt -e .
	$(native_note)
	touch $@

.venv/dev.stamp: .venv/torch.stamp $(packaging)
	$(say) 'Installing Vitrail and its development tools'
	$(py) $(pip) --quiet install -c constraints.txt -e '.[dev]'
	$(native_note)
	touch .venv/run.stamp $@

# An environment of a single package over .venv: a .pth file adds the other packages of .venv, which
# saves gigabytes.
define overlay
$(say) 'Making $(@D)'
$(py) -m venv --clear $(@D)
$(@D)/bin/python $(pip) --quiet install --no-deps '$(1)'
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
$(py) -c "$$purelib" > "$$($(@D)/bin/python -c "$$purelib")/below.pth"
$(@D)/bin/python -c '$(2)'
touch $@
endef

.venv-pillow12/stamp: .venv/dev.stamp
	$(call overlay,pillow==12.*,import PIL; print("Pillow", PIL.__version__))

.venv-triton36/stamp: .venv/dev.stamp
	$(call overlay,triton==3.6.0,import triton; print("triton", triton.__version__))
