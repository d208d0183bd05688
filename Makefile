# The commands of the project; `make help` lists them. Works with GNU make 3.81 (macOS) and later.

# Python 3.11 or later, from which .venv is made.
PYTHON = python3
# cuda12 or cuda13: fit on an NVIDIA GPU. Empty: on the processor.
JAX =
# Where to run, a folder of workflow/profiles.
PROFILE = $(if $(JAX),gpu,default)
# Further arguments of snakemake (run), pytest (test), uv (lock) or the studies (bench, calibrate).
ARGS =

GPU_BUILDS = cuda12 cuda13 cuda12-local cuda13-local
ifneq ($(filter-out $(GPU_BUILDS),$(JAX)),)
$(error JAX=$(JAX) is not a GPU build of JAX; wanted one of: $(GPU_BUILDS), or nothing for the processor)
endif

ifeq ($(wildcard workflow/profiles/$(PROFILE)/config.yaml),)
$(error PROFILE=$(PROFILE) is no profile; there are: $(notdir $(wildcard workflow/profiles/*)))
endif

ifneq ($(words $(CURDIR)),1)
$(error the path "$(CURDIR)" has a space in it, and Snakemake starts no script under such a path; please move this folder)
endif

VENV = .venv/bin/python
# What a profile needs, and the test of a cluster run where there is SLURM. Not for all: once it is installed, the plugin
# lets no Snakemake start on a machine without `which`.
PLUGIN = $(shell grep -qs '^executor: *slurm' workflow/profiles/$(PROFILE)/config.yaml && echo .venv/installed-slurm)
TESTED = $(shell PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null && echo .venv/installed-slurm)
INSTALLED = .venv/installed$(JAX:%=-%)
# What a run without further arguments has brought up to date.
UP_TO_DATE = import yaml; folder = yaml.safe_load(open('config.yaml')).get('results', 'results'); \
             print(f'{folder}/catalogue.h5 and {folder}/report.html are up to date.')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test bench calibrate picture tables lock clean

help:
	@echo 'make run     fit the images of config.yaml; again: only what has changed since'
	@echo '             JAX=cuda12 or JAX=cuda13: on an NVIDIA GPU; PROFILE=slurm: on a cluster (docs/cluster.md)'
	@echo '             ARGS="...": further arguments of snakemake'
	@echo 'make test    check style, formats and types, and run every test; ARGS="...": further arguments of pytest'
	@echo 'make bench   measure speed and memory against other fitters, write docs/benchmarks.md: about an hour;'
	@echo '             ARGS=--help: its studies one by one, and a quick run'
	@echo 'make calibrate  measure convergence and coverage by simulation, write docs/calibration.md'
	@echo 'make picture draw the picture of README.md'
	@echo 'make tables  write the tables of README.md from the schema and the column definitions'
	@echo 'make lock    write requirements*.txt from pyproject.toml; ARGS=--upgrade: with the newest versions'
	@echo 'make clean   remove .venv and the caches of tools; results and data stay'
	@echo 'PYTHON=python3.12 names the Python to use. The first command installs all it needs into .venv.'

run: $(INSTALLED) $(PLUGIN)
	@$(VENV) -m snakemake --workflow-profile profiles/$(PROFILE) $(ARGS)
	$(if $(ARGS),,@$(VENV) -c "$(UP_TO_DATE)")

# A file is tested by one worker: what its tests share, whole runs and a cluster among it, is made once. Marks of
# pytest-xdist for groups do nothing with pytest 9.2. In the order of testpaths, not of the number of tests in a file:
# what takes minutes comes first, so that no worker ends with it while the others have nothing to do.
test: $(INSTALLED) $(TESTED)
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m snakefmt --check Snakefile workflow
	$(VENV) -m mypy
	$(VENV) docs/tables.py --check
	$(VENV) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: .venv/installed
	$(VENV) -m benchmarks.bench $(ARGS)

calibrate: $(INSTALLED)
	NPROC=2 $(VENV) -m benchmarks.calibrate $(ARGS)

picture: .venv/installed
	MPLBACKEND=agg NPROC=1 $(VENV) docs/picture.py

tables: .venv/installed
	$(VENV) docs/tables.py

# One version of each package for all supported Pythons, so that all of them give the same numbers.
lock:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" \
	&& "$$folder/bin/python" -m pip install --quiet --disable-pip-version-check uv \
	&& lock() { "$$folder/bin/uv" pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest \
	    --no-header --quiet --output-file "$$@" $(ARGS); } \
	&& lock requirements.txt --extra test --extra bench \
	&& lock requirements-slurm.txt --extra slurm --constraint requirements.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pipeline workflow tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last: an interrupted installation starts afresh.
.venv/installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo 'cauchyfit needs Python 3.11 or later; there is no $(PYTHON). Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cauchyfit needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo '$(PYTHON) lacks the modules venv and ensurepip, which make .venv. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing the pinned packages into .venv: once, a few minutes.'
	@$(PYTHON) -m venv --clear .venv
	@$(VENV) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

.venv/installed-slurm: .venv/installed requirements-slurm.txt
	@echo 'Installing the SLURM plugin of Snakemake.'
	@$(VENV) -m pip install --quiet --disable-pip-version-check --requirement requirements-slurm.txt
	@touch $@

.venv/installed-%: .venv/installed
	@echo 'Installing JAX for $*: once, about 5 GB.'
	@$(VENV) -m pip install --quiet --disable-pip-version-check --constraint requirements.txt 'jax[$*]'
	@touch $@
