# make install | demo | test | lint | gpu
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
DALI ?= dali
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test lint gpu gpu-install gpu-tests gpu-kernel-tests gpu-step gpu-kernels gpu-masks gpu-data gpu-profile clean

install: $(VENV)/.installed

# torch first, then ours without build isolation: a build must see the torch that will run.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools wheel
	$(PY) -m pip install -q -c constraints.txt torch torchvision
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[$(DALI),demo,dev]"
	touch $@

test: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

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

# Everything that needs a GPU: the tests, then the measurements. Works offline where torch, timm and pydantic are
# installed already; each part is a target of its own. Results go to benchmarks/results and, where it is set, to $$OUT.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))

gpu: gpu-tests gpu-kernel-tests gpu-step gpu-kernels gpu-masks gpu-profile gpu-data

# Correctness before speed: a part that fails ends `make gpu`.
gpu-install:
	$(GPU_PY) -m pip install -q --no-build-isolation --no-deps -e .

gpu-tests: gpu-install
	$(GPU_PY) -m pytest -q tests/test_gpu.py
	$(GPU_PY) -m pytest -q -m gpu tests/test_extension.py

# The tests that run in the interpreter elsewhere; compiling is most of it, so in several processes where pytest can.
KERNEL_TESTS := mask_tokens pack reconstruction_loss softcap_attention layer_scale_residual_norm bias_activation ops

gpu-kernel-tests: gpu-install
	$(GPU_PY) -m pytest -q $$($(GPU_PY) -c "import xdist; print('-n 8')" 2>/dev/null) -k "not without_a_gpu" \
		$(KERNEL_TESTS:%=tests/test_%.py) tests/test_drop.py

# One measurement a target; its JSON is copied to $$OUT where that is set.
gpu-step gpu-kernels gpu-masks gpu-data gpu-profile: gpu-%: gpu-install
	@$(GPU_PY) -m benchmarks.$* $(if $(filter kernels step,$*),--resume --budget 480); status=$$?; \
	if [ -n "$$OUT" ]; then cp benchmarks/results/$*.json "$$OUT"/; fi; exit $$status

clean:
	rm -rf $(VENV) build *.egg-info fastalign/*.so .pytest_cache .ruff_cache
