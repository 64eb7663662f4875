# make install   the development environment in .venv; the other targets see to it themselves
# make demo      20 ReLU layers on two processes, twice: PyTorch's default weights, then He's
# make test      lint, types, doctests, tests; on other than two cores: make test WORKERS=8
# make quick     the tests without those that start processes or are slow: under 90 seconds on two cores
# make wheel     a wheel with the compiled sums in dist/, for every Python from 3.10 on
# make picture   draw docs/tensorboard.png again from the demo's runs

BIN   := .venv/bin
STAMP := .venv/.installed
PYTHON ?=

.PHONY: install demo test quick lint types wheel picture clean

install: $(STAMP)

# The first Python with venv for which the pins exist (3.11 on); PYTHON=/path/to/python overrides the search.
$(STAMP): pyproject.toml constraints.txt lightning_init/native/_sums.c lightning_init/native/_blocks.h
	@rm -f $@
	@set -e; \
	for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        test -x $(BIN)/python || $$python -m venv .venv; \
	        break; \
	    fi; \
	done; \
	test -x $(BIN)/python || { echo "error: no Python >= 3.11 with venv found; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

FIT := $(BIN)/lightning-init fit --config configs/digits.yaml

demo: $(STAMP)
	@rm -rf runs/digits
	$(FIT) --init.scheme torch_default --trainer.logger.name torch_default
	$(FIT)
	@$(BIN)/python -m examples.table runs/digits/torch_default runs/digits/he_normal

# A file's tests stay together, for its fixtures and its ranks cost more than they do; in the order of tests/conftest.py.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint types
	$(PYTEST)

quick: $(STAMP)
	$(PYTEST) -m "not processes and not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

picture: $(STAMP)
	$(BIN)/python -m examples.picture runs/digits/torch_default runs/digits/he_normal --out docs/tensorboard.png

clean:
	rm -rf .venv build lightning_init/native/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
