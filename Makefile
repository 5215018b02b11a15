# make demo   set up, then align the embedded pipeline and show the result (runs/demo)
# make test   set up, then run the default tests          make lint    ruff
# make bench  the optimizer step on this machine
# make methods  all methods: six trials and three seeds each, many hours; goes on where it was (METHODS=dpo,spo SEEDS=3)
# make label-noise  the study of flipped labels           make filtering-study  DPO on chosen pairs against all
# make clean  remove everything that can be made again
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
METHODS ?=
SEEDS ?= 3

.PHONY: setup demo test slow lint bench methods label-noise filtering-study clean

setup: $(VENV)/.ready

# torch and torchvision must come out of one resolution: a CPU-only torch beside a CUDA torchvision does not import.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/diffalign demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m benchmarks

methods: setup
	$(BIN)/python -m benchmarks methods --methods "$(METHODS)" --seeds $(SEEDS)

label-noise: setup
	$(BIN)/python -m benchmarks label-noise

filtering-study: setup
	$(BIN)/python -m benchmarks filtering

clean:
	rm -rf $(VENV) runs cache build *.egg-info
