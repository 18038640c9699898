# Everything sets itself up on first use, in .venv, and is quick the second time.
#   make demo    draw the same pictures in 16-bit and in 4-bit, side by side: demo.html; as many as fit into 5 minutes
#   make demo-full   all of them, with LoRA adapters, however long it takes
#   make test    format, lint, types, the documents, the wheel, tests
#   make docs    the documents and the API reference as one site: build/site/docs/index.html; a dead link fails
#   make wheel   build the wheel, and use it from an empty environment
#   make compat  every supported torch and Triton: docs/compat.md (12 GB, hours)
#   make zoo     every denoiser of diffusers, whole and by its blocks: bench/results/zoo.json, docs/models.md (an hour)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo demo-full test lint types docs wheel compat zoo clean

demo: $(READY)
	$(BIN)/python examples/demo.py

demo-full: $(READY)
	$(BIN)/python examples/demo.py --full

test: lint types docs wheel
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(BIN)/python tests/compat.py --quick

compat: $(READY)
	$(BIN)/python tests/compat.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The four folders are one package once installed; links show them to the type checker as such.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types/svdq_compile
	@ln -s $(CURDIR)/svdq_compile/*.py $(CURDIR)/passes $(CURDIR)/lowering $(CURDIR)/kernels build/types/svdq_compile/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p svdq_compile

docs: .venv/ready-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/site
	@echo "build/site/docs/index.html"

.venv/ready-docs: $(READY) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch .venv/ready-docs

wheel: $(READY)
	$(BIN)/python tools/try_wheel.py

zoo: $(READY)
	$(BIN)/python -m tests.zoo.sweep; status=$$?; $(BIN)/python -m tests.zoo.table && exit $$status

$(READY): requirements-dev.txt pyproject.toml
	@echo "setting up .venv (about two minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.html
