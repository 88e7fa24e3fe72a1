# Every target makes what it needs; the first one takes the time of a pip install.
#
#   make demo                     the main job on a sample of real flights
#   make demo FLIGHTS=file.csv.gz on your own file; RUNNER=PrismRunner for the other local runner
#   make test                     the tests that need only Python
#   make test-all                 and those that need emulators, Prism, Java, containers

PYTHON  ?= python3
RUNNER  ?= FnApiRunner
FLIGHTS ?=
ARGS    ?=
PYTEST_ARGS ?=

BEAM_VERSION := 2.77.0
BIN   := .venv/bin
CACHE := .cache
PRISM := $(CACHE)/bin/prism
EMULATORS := $(CACHE)/emulators/.stamp

.PHONY: demo test lint test-emulators test-portable test-containers test-kcl test-all soak bench emulators prism clean

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.demo: .venv/.python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

.venv/.dev: .venv/.python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[demo,test,lint]'
	@touch $@ .venv/.demo

# Emulators are npm packages, pinned: the list of their known differences belongs to these versions.
$(EMULATORS): Makefile
	npm install --silent --no-fund --no-audit --prefix $(CACHE)/emulators kinesis-local@0.6.2 dynalite@4.0.0
	@touch $@
emulators: $(EMULATORS)

$(PRISM):
	GOBIN=$(CURDIR)/$(CACHE)/bin go install github.com/apache/beam/sdks/v2/go/cmd/prism@v$(BEAM_VERSION)
prism: $(PRISM)

ifeq ($(RUNNER),PrismRunner)
demo: $(PRISM)
DEMO_RUNNER_ARGS := --prism_location=$(CURDIR)/$(PRISM)
endif
demo: .venv/.demo
	$(BIN)/python -m samza_kinesis_io.pipelines.demo --runner=$(RUNNER) $(DEMO_RUNNER_ARGS) \
	  $(if $(FLIGHTS),--flights '$(FLIGHTS)') $(ARGS)

# In as many processes as there are cores, up to four: beyond that the tests wait for each other's servers.
test: .venv/.dev
	$(BIN)/pytest -n auto --maxprocesses=4 $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# (pytest's status 5: the tier has no test yet.)
test-emulators: .venv/.dev $(EMULATORS)
	$(BIN)/pytest -m emulators $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-portable: .venv/.dev $(PRISM)
	$(BIN)/pytest -m portable $(PYTEST_ARGS) || [ $$? -eq 5 ]

# Needs a Docker daemon; .ci/with-docker lends one. NODE_BASE_IMAGE: what to build on instead of node:20-slim.
test-containers: .venv/.dev
	$(BIN)/pytest -m containers $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-kcl: .venv/.dev
	$(BIN)/pytest -m kcl $(PYTEST_ARGS) || [ $$? -eq 5 ]

# A tier whose tool cannot be had here is skipped with the reason (REQUIRE_ALL_TIERS=1: fails).
test-all: .venv/.dev
	-@$(MAKE) --no-print-directory emulators
	-@$(MAKE) --no-print-directory prism
	$(BIN)/pytest -m 'not soak' $(PYTEST_ARGS)

soak: .venv/.dev
	HYPOTHESIS_PROFILE=soak $(BIN)/pytest -m 'soak or hypothesis' --timeout=0 $(PYTEST_ARGS)

bench: .venv/.dev
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b $(ARGS) || exit 1; done

clean:
	rm -rf .venv .tox .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
