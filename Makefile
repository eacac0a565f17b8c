PYTHON ?= python

.PHONY: check lint house test planted format

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

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile

planted: ## Plants each fault of tests/planted in a copy, and writes who found it.
	$(PYTHON) tests/planted/plant.py --table=docs/planted.md

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
