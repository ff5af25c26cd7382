# Everything runs on a fresh Debian or Ubuntu machine that has git, make and Python 3.11; as root, since a real Docker
# Engine is started. What is missing is installed first; nothing of the host's own engine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each worker has a rig of its own, and often waits for what lasts as long as it lasts: so twice as many as there are
# cores. More than eight and they wait for the disk.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 2 * n : 8)))
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
# In the VM, what is skipped has failed; all is slower; and what pytest would load besides takes seconds.
VM_PYTEST := -p tests.vm.fail_on_skip --timeout 900 --durations 5 -p no:xdist -p no:hypothesispytest -p no:cacheprovider
# What runs there: words for pytest.
VM_TESTS ?= $(wildcard tests/vm/test_inside_*.py) tests/engine/test_volume_quotas.py \
	tests/engine/test_volumes.py::test_growing_under_a_writer_loses_nothing \
	$(addprefix tests/faults/test_kill_volumes.py::,test_create test_delete test_resize_in_place)
# Where `make install` puts things; with DESTDIR below that folder, and nothing else is touched.
PREFIX ?= /opt/gpudock
BINDIR ?= /usr/local/bin
UNITDIR ?= /usr/local/lib/systemd/system
DESTDIR ?=
# What it installs, if not a wheel of this checkout.
WHEEL ?=
# Options of `python -m tests.vm`, such as `--on xfs` or `--accel kvm`.
VM_OPTIONS ?=
# Rooms of tests/mutants/rooms.toml (all, if empty), how many mutants of each (0: all), and which ones these are.
ROOM ?=
SAMPLE ?= 0
SEED ?= 1

# A suite starts a thousand interpreters: none may compile all over again what one has compiled, whatever is set here.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-svg install uninstall wheel test test-deep test-vm mutants lint bench format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

# It says what it installs before it does.
demo: ## the main job on a real engine with eight simulated GPUs
	@MAKE='$(MAKE)' ./scripts/announce-demo $(STAMP)
	@$(MAKE) --no-print-directory $(STAMP)
	@$(BIN)/python -m tests.rig.demo

demo-svg: $(STAMP) ## docs/demo.svg, the picture in README.md, from the output of the demo
	$(BIN)/python -m tests.rig.demo.picture docs/demo.svg

install uninstall wheel: export PYTHON := $(PYTHON)
install uninstall: export PREFIX := $(PREFIX)
install uninstall: export BINDIR := $(BINDIR)
install uninstall: export UNITDIR := $(UNITDIR)
install uninstall: export DESTDIR := $(DESTDIR)
install: export WHEEL := $(WHEEL)

install: ## gpudockd and gpudock for this host, in /opt/gpudock, with systemd units; as root
	@./scripts/install

uninstall: ## removes what `make install` has installed; state and changed configuration stay
	@./scripts/install --uninstall

wheel: ## the Python package, in dist/
	./scripts/build-wheel dist

test: $(STAMP) ## the everyday tests, on a real engine and a real etcd: about five minutes
	$(PYTEST) -m "not deep" $(PYTEST_ARGS)

test-deep: $(STAMP) ## the others: kills at every moment, long random sequences, outages, fuzz, loads: about 20 minutes
	$(PYTEST) -m deep $(PYTEST_ARGS)

test-vm: $(STAMP) .vm/.fetched ## what needs project quotas, in a VM with XFS and ext4 that have them
	$(BIN)/python -m pytest -p tests.vm.fail_on_skip tests/vm/test_machine.py tests/vm/test_fail_on_skip.py
	$(BIN)/python -m tests.vm $(VM_OPTIONS) -- $(BIN)/python -m pytest $(VM_PYTEST) $(VM_TESTS)

mutants: $(STAMP) ## what the fast tests notice of changed lines, by room; ROOM=core/operations SAMPLE=300 SEED=1
	$(BIN)/python -m tests.mutants $(ROOM) --sample $(SAMPLE) --seed $(SEED) $(MUTANTS_ARGS)

bench: $(STAMP) ## gpudock beside the docker command line, in one run
	$(BIN)/python -m benchmarks

lint: $(STAMP) ## types, style, import contracts, protos, forbidden words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python -m tests.words

format: $(STAMP) ## put the code in its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.vm/.fetched: scripts/install-prerequisites scripts/fetch-vm-kernel
	./scripts/install-prerequisites --vm
	./scripts/fetch-vm-kernel
	touch $@

clean: ## remove what was built
	rm -rf $(VENV) .vm .mutants dist client/gpudock/v1 .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml hatch_build.py $(wildcard protos/gpudock/v1/*.proto) scripts/install-prerequisites
	./scripts/install-prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	touch $(STAMP)
