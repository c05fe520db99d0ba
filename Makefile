# make install | demo | evidence | test | lint | docs | gpu
# STACK=newest: the newest tested packages instead of the pinned ones, in a virtual environment of its own.
SUFFIX := $(if $(filter newest,$(STACK)),-newest)
CONSTRAINTS := constraints$(SUFFIX).txt
override FASTALIGN_VENV := $(or $(FASTALIGN_VENV),.venv$(SUFFIX))
ifneq ($(words $(FASTALIGN_VENV)),1)
$(error FASTALIGN_VENV=$(FASTALIGN_VENV) has a space in it, which make does not support: name another directory)
endif
PYTHON ?= python3
PY := $(FASTALIGN_VENV)/bin/python
DALI ?= dali
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo evidence docs test test-style test-rest test-reliability lint gpu clean own-venv

install: $(FASTALIGN_VENV)/.installed

# Only a virtual environment may be cleared or removed. Unquoted, so that the shell expands `~` here as it does below.
own-venv:
	@test -e $(FASTALIGN_VENV)/pyvenv.cfg || test -z "$$(ls -A $(FASTALIGN_VENV) 2>/dev/null)" || \
		{ echo "FASTALIGN_VENV=$(FASTALIGN_VENV) is neither empty nor a virtual environment: name another directory" >&2; exit 2; }

# torch first, without build isolation: the extension must be built against the torch that will run.
PIP := $(PY) -m pip install -q -c $(CONSTRAINTS)
FAILED := { echo "make install: pip failed, see above. It needs 10 GB of disk, 3 GB of it in TMPDIR (default /tmp), and the network or the index that PIP_INDEX_URL names; if csrc/ did not compile, FASTALIGN_BUILD_EXT=0 make install leaves the extension out" >&2; exit 1; }
$(FASTALIGN_VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*) | own-venv
	@command -v c++ >/dev/null || echo "make install: no C++ compiler (c++): the extension is left out, masks are drawn in PyTorch"
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(FASTALIGN_VENV)
	@echo "installing packages into $(FASTALIGN_VENV), a few minutes"
	@$(PIP) setuptools wheel || $(FAILED)
	@$(PIP) torch torchvision || $(FAILED)
	@$(PIP) --no-build-isolation -e ".[$(DALI),demo,dev]" || $(FAILED)
	@$(PY) -c "from fastalign.ops import extension; print('installed; extension for masks:', extension.status())"
	touch $@

# tests/reliability depends on timeouts of seconds, so it runs alone; the rest runs two files at once.
test: test-style test-rest test-reliability

test-style: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test-rest: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --ignore=tests/reliability

test-reliability: install
	$(PY) -m pytest tests/reliability

lint: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The documentation as a site in site/; a broken link or a missing name is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q
	@echo "documentation: site/index.html"

# With a GPU, one process (the model is tiny); without, two that share the CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
RANKS := $(if $(filter 0,$(GPUS)),2,1)

demo: install
	$(PY) -m demo.mosaics --out demo/data
	OMP_NUM_THREADS=$(if $(filter 0,$(GPUS)),1,4) $(FASTALIGN_VENV)/bin/torchrun --standalone --nproc-per-node=$(RANKS) \
		-m fastalign.train configs/demo.yaml
	$(PY) -m demo.evidence runs/demo
	$(PY) -m fastalign.report runs/demo

# The demo's controls, over three seeds.
evidence: demo
	$(PY) -m demo.evidence runs/demo --controls
	$(PY) -m fastalign.report runs/demo

# GPU tests and measurements, see benchmarks/README.md. Works offline and without `make install`.
gpu:
	bash benchmarks/gpu.sh --all

clean: own-venv
	rm -rf $(FASTALIGN_VENV) build *.egg-info fastalign/*.so .pytest_cache .ruff_cache
