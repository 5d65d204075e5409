PYTHON ?= python

.PHONY: install test test-all bench lint gpu info check clean

install:
	$(PYTHON) -m pip install -e ".[dev]" && $(PYTHON) -m stylegan_fast info

test:
	OMP_NUM_THREADS=1 pytest --benchmark-disable -n 2 --dist loadfile

test-all:
	OMP_NUM_THREADS=1 pytest --benchmark-disable -n 2 --dist loadfile -m ''

bench:
	$(PYTHON) -m stylegan_fast bench

lint:
	ruff check . && ruff format --check . && mypy

gpu:
	bash tools/gpu.sh

info:
	$(PYTHON) -m stylegan_fast info

check:
	$(PYTHON) -m stylegan_fast check

clean:
	rm -rf build dist *.egg-info stylegan_fast/_C.* stylegan_fast/_build.json bench-out gpu-out
