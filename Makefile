# Begin with `make quickstart` or `make test`. Every target installs into .venv first, if .venv is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test test-slow lint lock help-pages gpu

quickstart: $(INSTALLED)  ## fine-tune the embedded ViT on handwritten digits, on the CPU, without a hub
	$(BIN)/python main.py fit --config conf/quickstart.yaml

test: $(INSTALLED)  ## all tests but the slow ones
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests that kill processes and train for minutes
	$(BIN)/python -m pytest -m slow -n 0

gpu: $(INSTALLED)  ## checks and benchmarks that need a GPU, in nine minutes (benchmarks/gpu.py)
	$(BIN)/python -m benchmarks.gpu --output docs/results

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(INSTALLED)  ## renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --extra dev \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

help-pages: $(INSTALLED)  ## renew the pages of --help and fit --help from the parsers
	COLUMNS=80 $(BIN)/python -c "from app.cli import main; main(['--help'])" > app/assets/help/program.txt
	COLUMNS=80 $(BIN)/python -c "from app.cli import main; main(['fit', '--help'])" > app/assets/help/fit.txt

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@
