# What a developer does here, by name; `make help` lists it.
#
# The first target that needs Python makes .venv with every extra. Where pip does not find a CPU build of torch by
# itself, the default is the CUDA build; for the CPU build, some gigabytes smaller:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# What the contract must stay compatible with. Where that is the commit at hand, the one before it.
PROTO_BASE ?= main

# Tests wait half of the time, for leases and processes: on two cores, two at once take half as long as one.
TEST_PROCESSES ?= 2

STYLES := outline stripes shadow
BENCHES := overhead throughput memory stepbatch stepcache merging
# Apart: loading wants 8 GiB of disk, cache takes hours of one core, residency half an hour, cold ten minutes.
STORE_BENCHES := loading cache residency cold

BIN := .venv/bin
PYTHON := $(BIN)/python
VENV := .venv/.installed
BUF := node_modules/.bin/buf
NODE_MODULES := node_modules/.package-lock.json
PROTOS := $(wildcard protos/darkroom/v1/*.proto)
GENERATE := $(PYTHON) -m grpc_tools.protoc -Iprotos

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-long check proto bench bench-store calibrate gpu compose-test judge clean \
    train-text train-vae train-shapes train-turbo train-dit train-loras train-controlnet train-judge train-scorer \
    check-format check-lint check-types check-imports check-protos check-generated check-compose

help:  ## Lists the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: $(VENV)  ## Makes .venv, with Darkroom and all it needs.

demo: $(VENV)  ## Starts a cluster, draws pictures, says what happened.
	$(PYTHON) -m examples.demo

up: $(VENV)  ## Runs a whole cluster on this machine until Ctrl-C.
	$(BIN)/darkroom up

# One thread per process: on a shared machine, torch's spinning threads cost more than they bring.
test test-long gpu: export OMP_NUM_THREADS ?= 1

test: $(VENV)  ## Runs the tests that need no GPU and no Docker.
	$(PYTHON) -m pytest -m "not compose and not long" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-long: $(VENV)  ## Runs the tests that take minutes each.
	$(PYTHON) -m pytest -m long

check: check-format check-lint check-types check-imports check-protos check-generated check-compose  ## Runs every check but the tests.

proto: $(VENV)  ## Writes darkroom/v1 anew from protos.
	$(GENERATE) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: $(VENV)  ## Runs the benchmarks.
	set -e; for name in $(BENCHES); do echo "== bench.$$name"; $(PYTHON) -m bench.$$name; done

bench-store: $(VENV)  ## Runs the benchmarks of the model store and of what stays where (hours).
	set -e; for name in $(STORE_BENCHES); do echo "== bench.$$name"; $(PYTHON) -m bench.$$name; done

calibrate: $(VENV)  ## Compares the simulator with a live cluster; fails where they differ by more than 15 %.
	$(PYTHON) -m bench.calibration

gpu: $(VENV)  ## Runs the GPU tests, then the benchmarks.
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m bench.loading
	$(MAKE) bench

compose-test: $(VENV)  ## Builds the containers and tests the cluster they form; needs Docker.
	tests/compose/run.sh

# Each training keeps its state in out/training: stopped at any time, the same target goes on where it was.
train-text: $(VENV)  ## Trains the text encoders of the models that ship.
	$(PYTHON) -m training.text --kind clip
	$(PYTHON) -m training.text --kind t5

train-vae: $(VENV)  ## Trains the VAE of the models that ship, then its decoder (hours).
	$(PYTHON) -m training.vae
	$(PYTHON) -m training.vae --decoder

train-shapes: $(VENV)  ## Trains models/shapes, after train-vae and train-text (hours).
	$(PYTHON) -m training.shapes

train-turbo: $(VENV)  ## Distils models/shapes-turbo from models/shapes.
	$(PYTHON) -m training.distil

train-dit: $(VENV)  ## Trains models/shapes-dit, over the VAE of models/shapes (hours).
	$(PYTHON) -m training.dit

train-loras: $(VENV)  ## Trains the LoRAs of models/shapes and models/shapes-dit.
	set -e; for style in $(STYLES); do $(PYTHON) -m training.lora --style $$style --out models/shapes-$$style; done
	$(PYTHON) -m training.lora --model models/shapes-dit --style outline --limit-s 700 --out models/shapes-dit-outline

train-controlnet: $(VENV)  ## Trains the ControlNet of models/shapes.
	$(PYTHON) -m training.controlnet

train-judge: $(VENV)  ## Trains the network whose features tell how far pictures are from drawn ones.
	$(PYTHON) -m training.features

train-scorer: $(VENV)  ## Trains the scorer of a cascade from models/shapes-turbo to models/shapes.
	$(PYTHON) -m training.scorer

judge: $(VENV)  ## Draws 600 scenes with models/shapes and reads them back.
	$(PYTHON) -m training.evaluate

clean:  ## Removes all that git ignores and these targets made, .venv and node_modules too.
	rm -rf .venv node_modules examples/node/node_modules build out *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-format: $(VENV)
	$(BIN)/ruff format --check --quiet .

check-lint: $(VENV)
	$(BIN)/ruff check .

check-types: $(VENV)
	$(BIN)/mypy

check-imports: $(VENV)
	$(BIN)/lint-imports --no-logo

check-protos: $(NODE_MODULES)
	$(BUF) lint
	$(BUF) format --diff --exit-code
	@set -eu; \
	if ! git rev-parse --quiet --verify '$(PROTO_BASE)^{commit}' >/dev/null 2>&1; then \
	    echo "buf breaking: skipped, git knows no $(PROTO_BASE)"; exit 0; \
	fi; \
	base=$$(git rev-parse '$(PROTO_BASE)'); \
	if [ "$$base" = "$$(git rev-parse HEAD)" ] && [ -z "$$(git status --porcelain protos)" ]; then \
	    base=$$(git rev-parse --quiet --verify "$$base^") || { echo "buf breaking: skipped, no commit before this"; exit 0; }; \
	fi; \
	if ! git cat-file -e "$$base:protos" 2>/dev/null; then \
	    echo "buf breaking: skipped, no protos in $$base"; exit 0; \
	fi; \
	old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; \
	git archive "$$base" protos | tar -x -C "$$old"; cp buf.yaml "$$old"; \
	$(BUF) breaking --against "$$old"; echo "buf breaking: compatible with $$base"

check-generated: $(VENV)
	@set -eu; \
	new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(GENERATE) --python_out="$$new" --pyi_out="$$new" --grpc_python_out="$$new" $(PROTOS); \
	diff -r -x __init__.py -x __pycache__ "$$new/darkroom/v1" darkroom/v1 && echo "darkroom/v1 is what protos generate" \
	    || { echo "darkroom/v1 is not what protos generate: run make proto" >&2; exit 1; }

check-compose: $(VENV)
	$(PYTHON) -m pytest -q tests/compose/test_compose_file.py

# A second make spends nothing here unless what is installed changed.
$(VENV): pyproject.toml constraints.txt
	@set -eu; \
	if [ ! -x $(PYTHON) ]; then \
	    found=; \
	    for name in python3.11 python3; do \
	        if $$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then found=$$name; break; fi; \
	    done; \
	    [ "$$found" ] || { echo "Python 3.11 is needed, as python3.11 or python3 on PATH" >&2; exit 1; }; \
	    $$found -m venv .venv; \
	fi
	@echo "Installing Darkroom into .venv; a few minutes the first time."
	@$(BIN)/pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    -c constraints.txt -e '.[stage,local,simulate,dev]'
	@touch $@

$(NODE_MODULES): package.json package-lock.json
	@command -v npm >/dev/null || { echo "npm is needed, for buf (apt-get install npm)" >&2; exit 1; }
	npm ci --no-audit --no-fund --loglevel=error
	@touch $@
