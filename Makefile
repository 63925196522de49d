# Two commands do everything on a fresh machine: make demo and make test.
# VENV=/path/to/environment uses (or makes) another environment; PYTHON=python3.12 makes it with another Python.

VENV ?= .venv
PYTHON ?= python3
RESULTS ?= results

BIN := $(VENV)/bin
MADE := $(VENV)/made-by-make
INSTALLED := $(VENV)/alignbench-installed
GIGABYTES := 9
DEMO := $(RESULTS)/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test lint soak report docs

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make the environment .venv and install everything; an existing VENV=... keeps what it has

demo: $(INSTALLED)  ## train five methods on the embedded model (10 minutes on 2 cores) and draw the report
	@echo "[demo 1/2] DiffusionNFT, Flow-GRPO, TempFlow-GRPO, SRPO and Diffusion-SDPO on PickScore, records in $(DEMO)"
	@$(BIN)/python -m alignbench -m experiment=demo reward=pickscore results=$(RESULTS) \
		method=diffusion_nft,flow_grpo,tempflow_grpo,srpo,sdpo
	@echo "[demo 2/2] the report"
	@$(BIN)/python -m alignbench.report $(DEMO) --output $(DEMO)/report
	@echo "[demo] done; open this page in a browser: $(abspath $(DEMO))/report/index.html"

report: $(INSTALLED)  ## draw the report of every run below results/
	@$(BIN)/python -m alignbench.report $(RESULTS) --output $(RESULTS)/report

docs: $(INSTALLED)  ## build the documentation site; a warning is an error
	@$(BIN)/python docs/build.py build/docs
	@echo "[docs] done; open this page in a browser: $(abspath build/docs)/site/index.html"

lint: $(INSTALLED)  ## style, types, and who may import whom
	@echo "[lint 1/4] ruff check"
	@$(BIN)/ruff check .
	@echo "[lint 2/4] ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "[lint 3/4] mypy"
	@$(BIN)/mypy
	@echo "[lint 4/4] lint-imports"
	@$(BIN)/lint-imports

test: lint  ## lint and every test but the long ones (15 minutes on 2 cores)
	@echo "[test] pytest, two at a time"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(INSTALLED)  ## the long tests
	@$(BIN)/python -m pytest -m soak

# An environment that is made here gets the versions of constraints.txt; one that was there before keeps its own. The
# mark comes first, so that what a failure leaves behind is made again instead of being taken for somebody's own.
# Everything pip writes meanwhile lies inside the environment, so one look at the free disk is enough.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	place="$(dir $(abspath $(VENV)))"; \
	if [ ! -x $(BIN)/python ] || { [ -e $(MADE) ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; }; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "[install] Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): try PYTHON=python3.12"; exit 1; }; \
		mkdir -p "$$place"; \
		free=$$(df -Pk "$$place" | awk 'NR == 2 {print int($$4 / 1048576)}'); \
		test "$$free" -ge $(GIGABYTES) || { \
			echo "[install] $(VENV) needs $(GIGABYTES) GB but $$free GB are free: free some or choose another place, VENV=/path"; exit 1; }; \
		echo "[install] $$free GB free; making $(VENV) with $$($(PYTHON) -V)"; \
		mkdir -p $(VENV); touch $(MADE); rm -f $(BIN)/python*; \
		$(PYTHON) -m venv $(VENV); \
	fi; \
	if [ -e $(MADE) ]; then versions="-c constraints.txt"; echo "[install] downloading 3 GB and installing 6 GB, a few minutes"; \
	else versions=; echo "[install] adding to $(VENV) what it lacks"; fi; \
	export TMPDIR="$(abspath $(VENV))/tmp"; mkdir -p "$$TMPDIR"; trap 'rm -rf "$$TMPDIR"' EXIT; \
	$(BIN)/python -m pip install --no-cache-dir $$versions -e '.[dev,report]'; \
	touch $@
