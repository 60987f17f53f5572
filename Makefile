# Everything that is done with this project, for people and for CI alike. `make` or `make help` lists it.
#
# Needs git, make and Python 3.11 or newer; all else goes into $(VENV).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# What to install for: cpu or gpu. Default: gpu where nvidia-smi is there.
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
# The Python that makes the virtual environment.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && command -v $(name))))
VENV ?= .venv
# The extra index that PyTorch publishes for CPU wheels: a smaller installation with DEVICE=cpu.
TORCH_INDEX ?=
# What `make serve` serves, and where.
CONFIG ?= deploy/config/demo.toml
HOST ?= 127.0.0.1
PORT ?= 8000
# Processes that `make test` runs the tests in; 0: in its own, e.g. for ARGS=--pdb.
JOBS ?= 2
# More arguments for the tool that a target runs, e.g. make test ARGS="-k policies".
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALLED := $(VENV)/.installed-$(DEVICE)
DEV := $(VENV)/.installed-dev
PACKAGES := $(wildcard server engine training bench)
CODE := $(PACKAGES) $(wildcard deploy tests scripts)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  DEVICE=$(DEVICE)  PYTHON=$(PYTHON)  VENV=$(VENV)  CONFIG=$(CONFIG)  HOST=$(HOST)  PORT=$(PORT)"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)  JOBS=$(JOBS)  ARGS=$(ARGS)"

.PHONY: install
install: $(INSTALLED) ## Install all that serving and training need, as locked, into VENV

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 to 3.14 found: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(INSTALLED): requirements/$(DEVICE).txt scripts/install.sh pyproject.toml | $(BIN)/python
	@for other in $(filter-out $@ $(DEV),$(wildcard $(VENV)/.installed-*)); do \
		echo "$(VENV) is installed for another device ($$other): make clean first, or choose another VENV" >&2; exit 1; done
	@echo "Installing for DEVICE=$(DEVICE) into $(VENV); this takes some minutes and gigabytes."
	@TORCH_INDEX="$(TORCH_INDEX)" scripts/install.sh $(BIN)/python $(DEVICE)
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: install-dev
install-dev: $(DEV) ## Install what tests and checks need on top

$(DEV): requirements/dev.txt $(INSTALLED)
	@$(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

.PHONY: install-ray
install-ray: $(INSTALLED) ## Install what lanes on a Ray cluster need on top
	@$(PIP) install --no-deps -r requirements/ray.txt

.PHONY: serve
serve: $(INSTALLED) ## Serve CONFIG on HOST:PORT
	@echo "The command line is $(BIN)/collm; to find it as collm: export PATH=\"$(abspath $(BIN)):\$$PATH\""
	$(BIN)/python -m server --config $(CONFIG) --host $(HOST) --port $(PORT) $(ARGS)

SMOLLM := deploy/config/smollm.toml

.PHONY: serve-smollm
serve-smollm: $(INSTALLED) ## Serve SmolLM2-135M with an expert for ICD-10 codes (downloads 93 MB once)
	$(BIN)/python -m training.smollm.base
	@$(MAKE) serve CONFIG=$(SMOLLM)

.PHONY: serve-keys
serve-keys: $(INSTALLED) ## Serve two models composed by cross-attention, and its members beside it
	@$(MAKE) serve CONFIG=deploy/config/keys.toml

.PHONY: keys
keys: $(INSTALLED) ## Retrain the composed example into models/keys (17 minutes on 2 busy cores)
	$(BIN)/python -m training.keys --out models/keys $(ARGS)

.PHONY: demo
demo: $(INSTALLED) ## Retrain the demo pair and its gate into models/demo (22 minutes on 2 quiet cores)
	$(BIN)/python -m training.demo --out models/demo $(ARGS)

.PHONY: bench
bench: $(DEV) ## Measure the server's performance
	$(BIN)/python -m bench $(ARGS)

# Tests that share an engine or a live server stay in one process (tests/groups.py), so more than 2 bring little.
SPREAD = -n $(JOBS)

.PHONY: test
test: $(DEV) ## Run the tests in JOBS processes (but the slow ones and those that need a browser)
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

.PHONY: test-slow
test-slow: $(DEV) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(SPREAD) $(ARGS)

.PHONY: test-browser
test-browser: $(DEV) ## Run the tests that drive a real browser (Debian's chromium, chromium-driver)
	$(BIN)/python -m pytest -m browser $(ARGS)

.PHONY: soak
soak: $(DEV) ## Mixed load on a live demo server (ARGS="--minutes 60 --plot soak.png")
	$(BIN)/python -m tests.robustness.soak $(ARGS)

DOCS_VENV := .venv-docs
DOCS := $(DOCS_VENV)/.installed

$(DOCS): requirements/docs.txt | $(BIN)/python
	@$(BIN)/python -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r requirements/docs.txt
	@touch $@

MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs

.PHONY: docs
docs: $(DOCS) ## Build the documentation's site into out/site; a broken link fails
	$(MKDOCS) build --quiet

.PHONY: docs-serve
docs-serve: $(DOCS) ## Show the documentation's site while it is written (ARGS="--dev-addr 127.0.0.1:8001")
	$(MKDOCS) serve $(ARGS)

.PHONY: lint
lint: $(DEV) ## Check style, imports, formatting, spelling and the documents' links
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	git ls-files -z ':!models' ':!requirements' | xargs -0 $(BIN)/codespell
	git ls-files -z '*.md' | xargs -0 $(BIN)/python scripts/check_links.py

.PHONY: format
format: $(DEV) ## Fix style and formatting
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: types
types: $(DEV) ## Check types
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))

.PHONY: docker-lint
docker-lint: $(DEV) ## Check the Dockerfile, the compose files, the CI workflows and what GitHub reads
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml docker-compose.gpu.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff

# What looks like a secret and is none: words in examples and tests. Digests of the demo pair are in models/.
NO_SECRETS := ^(none|right|wrong|nowhere.*|zebra|my-secret-|s3cret|collm-tls)$$

.PHONY: secrets
secrets: $(DEV) ## Look for keys and passwords in the committed files
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --no-verify --exclude-files '^models/' --exclude-secrets '$(NO_SECRETS)'

.PHONY: check
check: lint types docker-lint secrets test ## Run every check

.PHONY: lock
lock: ## Regenerate requirements/*.txt from pyproject.toml (ARGS=--upgrade for the newest versions)
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/lock.sh $(ARGS)

.PHONY: clean
clean: ## Remove VENV and everything that tools left behind
	rm -rf $(VENV) $(DOCS_VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
