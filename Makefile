# make quickstart   both scripts on ToySAT, the drawn stand-in for EuroSAT: 2 minutes on 2 cores
# make test         style and tests, on all cores up to four: 6 to 8 minutes on 2
# make soak         what takes too long for every change: real kills, full-size engines and whitening
# make bench        time and memory of the engine; PEER=DIR: beside MTT's own loop, from a checkout
# make gpu-check    for a machine with CUDA: results, resumption and speed on its GPU
#
# All first make a virtual environment in .venv from requirements.txt, once. PYTHON chooses the
# interpreter (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv
SEED ?= 0
TOYSAT := --dataset=ToySAT --im_size=32 --model=ConvNetW32 --no-compile --seed=$(SEED) \
	--data_path=quickstart --buffer_path=quickstart/buffers
WORKERS := --numprocesses=auto --maxprocesses=4 --dist=worksteal

quickstart: $(VENV)/installed
	$(VENV)/bin/python expert_trajectories.py $(TOYSAT) \
		--num_experts=2 --train_epochs=3 --batch_train=16
	$(VENV)/bin/python distillation.py $(TOYSAT) --ipc=1 --syn_steps=10 --expert_epochs=1 \
		--max_start_epoch=2 --lr_img=3000 --lr_lr=1e-6 --lr_teacher=0.02 --Iteration=150 \
		--eval_it=150 --num_eval=5 --epoch_eval_train=100 --log_dir=quickstart/logged_files

test: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -ra $(WORKERS)

soak: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -ra $(WORKERS) tests/soak

bench: $(VENV)/installed
	$(VENV)/bin/python tests/benchmarks/bench.py $(if $(PEER),--peer $(PEER))

gpu-check: $(VENV)/installed
	$(VENV)/bin/python tests/gpu_check.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --requirement requirements.txt
	touch $@

.PHONY: quickstart test soak bench gpu-check
