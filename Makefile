# Every target sets up all that it needs in .venv. `make PYTHON=python3.12 demo` chooses another Python 3.11 or later.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

SIZE := full
bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/run.py --size $(SIZE)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[dev,examples]'
	touch $@

clean:
	rm -rf $(VENV) runs
