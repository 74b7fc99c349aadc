# `make help` lists what there is. The virtual environment lives in .venv; stamp files in it remember what was
# installed, so a second `make run` starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test check bench format browser

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST)

# On the own machine the sites that one logs in to are often local ones; a server in the open must not reach them.
run: export ALLOW_PRIVATE_TARGETS ?= 1
# Whoever starts this on the own machine may run anything there already.
run: export COMMANDS ?= any
# Ctrl-C means now: nobody wants to wait for a minute for what they have stopped.
run: export COMMAND_ON_STOP ?= interrupt
run: $(VENV)/.runtime ## Start server and worker on http://127.0.0.1:8000 (PORT=, HOST=, DATA_DIR= ...)
	@$(BIN)/python -m project.run

# A file at a time, for its servers are its own. Three for two cores: a third of the time of a live test is waiting.
test: $(VENV)/.dev browser ## Run every test (ARGS="-k A28" for some of them)
	@if ! command -v node >/dev/null 2>&1; then echo "node is missing: the tests of the scripts (tests/js) are left out"; \
	else node --test tests/js/*.test.mjs; fi
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

check: $(VENV)/.dev ## Check style, types, the law of imports, and that no migration is missing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python manage.py makemigrations --check --dry-run

bench: $(VENV)/.bench ## Measure the streams and the queue beside others (ARGS="streams --runs 1", ARGS=--help)
	@$(BIN)/python -m tests.bench $(ARGS)

format: $(VENV)/.dev ## Bring the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "switchboard: $(PYTHON) is missing or older than Python 3.11; name another: make run PYTHON=python3.12"; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "switchboard: the virtual environment could not be made (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	@echo "Installing what requirements.txt names (once)"
	@$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(BIN)/python
	@echo "Installing what requirements-dev.txt names (once)"
	@$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime

# What only the bench needs: the packages that it measures itself against.
$(VENV)/.bench: tests/bench/requirements.txt $(VENV)/.dev
	@echo "Installing what tests/bench/requirements.txt names (once)"
	@$(BIN)/python -m pip install --quiet -r tests/bench/requirements.txt
	@touch $@

# The browser tests drive a real Chromium. It is installed where that is possible, and missed in words where it is not.
browser:
	@if command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 \
		|| command -v google-chrome >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "Installing Chromium for the browser tests (once)"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "Chromium is missing: the browser tests are left out (on Debian: sudo apt-get install chromium)"; fi
