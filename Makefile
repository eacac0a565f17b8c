PYTHON ?= python

.PHONY: check lint house docs test planted format

check: lint house ## Only checks; changes nothing.

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	lint-imports
	$(PYTHON) docs/draw.py --check
	$(PYTHON) docs/list_flags.py --check

house: ## The rules that no linter knows.
	$(PYTHON) -m pytest -q tests/unit/test_house.py

docs: ## Builds the pages into site/; a link or a name that is not there is an error.
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile --ci

planted: ## Plants each fault of tests/planted in a copy, and writes who found it.
	$(PYTHON) tests/planted/plant.py --table=docs/planted.md

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
