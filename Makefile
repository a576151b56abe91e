# Two commands matter: `make demo` and `make test`. Both set up .venv first; a second run finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything here starts many processes: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE
PROTO := proto/switchover/v1/host.proto proto/switchover/v1/migration.proto

.PHONY: help demo test test-matrix test-interop test-faults soak fuzz check lint proto proto-fresh mutation wheel bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    migrate a machine over localhost'
	@echo 'make test    run every test'
	@echo 'make test-matrix  run the long journeys and scenarios'
	@echo 'make test-interop  run against other implementations, where they are installed (docs/vfio-user-extensions.md)'
	@echo 'make test-faults  each component fails in each phase (SEED=1: devices and order)'
	@echo 'make soak    machines go to and fro between two hosts while things break (SECONDS=60 SEED=any; the same seed replays)'
	@echo 'make fuzz    feed decoders with spoilt inputs (SECONDS=60 SEED=any DECODERS=all)'
	@echo 'make check   format, lint, types, proto freshness and lint, wheel in a clean environment'
	@echo 'make bench   measure (benchmarks/)'
	@echo 'make mutation  change the pure modules of dirty tracking and the verifier, and see which tests notice'
	@echo 'make proto   regenerate proto/switchover/v1'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Switchover needs Python 3.11 or newer; set PYTHON=…'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/switchover demo

# Two at a time, for they wait for processes more than half of their time; those of a file share hosts, so they stay
# together, and files with few of them, which take longest, are not left to the end.
test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Every device failure, tracking strategy and scenario: several minutes of real processes.
test-matrix: $(VENV)/.installed
	@$(BIN)/python -m pytest -m matrix $(ARGS)

# Says of each test that it skips what is not there: SWITCHOVER_LIBVFIO_USER, SWITCHOVER_QEMU.
test-interop: $(VENV)/.installed
	@$(BIN)/python -m pytest -m interop -rs $(ARGS)

test-faults: $(VENV)/.installed
	@SEED=$(SEED) $(BIN)/python -m pytest -m 'matrix or not matrix' tests/faults $(ARGS)

# The seed is printed, and with what fails the step of its plan; FIRST=N begins with step N. JSON=FILE takes the figures.
soak: $(VENV)/.installed
	@PYTHONPATH=tests/journeys:tests/faults $(BIN)/python tests/soak/soaking.py --seconds $(or $(SECONDS),60) \
		$(if $(SEED),--seed $(SEED)) $(if $(FIRST),--first $(FIRST)) $(if $(JSON),--json $(JSON))

# What fails is written to tests/data/fuzz, where `make test` finds it from then on; the same seed gives the same inputs.
fuzz: $(VENV)/.installed
	@$(BIN)/python tests/fuzz/fuzzing.py --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(DECODERS)

check: proto-fresh
	$(MAKE) --no-print-directory lint wheel

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint proto

proto: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTO)

proto-fresh: proto
	@test -z "$$(git status --porcelain -- proto)" || { git status --short -- proto; git diff --stat -- proto; echo 'generated code differs from proto/: run make proto and commit it'; exit 1; }

# The wheel works away from this tree: clean environment, installed, started.
wheel: $(VENV)/.installed-dev
	rm -rf dist && $(BIN)/python -m build --quiet --wheel --outdir dist .
	tests/wheel.sh dist/*.whl $(PYTHON)

# What survives, and why: docs/dirty-tracking.md. A mutant may loop and take memory, hence the limit.
mutation: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,mutation]'
	ulimit -d 4194304; nice $(BIN)/mutmut run; $(BIN)/mutmut results

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants
