# Two commands on a fresh machine: `make lab` and `make test`. Each makes .venv itself where it is missing, and
# fetches and verifies the base model. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed

# One thread a process where several run: two test processes with two threads each fight for two cores.
NOTEBOOK_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONHASHSEED=0 MINILORA_STRICT=1

# nbgrader and otter are installed for the masters; a learner's JupyterLab shows nothing of them.
GRADERS_IN_LAB := @jupyter/nbgrader @jupyter-notebook/lab-extension ipylab
GRADERS_ON_THE_SERVER := notebook $(addprefix nbgrader.server_extensions., \
	formgrader validate_assignment assignment_list course_list)

.PHONY: help lab test test-all demo bench build slides masters lint unit notebooks long base lock clean
.DEFAULT_GOAL := help

help:
	@echo "make lab       JupyterLab on the course, with a real 135M-parameter model ready for it"
	@echo "make test      lint, types, unit tests, doctests, notebooks, browser: at most 20 minutes on two cores"
	@echo "make demo      fine-tune the model for a few minutes and read the report: runs/demo/report.html"
	@echo "make bench     ours beside its peers, measured in one run"
	@echo "make build     notebooks from lessons/ (those whose sources changed), and CLAIMS.md"
	@echo "make slides    build/slides and build/pages: each lesson to show and to print, in one file without a network"
	@echo "make masters   build/nbgrader and build/otter: each lesson for graders, with its answers"
	@echo "make lint      ruff and mypy"
	@echo "make test-all  make test, and the long checks"
	@echo "make lock      constraints.txt from what is installed in .venv"
	@echo "make clean     removes .venv and what tools left behind (not the base model)"

lab: base
	@echo "JupyterLab opens on notebooks/: begin with student/00_start_here.ipynb (solved: 00_start_here.ipynb)"
	@cd notebooks && ../$(VENV)/bin/jupyter lab $(LAB_ARGS)

test: lint unit notebooks

test-all: test long

demo: base
	@$(VENV)/bin/minilora demo --out runs/demo --json runs/demo/numbers.json $(DEMO_ARGS)

bench: base
	@mkdir -p runs/bench
	@$(PY) benchmarks/nf4_kernels.py --json runs/bench/nf4_kernels.json
	@$(PY) benchmarks/attention.py
	@$(PY) benchmarks/products.py
	@$(PY) benchmarks/training_step.py --json benchmarks/results.json
	@$(PY) benchmarks/growth.py
	@$(PY) benchmarks/generation.py --json runs/bench/generation.json
	@$(PY) benchmarks/serving.py --json runs/bench/serving.json
	@$(PY) benchmarks/dora_step.py --json runs/bench/dora_step.json
	@$(PY) benchmarks/demo_task.py --json runs/bench/demo_task.json

build: base
	@$(NOTEBOOK_ENV) $(PY) -m minilora.classroom.build
	@$(NOTEBOOK_ENV) $(PY) -m minilora.classroom.ledger

slides: build
	@$(PY) -m minilora.classroom.build --pages

masters: $(READY)
	@$(PY) -m minilora.classroom.build --masters $(if $(SECRET_FILE),--secret-file $(SECRET_FILE))

lint: $(READY)
	@echo "lint: ruff format, ruff check, mypy"
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy --no-error-summary

unit: base
	@echo "unit tests, doctests, other people's software as oracle, JupyterLab in a browser"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "not long" $(PYTEST_ARGS)

notebooks: base
	@echo "notebooks: are they the ones their sources make? then every one is run"
	@$(PY) -m minilora.classroom.build --check
	@$(NOTEBOOK_ENV) $(PY) -m pytest notebooks

long: base
	@echo "long checks"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m long --ignore tests/methods/test_mutants.py $(PYTEST_ARGS)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m long tests/methods/test_mutants.py

base: $(READY)
	@$(PY) -m minilora.llm.smollm2

lock: $(READY)
	@$(PY) -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
		| sed 's/+cpu$$//' | LC_ALL=C sort -f > constraints.txt
	@echo "constraints.txt: $$(wc -l < constraints.txt) pins"

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minilora needs Python 3.11 or newer; this is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.12 ... names another")'
	@echo "making $(VENV): Python, PyTorch, JupyterLab and the libraries the tests compare with (a few minutes, once)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[course,dev,grading]"
	@$(VENV)/bin/jupyter labextension disable --level=sys_prefix $(GRADERS_IN_LAB) >/dev/null 2>&1
	@for each in $(GRADERS_ON_THE_SERVER); do $(VENV)/bin/jupyter server extension disable --sys-prefix $$each >/dev/null 2>&1; done
	@touch $@
