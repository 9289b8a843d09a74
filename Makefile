# make demo       train TD3+BC plain and with C4, side by side, and draw what happens
# make test       the tests, over all cores (four at most) with one thread each unless OMP_NUM_THREADS says otherwise
# make test-long  the property tests on at least 10,000 random cases
# make check      ruff, ruff format, mypy --strict
# make bench      what C4 costs in time
# Each sets up .venv when it is missing or older than pyproject.toml or constraints.txt.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long check bench

demo: .venv/ready
	$(BIN)/python examples/quickstart.py

test: .venv/ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n auto --maxprocesses 4

test-long: .venv/ready
	$(BIN)/python -m pytest -q tests/properties --hypothesis-profile=long --fewest-cases=10000

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && $(BIN)/pip install -q --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p c4buffer

bench: .venv/ready
	$(BIN)/python benchmarks/fit_time.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/ready
