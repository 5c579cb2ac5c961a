# Everything goes through `.venv/bin/python -m ...`: the scripts beside it carry the absolute path of
# the checkout in their first line, which breaks when the path has a space in it or changes.
# Only what GNU make 3.81 (macOS) knows is used here.

PYTHON ?= python3
TORCH_INDEX ?=
LAB_FLAGS ?=
RECORD ?=
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
INSTALLED_BROWSER := .venv/.installed-browser
INSTALLED_CUDA := .venv/.installed-cuda

# A cell of a walkthrough notebook takes seconds; starting ranks on a loaded 2-core machine, tens.
CELL_TIMEOUT := 120
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
	--nbval-cell-timeout $(CELL_TIMEOUT)

# One process runs ranks and notebooks, one after the other; the other one runs the rest meanwhile
# (tests/conftest.py).
TWO_PROCESSES := --numprocesses 2

.PHONY: help walkthrough lab test test-browser test-cuda clean FORCE

help:
	@echo "make walkthrough   run every notebook, write them as HTML with an index under build/walkthrough/"
	@echo "make lab           open JupyterLab on the first notebook"
	@echo "make test          linter, types, tests, and every notebook against its committed outputs"
	@echo "make test-browser  only the tests that use the notebooks in a browser; needs Chromium"
	@echo "make test-cuda     only the tests that need an NVIDIA GPU; installs FlashInfer and Triton"
	@echo "make clean         remove .venv, build and caches"
	@echo ""
	@echo "Each makes .venv and installs what it needs the first time. Settings:"
	@echo "  PYTHON=python3.12   the interpreter .venv is made from (3.11 or newer; default: python3)"
	@echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "                      Linux without a GPU: the CPU build of torch, several GB smaller"
	@echo "  LAB_FLAGS='--no-browser --allow-root'"
	@echo "                      passed to JupyterLab; these two for a container or a remote machine"
	@echo "  RECORD=notebooks/results/my_gpu_tests.json"
	@echo "                      where test-cuda keeps its outcomes, devices and versions"

walkthrough: $(INSTALLED)
	@$(VENV_PYTHON) notebooks/build.py --cell-timeout $(CELL_TIMEOUT)

lab: $(INSTALLED)
	@$(VENV_PYTHON) -m jupyterlab $(LAB_FLAGS) notebooks/00_start_here.ipynb

test: $(INSTALLED)
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) -m pytest $(TWO_PROCESSES) $(NBVAL) notebooks tests

test-browser: $(INSTALLED_BROWSER)
	@$(VENV_PYTHON) -m pytest -m browser tests/browser

test-cuda: $(INSTALLED_CUDA)
	@$(VENV_PYTHON) -m pytest -m cuda $(if $(RECORD),--record "$(RECORD)") tests

clean:
	rm -rf .venv build stepmoe.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

PIP_INSTALL = $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt

# Without it, JupyterLab shows an error in place of an explorer when a saved notebook is reopened.
LAB_SETTINGS := {"@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": true}}

# The stamp holds the path of the checkout: an editable install does not survive being moved.
ifneq ($(shell cat $(INSTALLED) 2> /dev/null),$(CURDIR))
$(INSTALLED): FORCE
endif
FORCE:

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "'$(PYTHON)' was not found. Install Python 3.11 or newer, or say where it is:"; \
		echo "make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$("$(PYTHON)" --version) is too old: stepmoe needs 3.11 or newer."; \
		echo "Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(VENV_PYTHON) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv || { \
		echo "Could not make .venv. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@echo "Installing into .venv (downloads torch the first time: some minutes) ..."
	@$(PIP_INSTALL) -e ".[notebooks,test,dev]"
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '$(LAB_SETTINGS)' > .venv/share/jupyter/lab/settings/overrides.json
	@echo "$(CURDIR)" > $@

$(INSTALLED_BROWSER): $(INSTALLED)
	@echo "Installing Playwright into .venv ..."
	@$(PIP_INSTALL) -e ".[notebooks,test,dev,browser]"
	@touch $@

$(INSTALLED_CUDA): $(INSTALLED)
	@echo "Installing FlashInfer and Triton into .venv ..."
	@$(PIP_INSTALL) -e ".[notebooks,test,dev,cuda]"
	@touch $@
