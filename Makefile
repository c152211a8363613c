# Everything runs in .venv, with the versions of constraints.txt. A Python that is not called python3: make PYTHON=...
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo up down test lint bench clean .venv

# Runs the whole system once, on a day of orders, and stops it.
demo: .venv
	@exec $(BIN)/python -m beluga_airflow.cli.stack demo

# Starts the whole system and stays; Ctrl-C or `make down` stops it.
up: .venv
	@exec $(BIN)/python -m beluga_airflow.cli.stack up

# Installs nothing: without .venv nothing of ours can be running.
down:
	@test -x $(BIN)/python || { echo "No stack is running: there is no .venv."; exit 0; }; \
		exec $(BIN)/python -m beluga_airflow.cli.stack down

test: .venv
	@exec $(BIN)/pytest -n 2 --dist loadfile

lint: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Answers the questions of benchmarks/ (some minutes), into benchmarks/results.json and docs/benchmarks.md.
bench: .venv benchmarks/.venv/installed
	@exec $(BIN)/python benchmarks

# What we are compared with has an environment of its own.
benchmarks/.venv/installed: benchmarks/peers.txt | .venv
	@echo "Installing the pinned peers into benchmarks/.venv ..."
	@$(BIN)/python -m venv benchmarks/.venv
	@benchmarks/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Removes what tools leave behind; .venv and the state of the demo (.beluga) stay.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "This needs Python 3.11 or later, and '$(PYTHON)' is not one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making .venv ..."
	@$(PYTHON) -m venv .venv
	@echo "Installing the pinned dependencies (a few minutes the first time) ..."
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
