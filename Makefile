# Everything a person does here, one target each. `make` prints them.

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
NOTEBOOKS := nbs scheduled

# The venv's own Python once there is one; else the newest suitable one. `make PYTHON=python3.12 …` names another.
PYTHON :=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FIND_PYTHON := for python in $(if $(PYTHON),,$(CURDIR)/$(BIN)/python) $(CANDIDATES); do \
	$$python -c '$(SUITABLE)' >/dev/null 2>&1 && break; python=; done; \
	[ -n "$$python" ] || { echo "No suitable Python: tried $(CANDIDATES); expected 3.11, 3.12 or 3.13 with its venv module" \
	"(Debian: python3-venv). Install one, or name one: make PYTHON=/path/to/python" >&2; exit 2; }

# settings.ini holds the version; nbdev would keep whatever __init__.py says.
SET_VERSION := import configparser, nbdev.config as nbdev; own = configparser.ConfigParser(); own.read('settings.ini'); \
	nbdev.set_version('xsmom_nb', own['DEFAULT']['version'])

.DEFAULT_GOAL := help
.PHONY: help run test coverage check bench proof honesty setup lab chapter docs export readme notebooks clean-notebooks lock hooks clean clean-all

help: ## This list
	@echo "xsmom_nb: notebooks in nbs/ are the source, xsmom_nb/ is exported from them."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

run: setup ## The main job: check the data, backtest, trade 48 hours on the paper exchange, decide them again, verify
	@xsmom baseline
	@printf '\nRehearsal: 48 hours on the paper exchange\n\n'
	@xsmom rehearsal

test: setup ## Everything CI runs: house checks, ruff, mypy, every notebook, pytest
	@bash .ci/run

coverage: setup ## The same, and a table of the lines that were reached; some minutes more
	@COVERAGE=1 bash .ci/run

check: setup ## The quick part of it, a minute: house checks, ruff, mypy
	@bash .ci/run ruff mypy house

bench: setup ## This engine against its peers, kept and shown in the README; QUICK=1: do all still agree, a minute
	@python -m benchmarks $(if $(QUICK),--quick)
	@$(if $(QUICK),,python -m xsmom_nb.ops.readme)

proof: setup ## The long proofs as audited runs, the better part of an hour: parity over 60 days, look-ahead, a quarter of replay, the simulator, bad weather
	@xsmom proof $(WHAT)

honesty: setup ## How often the optimizer deploys on noise and on planted edges: 900 markets, audited, half an hour or more; a killed one goes on
	@xsmom honesty

setup: ## Make .venv from requirements.lock; done once, and again when the lock changes
	@$(FIND_PYTHON); $$python .ci/setup.py $(VENV)

lab: setup ## JupyterLab on the notebooks; LAB="--no-browser --port 8890" is passed on to it
	@jupyter lab nbs --LabApp.app_settings_dir=configs/lab $(LAB)

chapter: setup ## A new chapter from the template: make chapter NOTEBOOK=nbs/strategy/01a_high_distance.ipynb
	@python -m xsmom_nb.ops.lab $(or $(NOTEBOOK),"")

docs: setup ## The site: chapters with plots, how-tos, references; into build/docs/html, a minute or two. SERVE=1: and show it
	@xsmom docs build
	@$(if $(SERVE),xsmom docs serve)

export: setup ## Notebooks to package (and to README.md); do it after every change of a notebook
	@nbdev-export
	@python -c "$(SET_VERSION)"
	@python -m xsmom_nb.ops.readme

readme: setup ## README.md alone, from nbs/index.ipynb
	@python -m xsmom_nb.ops.readme

notebooks: setup ## Execute the chapters that teach with pictures and keep their outputs, so that what a reader sees is today's
	@for folder in guide exchange strategy risk backtest research; do nbdev-test nbs/$$folder --save --n-workers 2 || exit; done
	@$(MAKE) --no-print-directory clean-notebooks

clean-notebooks: setup ## Strip the notebooks of what is not source or output: execution counts, metadata
	@for folder in $(wildcard $(NOTEBOOKS)); do nbdev-clean --fname $$folder || exit; done

lock: ## Resolve settings.ini into requirements.lock; pins stay unless UPGRADE=--upgrade or "UPGRADE=-P numpy"
	@[ -x $(BIN)/uv ] || { $(FIND_PYTHON); [ -x $(BIN)/python ] || $$python -m venv $(VENV); $(BIN)/python -m pip install -q 'uv>=0.9'; }
	@uv pip compile setup.py --all-extras --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet -o requirements.lock $(UPGRADE)
	@echo "requirements.lock: $$(grep -c '^[a-z]' requirements.lock) packages; \`make setup\` installs them"

hooks: setup ## Install the git hooks of .pre-commit-config.yaml, and what shows and merges notebooks cell by cell
	@pre-commit install
	@git config merge.jupyternotebook.name "merge notebooks cell by cell"
	@git config merge.jupyternotebook.driver "$(BIN)/nbdev-merge %O %A %B %P"
	@git config diff.jupyternotebook.command "$(BIN)/git-nbdiffdriver diff --ignore-outputs --ignore-metadata --ignore-details"
	@git config difftool.nbdime.cmd '$(BIN)/git-nbdifftool diff "$$LOCAL" "$$REMOTE" "$$MERGED"'

clean: ## Remove caches and build leftovers; runs, state and .venv stay
	@rm -rf build dist .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache *.egg-info
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .hypothesis -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

clean-all: clean ## The same and .venv; the kept runs and the state stay, they are evidence
	@rm -rf $(VENV)
