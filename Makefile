# One runner with plain names. `make serve` and `make test` do all the set-up they need.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
TRITON_VENV := .venv-triton
K8S_VENV := .venv-k8s
# `make serve PYTHON=/path/to/python3.12` names another interpreter.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
NOT_INSTALLED := echo "metaserve could not install its packages (see above); check that this \
machine reaches a package index, then run make again" >&2; exit 2

.PHONY: help serve test lint types format docs k8s-rules export-tools bench bench-gpu bench-graph bench-decoding locks image test-image dashboard clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.serve ## set up the small runtime and serve on http://localhost:8000
	@echo "When it says ready, type in another terminal:"
	@echo "  curl --data-binary @examples/images/scan_three.png http://localhost:$${METASERVE_PORT:-8000}/classify"
	@$(BIN)/metaserve serve

test: $(VENV)/.test $(TRITON_VENV)/.ready $(K8S_VENV)/.ready ## set up everything and run all tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.test ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy, strict
	@$(BIN)/mypy

format: $(VENV)/.test ## let ruff put the code in shape
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/.serve ## write docs/settings.md, and the metrics in docs/operations.md, again from the code
	@$(BIN)/python -m app.settings_page > docs/settings.md.new && mv docs/settings.md.new docs/settings.md
	@$(BIN)/python -m app.metrics_page docs/operations.md

RULE := k8s/components/prometheus-operator/prometheus-rule.yaml
k8s-rules: ## write the PrometheusRule of k8s/ again from deploy/prometheus/alerts.yml
	@{ sed '/^spec:$$/q' $(RULE); sed 's/^./  &/' deploy/prometheus/alerts.yml; } > $(RULE).new
	@mv $(RULE).new $(RULE)

bench: $(VENV)/.test ## the service against the machine and a hand-written one (20 minutes; ONLY=tiny,photo)
	@$(BIN)/python -m benchmarks.serving --only "$(ONLY)"

bench-gpu: $(VENV)/.export ## check and time every backend on a GPU; see docs/benchmarks.md
	@$(BIN)/python -m benchmarks.gpu

bench-graph: $(VENV)/.test ## the exported graph against timm's own export (ten minutes, an idle machine)
	@$(BIN)/python -m benchmarks.graph

bench-decoding: $(VENV)/.test ## what reading an image costs and how exact it is (five minutes, an idle machine)
	@$(BIN)/python -m benchmarks.decoding

dashboard: $(VENV)/.test ## draw docs/plots/dashboard.png from a Prometheus (URL=http://localhost:9090 MINUTES=5)
	@$(BIN)/python -m benchmarks.dashboard $(if $(URL),--url $(URL)) $(if $(MINUTES),--minutes $(MINUTES))

locks: ## write deploy/requirements again: what the images install, with hashes
	@deploy/locks.sh

# `make image ENGINE=podman`, or any other command that builds as docker does.
ENGINE ?= docker
image: ## build the cpu image
	@$(ENGINE) build --build-arg REVISION="$$(git rev-parse HEAD)" --tag metaserve:0.1.0 .

test-image: $(VENV)/.test ## run the built image for real and hold it to its promises
	@METASERVE_IMAGE_ENGINE="$(ENGINE)" $(BIN)/python -m pytest -s tests/image

clean: ## remove the virtual environment and caches
	@rm -rf $(VENV) $(TRITON_VENV) $(K8S_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

export-tools: $(VENV)/.export ## add torch and the exporter to the runtime

# The runtime alone: no torch, nothing that only an export or a test needs.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for serving (about 30 seconds, once) ..."
	@$(PIP) --editable '.[cpu]' || { $(NOT_INSTALLED); }
	@touch $@

$(VENV)/.export: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for exports: torch, onnx (a minute or more, once) ..."
	@$(PIP) --editable '.[cpu,export]' || { $(NOT_INSTALLED); }
	@touch $(VENV)/.serve $@

# timm and torchvision are the reference the tests compare with. They come without their own
# dependencies: those would replace the CPU build of torch. tensorrt-rtx builds engines without a
# GPU and stands in for tensorrt; it is NVIDIA's, under NVIDIA's licence, and only tests use it.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for tests: torch, onnx, timm (a few minutes, once) ..."
	@$(PIP) --editable '.[cpu,fast,export,triton,dev]' || { $(NOT_INSTALLED); }
	@$(PIP) --no-deps timm torchvision || { $(NOT_INSTALLED); }
	@$(PIP) tensorrt-rtx || { $(NOT_INSTALLED); }
	@touch $(VENV)/.serve $(VENV)/.export $@

# A real Triton server for the tests, with the Python backend. It needs numpy 1, hence a place of its
# own; on a machine that cannot have it those tests are skipped and say so.
$(TRITON_VENV)/.ready: constraints-triton.txt | $(BIN)/python
	@echo "Setting up $(TRITON_VENV): a Triton server for tests (a minute, once) ..."
	@rm -rf $(TRITON_VENV)
	@if $(BIN)/python -m venv $(TRITON_VENV) && $(TRITON_VENV)/bin/python -m pip install --quiet \
	--quiet --disable-pip-version-check --constraint $< nvidia-pytriton onnxruntime; \
	then touch $@; else rm -rf $(TRITON_VENV); \
	echo "no Triton server can be installed here (see above); its tests are skipped" >&2; fi

# Validators of the Kubernetes manifests. checkov wants versions of its own of what others use too,
# hence a place of its own; where it cannot be had those tests are skipped and say so.
$(K8S_VENV)/.ready: constraints-k8s.txt | $(BIN)/python
	@echo "Setting up $(K8S_VENV): validators of Kubernetes manifests (a minute, once) ..."
	@rm -rf $(K8S_VENV)
	@if $(BIN)/python -m venv $(K8S_VENV) && $(K8S_VENV)/bin/python -m pip install --quiet --quiet \
	--disable-pip-version-check --constraint $< kubernetes-validate checkov; \
	then touch $@; else rm -rf $(K8S_VENV); \
	echo "no validators of manifests can be installed here (see above); their tests are skipped" >&2; fi

$(BIN)/python:
	@"$(or $(PYTHON),none)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "metaserve needs Python 3.11 or newer and finds none; install it, or name one:" \
	"make serve PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	echo "metaserve cannot make a virtual environment; install the venv module of $(PYTHON)" \
	"(on Debian: apt install python3-venv)" >&2; exit 2; }
