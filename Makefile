# `make help` tells what there is. Needed: Python 3.11 to 3.13 with venv, and make; everything else goes into .venv.

PROFILE ?= quick
FRESH ?=
SEEDS ?= $(if $(FRESH),2)
DEVICE ?=
MINUTES ?= 10
PYTHON ?=

SHELL := /bin/sh
PY := .venv/bin/python
OUTPUT := $(if $(FRESH),--output fresh)
RUN_FLAGS := --profile $(PROFILE) $(OUTPUT) $(if $(DEVICE),--device $(DEVICE))
# PyTorch's and BLAS's threads would fight over the cores with pytest's workers
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# kept bytecode: tests and runs start hundreds of processes, each of which would compile torch and all else anew, for seconds
export PYTHONDONTWRITEBYTECODE :=

# Sets $$python to the interpreter asked for, or to the first that will do; says what is missing.
define find_python
for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
  "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null && break; python=; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python 3.11, 3.12 or 3.13 with venv and ensurepip found (tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python))." >&2; \
  echo "Install one (Debian and Ubuntu: also its -venv package), or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
fi
endef

# Holds the lock of a file while a command runs.
define LOCKED
import fcntl, subprocess, sys
lock = open(sys.argv[1], "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX)
except OSError as error:
    print(f"warning: this disk supports no locks ({error}): do not start make twice at once", file=sys.stderr)
sys.exit(subprocess.call(sys.argv[2:]))
endef
export LOCKED

# $(call once,FILE,COMMANDS): run COMMANDS and touch FILE, which is in a virtual environment; of two makes at once one
# does it and the other waits.
define once
@$(find_python); "$$python" -c "$$LOCKED" $(firstword $(subst /, ,$(1))).guard \
sh -euc 'python=$$1; if [ -z "$$(find $(1) -newer requirements.lock -newer pyproject.toml 2>/dev/null)" ]; then $(2); touch $(1); fi' \
sh "$$python"
endef

.PHONY: help venv reproduce recordings smoke test coverage status compare doctor site bench gpu peers lab lock clean

help: ## this list
	@echo "SCRAPL, a replication. Targets:"
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo "Variables (make reproduce PROFILE=paper DEVICE=cuda):"
	@echo "  PROFILE=quick   quick (two CPU cores), paper (a CUDA GPU) or smoke (toy size, numbers mean nothing)"
	@echo "  FRESH=1         ignore the committed records (and keep them): everything is made anew, in fresh/ (delete it to begin again)"
	@echo "  SEEDS=          the first so many seeds of each method only; 2 with FRESH=1"
	@echo "  TR808_DIR=      a folder of one-shots (WAV, FLAC, AIFF at 44.1 kHz; BD, SD, Tom, OH, CH): also the TR-808 tasks, in recordings/"
	@echo "  DEVICE=         cpu or cuda; by default what the profile says"
	@echo "  MINUTES=10      of make gpu"
	@echo "  PYTHON=         the interpreter to build .venv with; by default the first fit one found"

venv: .venv/.installed ## make .venv from requirements.lock (the other targets do so themselves)

.venv/.installed: requirements.lock pyproject.toml
	$(call once,$@,"$$python" -m venv .venv; $(PY) -m pip install --no-compile -r requirements.lock; \
	$(PY) -m pip install --no-deps --no-build-isolation -e .)

reproduce: venv ## run what is missing of the granular task, then all notebooks: tables, figures, report card
	env -u TR808_DIR $(PY) -m replication run --task granular $(if $(SEEDS),--seeds 0-$$(($(SEEDS) - 1))) $(RUN_FLAGS)
	env -u TR808_DIR $(PY) -m replication notebook --profile $(PROFILE) $(OUTPUT)
	$(if $(TR808_DIR),$(MAKE) recordings)

recordings: venv # the TR-808 tasks with the recordings in TR808_DIR, into recordings/
	$(PY) -m replication run --task tr808_micro,tr808_meso --profile $(PROFILE) $(if $(DEVICE),--device $(DEVICE)) --output recordings
	$(PY) -m replication notebook 07_tr808 --profile $(PROFILE) --output recordings

smoke: ## the same at toy size, from nothing, in minutes
	rm -rf results/smoke figures/smoke checkpoints/smoke
	$(MAKE) reproduce PROFILE=smoke

test: venv ## lint, layout, types and tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(ONE_THREAD) $(PY) -m pytest -n auto --maxprocesses 4

coverage: venv ## how much of both packages the tests run, line by line (workers and kernels, other processes, left out)
	$(ONE_THREAD) $(PY) -m pytest -n auto --maxprocesses 4 --cov=scrapl_lib --cov=replication --cov-report=term-missing:skip-covered

status: venv ## which runs of PROFILE are done, missing, stale or failed
	env -u TR808_DIR $(PY) -m replication status --profile $(PROFILE) $(OUTPUT)

compare: venv ## each cell of Tables 1 to 9 and each claim: ours, the paper's, verdict
	env -u TR808_DIR $(PY) -m replication compare --profile $(PROFILE) $(OUTPUT)

doctor: venv ## versions, devices, disk, weights, records: what is wrong, and a fix for each
	$(PY) -m replication doctor

site: venv ## static pages from what make reproduce left of PROFILE: build/site/index.html
	$(PY) site/build_site.py --profile $(PROFILE) $(OUTPUT)

bench: venv peers ## ratios to scrapl-loss 0.1.0: a path, the full JTFS, an update, a training step (21 GB of memory, 25 minutes)
	$(PY) benchmarks/bench.py

gpu: venv ## the first minutes on a GPU: checks, costs, runs; into build/first_minutes (PROFILE=paper DEVICE=cuda unless told)
	$(PY) benchmarks/first_minutes.py --minutes $(MINUTES) $(if $(DEVICE),--device $(DEVICE)) \
	--profile $(if $(filter file,$(origin PROFILE)),paper,$(PROFILE))

peers: .venv-peers/.installed ## make .venv-peers with the authors' package, which cannot live beside kymatio

.venv-peers/.installed: requirements.lock
	$(call once,$@,"$$python" -m venv .venv-peers; \
	.venv-peers/bin/python -m pip install scrapl-loss==0.1.0 torch==2.13.0 "scipy<1.17" $$(grep ^nnaudio== requirements.lock))

lab: venv ## open JupyterLab at the first notebook
	.venv/bin/jupyter lab notebooks/00_start_here.ipynb

# in a new environment .venv-lock, under Python 3.11: the lock and environment.yml are tested equal
lock: ## write requirements.lock and environment.yml anew from pyproject.toml (maintainers)
	@$(find_python); "$$python" -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install torch==2.13.0 ".[replication,test,site]"
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude scrapl-lib | sed 's/+[a-z0-9]*$$//' > .venv-lock/pins
	{ grep '^#' requirements.lock; cat .venv-lock/pins; } > .venv-lock/new && mv .venv-lock/new requirements.lock
	{ sed '/- pip:/q' environment.yml; sed 's/^/      - /' .venv-lock/pins; echo '      - -e .'; } > .venv-lock/new && mv .venv-lock/new environment.yml
	rm -r .venv-lock

clean: ## remove executed notebooks, smoke results and caches (not .venv, results, fresh/ or checkpoints)
	rm -rf executed results/smoke figures/smoke build .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage *.egg-info
	find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
