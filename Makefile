# make quickstart   both scripts on ToySAT, the drawn stand-in for EuroSAT: about 4 minutes on 2 CPU cores
# make test         the tests: about 8 minutes on 2 CPU cores
#
# Both first make a virtual environment in .venv from requirements.txt, once. PYTHON chooses the interpreter (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv

quickstart: $(VENV)/installed
	$(VENV)/bin/python expert_trajectories.py $(QUICKSTART)
	$(VENV)/bin/python distillation.py $(QUICKSTART)

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -ra

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --requirement requirements.txt
	touch $@

.PHONY: quickstart test
