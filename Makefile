# make demo: set everything up and run the main job.  make test: set everything up and run the tests.
# PYTHON chooses the interpreter the environment is built from, VENV where it lies.
PYTHON ?= python3.11
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: demo test cluster lint clean

demo: $(READY)
	$(VENV)/bin/python sweeps/k_grid.py --profile demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Sweeps over hosts made of network namespaces; skipped, with the reason, where those are not allowed.
cluster: $(READY)
	$(VENV)/bin/python -m pytest -m 'cluster and not slow'

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict

# The stamp is newer than what it was built from, so a second call has nothing to install.
$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trt,openvino,postgresql]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
