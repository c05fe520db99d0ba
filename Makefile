# make install | demo | test | lint | gpu
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
DALI ?= dali
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test test-style test-rest test-reliability lint gpu gpu-needs gpu-install gpu-tests gpu-kernel-tests gpu-targets clean

install: $(VENV)/.installed

# torch first, then ours without build isolation: a build must see the torch that will run.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools wheel
	$(PY) -m pip install -q -c constraints.txt torch torchvision
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[$(DALI),demo,dev]"
	touch $@

# What breaks runs on purpose waits for timeouts of seconds, so nothing else runs beside it; of the rest two files at once.
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

# With a GPU, one process (the model is tiny); without, two that share the CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
RANKS := $(if $(filter 0,$(GPUS)),2,1)

demo: install
	$(PY) -m demo.mosaics --out demo/data
	OMP_NUM_THREADS=$(if $(filter 0,$(GPUS)),1,4) $(VENV)/bin/torchrun --standalone --nproc-per-node=$(RANKS) \
		-m fastalign.train configs/demo.yaml
	$(PY) -m demo.summary runs/demo
	$(PY) -m demo.evidence runs/demo
	$(PY) -m fastalign.report runs/demo

# Everything that needs a GPU: the tests, then the measurements, then what they say of the targets. Works offline where
# what benchmarks.needs lists is installed already; each part is a target of its own. A measurement goes on where it ended
# when run again (fp8 and checkpoint begin anew); step, kernels, attention, data and scaling begin nothing that would end
# after BUDGET seconds by what the longest before took, the others and the tests have no budget. Results go to
# benchmarks/results and, where it is set, to $$OUT, attention's with the table that it writes: it comes first because that
# table decides what the others run.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
MEASUREMENTS := attention step kernels masks fp8 profile checkpoint data scaling
BUDGET ?= 450
TABLE := fastalign/attention/table.json

# Correctness before speed: a test that fails ends `make gpu`. A measurement that fails does not: the others are worth
# having; the exit code tells of it.
gpu: gpu-tests gpu-kernel-tests
	@failed=; for part in $(MEASUREMENTS) targets; do $(MAKE) gpu-$$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

# Built once, not for each part.
gpu-install: build/.gpu-installed

gpu-needs:
	@$(GPU_PY) -m benchmarks.needs

build/.gpu-installed: pyproject.toml setup.py $(wildcard csrc/*) | gpu-needs
	$(GPU_PY) -m pip install -q --no-build-isolation --no-deps -e .
	@mkdir -p build && touch $@

gpu-tests: gpu-install
	$(GPU_PY) -m pytest -q tests/test_gpu.py tests/test_attention.py
	$(GPU_PY) -m pytest -q -m gpu tests/test_extension.py tests/reliability/test_checkpoints.py

# The tests that run in the interpreter elsewhere; compiling is most of it, so in several processes where pytest can.
gpu-kernel-tests: gpu-install
	$(GPU_PY) -m pytest -q $$($(GPU_PY) -c "import xdist; print('-n 8')" 2>/dev/null) -k "not without_a_gpu" \
		tests/kernels tests/test_ops.py tests/test_drop.py

# One measurement a target; what it wrote is copied to $$OUT where that is set, also when it failed.
.PHONY: $(MEASUREMENTS:%=gpu-%)
$(MEASUREMENTS:%=gpu-%): gpu-%: gpu-install
	@$(GPU_PY) -m benchmarks.$* $(if $(filter fp8 checkpoint,$*),,--resume) \
		$(if $(filter masks fp8 profile checkpoint,$*),,--budget $(BUDGET)); status=$$?; \
	if [ -n "$$OUT" ]; then cp benchmarks/results/$*.* $(if $(filter attention,$*),$(TABLE)) "$$OUT"/; fi; exit $$status

gpu-targets:
	@$(GPU_PY) -m benchmarks.targets; status=$$?; \
	if [ -n "$$OUT" ]; then cp benchmarks/results/SUMMARY.md "$$OUT"/; fi; exit $$status

clean:
	rm -rf $(VENV) build *.egg-info fastalign/*.so .pytest_cache .ruff_cache
