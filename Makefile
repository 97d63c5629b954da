# TORCH   the torch requirement of both virtual environments (the tests' and the hosts')
# PYTHON  the interpreter they are made with
# ARGS    passed on to pytest or to the script
# WORKERS number of test processes, each with its own servers: 2, or 8 with test-gpu
TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=

# Threads that wait must not spin: two processes on two cores would take ten times as long.
OMP_WAIT_POLICY ?= PASSIVE
GOMP_SPINCOUNT ?= 0

export TORCH
export OMP_WAIT_POLICY GOMP_SPINCOUNT
# pytest keeps the tests with their rewritten assertions in __pycache__; without them each process takes 6 s more.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP := .venv/bin/python -m pip install --quiet --progress-bar off

# A ready venv is marked by a file that names its torch and interpreter, so that another choice installs again.
READY := .venv/.ready-$(shell printf '%s' '$(TORCH) $(PYTHON)' | cksum | cut -d' ' -f1)
LINT := .venv/.lint

# Idle processes take tests of the others, from the end: the tests of a module and of a host stay together.
PYTEST := .venv/bin/pytest -n $(or $(WORKERS),2) --dist worksteal

.PHONY: test test-quick test-windows test-compile test-host test-browser test-soak test-gpu faults fuzz planted hosts chromium demo bench lint
.PHONY: architectures texts golden clean

# torch and setuptools go in first: the package names no torch, and builds with the setuptools that is there.
# Of what a recipe line does after it, pip first of all, a line appears every few seconds.
TICK = (while sleep 4; do echo "$(1) …"; done) & tick=$$!; trap 'kill $$tick' EXIT; echo "$(1) …";

$(READY): pyproject.toml requirements.txt
	@$(call TICK,creating .venv with $(TORCH)) $(PYTHON) -m venv .venv && $(PIP) "setuptools>=77" "$(TORCH)"
	@$(call TICK,installing the requirements of the tests) $(PIP) --no-build-isolation -e ".[test]"
	rm -f .venv/.ready-*
	touch $@

.venv: $(READY)

hosts: $(READY)
	.venv/bin/python hosts/install.py

chromium:
	@if command -v chromium >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else echo "chromium is not installed: browser tests use another Chrome if there is one, else they are skipped"; fi

test: $(READY) hosts chromium
	$(PYTEST) $(ARGS)

test-quick: $(READY)
	$(PYTEST) -m "not host and not browser and not compile and not soak" $(ARGS)

# The same, with what Windows lacks taken away (tests/windows.py); on Linux.
test-windows: $(READY)
	$(PYTEST) --windows -m "not host and not browser and not compile and not soak" $(ARGS)

# All shipped kernel configurations, for every supported card, without a GPU. Results are kept in the cache folder.
test-compile: $(READY)
	$(PYTEST) -m compile $(ARGS)

test-host: $(READY) hosts
	$(PYTEST) -m "host and not browser" $(ARGS)

test-browser: $(READY) hosts chromium
	$(PYTEST) -m browser $(ARGS)

test-soak: $(READY) hosts
	$(PYTEST) -m soak $(ARGS)

# For a machine without a network see CONTRIBUTING.md.
test-gpu: $(READY) hosts
	LEARNED_ROUNDING_HOST_DEVICE=cuda OMP_NUM_THREADS=2 .venv/bin/pytest -v -m "gpu or host" -n $(or $(WORKERS),8) --dist worksteal $(ARGS)

faults: $(READY) hosts
	.venv/bin/pytest tests/faults tests/fuzz tests/load tests/nodes/test_resume.py tests/nodes/host/test_quantizing.py tests/nodes/host/test_saving.py tests/nodes/host/test_verifying.py --thorough --faults-table $(ARGS)

# Guided by coverage; SECONDS for each kind of file, and for texts.
SECONDS ?= 300
fuzz: $(READY)
	$(PIP) --no-build-isolation -e ".[fuzz]"
	for what in texts .safetensors .safetensors.index.json .gguf .pt; do \
		.venv/bin/python tests/fuzz/guided.py $$what -max_total_time=$(SECONDS) || exit 1; done

# Bugs that the tests must find; writes the table of docs/testing.md.
planted: $(READY) hosts chromium
	.venv/bin/python tests/planted_bugs.py $(ARGS)

demo: $(READY) hosts
	.venv/bin/python benchmarks/demo.py $(ARGS)

bench: $(READY)
	@test -n "$(BENCH)" || { echo "usage: make bench BENCH=<name> ARGS=\"--quick --json FILE\"; scripts:"; ls benchmarks/*.py; exit 2; }
	.venv/bin/python benchmarks/$(BENCH).py $(ARGS)

$(LINT): $(READY) pyproject.toml
	$(PIP) -e ".[lint]" --no-build-isolation
	touch $@

lint: $(LINT)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

architectures: $(READY) hosts
	.venv/bin/python tests/architectures/lists.py && .venv/bin/python tests/architectures/table.py && .venv/bin/python tests/architectures/sizes.py

texts: $(READY) hosts
	.venv/bin/python tests/web/english.py && .venv/bin/python tests/option_tables.py && .venv/bin/python tests/help_pages.py

# OLD: the commit whose output files the working tree must reproduce byte for byte.
golden: $(READY)
	@test -n "$(OLD)" || { echo "usage: make golden OLD=<commit> ARGS=\"--only 'calibrated*'\""; exit 2; }
	.venv/bin/python tests/golden/compare.py $(OLD) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
