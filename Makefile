# Everything runs on a fresh Debian or Ubuntu machine with git, make and Python 3.11; as root, because a real Docker
# Engine is started. Missing packages are installed first. The host's engine is never used.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Workers of pytest. Each has its own rig, and often only waits, so there are twice as many as cores. More than eight
# wait for the disk.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 2 * n : 8)))
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
# In the VM, a skipped test is a failure, everything is slower, and loading unused plugins of pytest takes seconds.
VM_PYTEST := -p tests.vm.fail_on_skip --timeout 900 --durations 5 -p no:xdist -p no:hypothesispytest -p no:cacheprovider
# The tests that run in the VM: arguments of pytest.
VM_TESTS ?= $(wildcard tests/vm/test_inside_*.py) tests/engine/test_volume_quotas.py \
	tests/engine/test_volumes.py::test_growing_under_a_writer_loses_nothing \
	$(addprefix tests/faults/test_kill_volumes.py::,test_create test_delete test_resize_in_place)
# Target folders of `make install`; with DESTDIR, they are below that folder.
PREFIX ?= /opt/gpudock
BINDIR ?= /usr/local/bin
UNITDIR ?= /usr/local/lib/systemd/system
DESTDIR ?=
# The wheel to install instead of one of this checkout.
WHEEL ?=
# Options of `python -m tests.vm`, such as `--on xfs` or `--accel kvm`.
VM_OPTIONS ?=
# A group of tests/mutants/groups.toml (empty: all), the number of mutants of each (0: all), and the seed that chooses them.
GROUP ?=
SAMPLE ?= 0
SEED ?= 1

# The tests start a thousand interpreters, which must share compiled files, also if this variable is set in the shell.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-svg install uninstall wheel test test-deep test-vm mutants lint bench format clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

# The script prints what will be installed before it is installed.
demo: ## create and scale a container on a real engine with eight simulated GPUs
	@MAKE='$(MAKE)' ./scripts/announce-demo $(STAMP)
	@$(MAKE) --no-print-directory $(STAMP)
	@$(BIN)/python -m tests.rig.demo

demo-svg: $(STAMP) ## record the demo as docs/demo.svg, the picture in README.md
	$(BIN)/python -m tests.rig.demo.picture docs/demo.svg

install uninstall wheel: export PYTHON := $(PYTHON)
install uninstall: export PREFIX := $(PREFIX)
install uninstall: export BINDIR := $(BINDIR)
install uninstall: export UNITDIR := $(UNITDIR)
install uninstall: export DESTDIR := $(DESTDIR)
install: export WHEEL := $(WHEEL)

install: ## install gpudockd, gpudock and systemd units on this host, in /opt/gpudock; as root
	@./scripts/install

uninstall: ## remove what `make install` has installed; state and changed configuration stay
	@./scripts/install --uninstall

wheel: ## build the Python package in dist/
	./scripts/build-wheel dist

test: $(STAMP) ## run the everyday tests, on a real engine and a real etcd: about five minutes
	$(PYTEST) -m "not deep" $(PYTEST_ARGS)

test-deep: $(STAMP) ## run all other tests (kill -9, random sequences, outages, fuzz, load): about 20 minutes
	$(PYTEST) -m deep $(PYTEST_ARGS)

test-vm: $(STAMP) .vm/.fetched ## run the tests that need project quotas, in VMs with XFS and ext4
	$(BIN)/python -m pytest -p tests.vm.fail_on_skip tests/vm/test_machine.py tests/vm/test_fail_on_skip.py
	$(BIN)/python -m tests.vm $(VM_OPTIONS) -- $(BIN)/python -m pytest $(VM_PYTEST) $(VM_TESTS)

mutants: $(STAMP) ## check that the fast tests fail on changed code; GROUP=core/operations SAMPLE=300 SEED=1
	$(BIN)/python -m tests.mutants $(GROUP) --sample $(SAMPLE) --seed $(SEED) $(MUTANTS_ARGS)

bench: $(STAMP) ## compare gpudock with the docker command line
	$(BIN)/python -m benchmarks

lint: $(STAMP) ## check types, style, import contracts, protos, forbidden words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python -m tests.words

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.vm/.fetched: scripts/install-prerequisites scripts/fetch-vm-kernel
	./scripts/install-prerequisites --vm
	./scripts/fetch-vm-kernel
	touch $@

clean: ## remove build outputs
	rm -rf $(VENV) .vm .mutants dist client/gpudock/v1 .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml hatch_build.py $(wildcard protos/gpudock/v1/*.proto) scripts/install-prerequisites
	./scripts/install-prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	touch $(STAMP)
