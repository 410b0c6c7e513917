# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo quickstart test test-all test-cluster test-cluster-short lint bench clean help

help:
	@echo "make demo        a trained model answers, with the latent steps of every token"
	@echo "make quickstart  train, evaluate, generate and export a small model on real text, on a CPU, in minutes"
	@echo "make test        the tests, in minutes"
	@echo "make test-all    the tests with the slow ones, one of which opens a page in Chromium"
	@echo "make test-cluster  the tests on a virtual SLURM cluster and under mpirun; as root, with apt-get"
	@echo "make lint        ruff"
	@echo "make bench       the benchmarks"

# PyTorch first and alone: the constraints file pins a version of which there is a build without CUDA. megatron-core, with
# whose datasets tests compare ours, last and without the packages that only its models need.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev,mpi,eval]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps megatron-core -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ponder generate --checkpoint examples/diagnostic/model --max-new-tokens 1 \
		--prompt "follow b>c a>d c>b d>f e>a f>e = 1> a d 2> a f 3> a"

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/quickstart.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cluster"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not cluster" --hypothesis-profile thorough

test-cluster: $(STAMP)
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m cluster

test-cluster-short: $(STAMP)
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m "cluster and not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/soft_mask.py
	$(BIN)/python benchmarks/pipeline_schedule.py
	$(BIN)/python benchmarks/communication.py
	$(BIN)/python benchmarks/estimate.py
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/resilience.py
	$(BIN)/python benchmarks/peak_memory.py
	$(BIN)/python benchmarks/checkpoint_save.py
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/sample_index.py
	$(BIN)/python benchmarks/generation.py

clean:
	rm -rf $(VENV) build *.egg-info
