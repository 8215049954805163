# Each target makes its own virtual environment (.venv) and installs all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
APT := -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1

# Oversubscribed threads are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test browser lint test-slow test-matrix bench testbed docs screenshots notebooks clean

demo: $(INSTALLED)  ## The main job: train, splice, measure and name heads on the testbed models.
	$(BIN)/lorsa-lens demo

test: $(INSTALLED) lint browser  ## Lint, types and all tests, those of pages in Chromium.
	$(BIN)/python -m pytest -n 2

browser:  ## Chromium, for the tests of pages in a browser, from Debian's packages; without it they are skipped.
	@command -v chromedriver > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get $(APT) update \
	&& apt-get $(APT) install -y --no-install-recommends chromium chromium-driver > /dev/null; } \
	|| echo "No Chromium (Debian: chromium-driver), and no right to install it: its tests are skipped."

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: $(INSTALLED)  ## What training reaches, into slow.xml: forty minutes; the real model only where it is at hand.
	$(BIN)/python -m pytest -m slow -s --junitxml slow.xml

test-matrix: $(INSTALLED)  ## All tests on TransformerLens 2.16, 2.18, 3.9 and 4.3.
	$(BIN)/nox

bench: $(INSTALLED)  ## Lorsas beside dense recipes, all shapes, into docs/performance.md: a quarter of an hour.
	$(BIN)/python -m benchmarks.table --write docs/performance.md

testbed: $(INSTALLED)  ## Train the testbed models anew, in place of the committed weights.
	$(BIN)/python -m lorsa_lens.testbed.train

docs: $(INSTALLED)  ## The documentation, in site/. A broken link, anchor or name is an error.
	$(BIN)/python -m website.drawings
	PYTHONPATH=. $(BIN)/python -m zensical build --strict

screenshots: $(INSTALLED)  ## The pictures of the README, photographed in Chromium.
	$(BIN)/python docs/screenshots.py

notebooks: $(INSTALLED)  ## Run the notebooks again, and keep their outputs.
	$(BIN)/python examples/notebooks/execute.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) .nox .cache lorsa_demo site
