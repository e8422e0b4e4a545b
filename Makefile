# From Paper to Kernel. `make book` renders the site, `make test` runs the tests; both create .venv first.
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread is deterministic and, with two jobs on two cores, faster.
export OMP_NUM_THREADS = 1
# With bytecode caches off, every process would spend seconds compiling torch.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help book test test-all gpu serve lint lock clean
help:
	@echo "make book      create .venv, execute stale chapters, render the site"
	@echo "make test      create .venv, run the test suite"
	@echo "make test-all  the same, with every stored notebook and every budget made anew"
	@echo "make gpu       on a machine with a GPU: run the tests, then the benchmarks"
	@echo "make serve     serve the site on http://127.0.0.1:8000"
	@echo "make lint      ruff: check and format"
	@echo "make lock      resolve requirements.lock again"
	@echo "make clean     remove the built site"

# uv is fast and finds wheels in pip's own find-links folder; where it fails, pip installs the same pins.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -q --compile-bytecode -r requirements.lock \
	  || $(BIN)/python -m pip install -q -r requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -q --no-deps -e . || $(BIN)/python -m pip install -q --no-deps -e .
	touch $@

book: $(STAMP)
	$(BIN)/p2k build

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-all: $(STAMP)
	P2K_ALL=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# The records go where the page of benchmarks finds them. The tests do not skip what needs a GPU where there is one.
OUT ?= book/results/benchmarks/cuda
gpu: $(STAMP)
	$(BIN)/python -c "from p2k.core.device import choose_device; choose_device('cuda')"
	$(BIN)/python -m pytest
	$(BIN)/p2k bench --device cuda --out $(OUT)

serve: $(STAMP)
	$(BIN)/p2k serve

lint: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Without the CUDA packages that torch's registry build names: they are that build's own requirements.
lock: $(STAMP)
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --no-emit-find-links \
	  --no-emit-index-url --extra book --extra test --extra gpu -c constraints.txt pyproject.toml \
	  | grep -vE '^(nvidia-|cuda-)' > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf _build
