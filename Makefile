# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up from python3, a C++ compiler and a
# package index; a second run reuses the set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-browser chromium lint format setup bench gpu tables maltese rules languages study faults long-run sanitize clean

demo: setup
	$(BIN)/lape-fast demo

# A process for each core: the models of the tests are too small to share.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# The atlas and the reports in a real browser; on Debian and Ubuntu this installs it.
test-browser: setup chromium
	$(BIN)/python -m pytest tests/browser

chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium fonts-dejavu-core; }

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Measured figures with machine, versions and commit, one JSON file per benchmark.
bench: setup
	$(BIN)/python -m benchmarks.count_overhead --json benchmarks/results/cpu/count_overhead.json
	$(BIN)/python -m benchmarks.train_step --json benchmarks/results/cpu/train_step.json
	$(BIN)/python -m benchmarks.loss --json benchmarks/results/cpu/loss.json
	$(BIN)/python -m benchmarks.saved_bytes --json benchmarks/results/cpu/saved_bytes.json
	$(BIN)/python -m benchmarks.flops $(if $(MASK),--mask $(MASK) --language mlt_Latn) --json benchmarks/results/cpu/flops.json
	$(BIN)/python -m benchmarks.adapter --json benchmarks/results/cpu/adapter.json
	$(BIN)/python -m benchmarks.select --json benchmarks/results/cpu/select.json
	$(BIN)/python -m benchmarks.identify --json benchmarks/results/cpu/identify.json
	$(BIN)/python -m benchmarks.atlas --json benchmarks/results/cpu/atlas.json
	$(BIN)/python -m pytest benchmarks/ops --benchmark-columns=median,iqr --benchmark-sort=name

# Everything on one GPU, in stages of a few minutes that go on where they ended; without the set-up, from a python3 that
# has torch, triton and transformers: make gpu STAGE=kernels MASK=llama-3.1-8b.top5.12languages.pth
GPU_PYTHON ?= python3
gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu --stage $(or $(STAGE),all) $(if $(MASK),--mask $(MASK))

# The tables of README.md, out of the files in benchmarks/results.
tables: setup
	$(BIN)/python -m benchmarks.tables

# The main job on real text: a folder of aligned text named by language code, with the conventional line ranges.
CORPUS ?= ../shared/corpus
maltese: setup
	$(BIN)/python -m benchmarks.maltese --corpus $(CORPUS) --json benchmarks/results/cpu/maltese.json

# The rules of selection, compared by what switching off their neurons costs; needs what `make maltese` made.
MALTESE ?= build/maltese
rules: setup
	$(BIN)/python -m benchmarks.rules --model $(MALTESE)/base --counts $(MALTESE)/identify/counts.safetensors \
	  --corpus $(CORPUS) --workspace build/rules --json benchmarks/results/cpu/rules.json

# Identification over every language of a corpus, stopped when stable and not.
languages: setup
	$(BIN)/python -m benchmarks.languages --model $(MALTESE)/base --corpus $(CORPUS) \
	  --workspace build/languages --json benchmarks/results/cpu/languages.json

# The methods on equal footing: a base of its own, seven methods, four languages. Goes on where it was stopped.
study: setup
	$(BIN)/lape-fast study recipes/small.yaml --corpus $(CORPUS) --output build/study-small \
	  --report benchmarks/results/study

# Faults in running commands, and hostile inputs; both exit with 1 if anything was lost or broke.
faults: setup
	$(BIN)/python -m benchmarks.faults --faults 200 --json benchmarks/results/faults.json
	$(BIN)/python -m benchmarks.fuzz --inputs 100000 --json benchmarks/results/fuzz.json
	$(BIN)/python -m benchmarks.fuzz_guided --runs 2000 --json benchmarks/results/fuzz_guided.json

# An hour of counting and tuning: whether memory, open files and processes stay as they are.
long-run: setup
	$(BIN)/python -m benchmarks.long_run --minutes 60 --json benchmarks/results/long_run.json

# The native code under AddressSanitizer, UBSan and ThreadSanitizer; exits with 1 if one reports anything.
sanitize: setup
	$(BIN)/python -m benchmarks.sanitize --json benchmarks/results/sanitize.json

setup: $(VENV)/.built

# torch first and by its exact version; the build then finds it instead of fetching another. With LOCKED=1, as in CI,
# what is installed is what stands in requirements.lock by hash (of Linux on x86-64 and Python 3.11), and nothing else.
$(VENV)/.installed: constraints.txt requirements.lock setup.py
	@echo "Setting up $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	LAPE_FAST_NO_EXTENSION=1 $(PIP) --no-index --no-build-isolation --editable '.[test]'
else
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) setuptools wheel pybind11 ninja
	LAPE_FAST_NO_EXTENSION=1 $(PIP) --no-build-isolation --editable '.[test]'
endif
	touch $@

# Only here is the native code built.
$(VENV)/.built: $(VENV)/.installed $(wildcard csrc/*)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info lape_fast/*.so
