# Every target in one place; 'make help' lists them.  scripts/test sets up what they need.
PYTHON ?= $(if $(wildcard build/venv/bin/python),build/venv/bin/python,python3)

.PHONY: help check lint format pictures simulate test-fast test soak bench deb lab demo clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

check: lint test-fast ## style, types, C warnings as errors, fast tests

lint: ## ruff (format and lint), mypy --strict, codespell, shellcheck, the C sources with warnings as errors
	$(PYTHON) -m ruff format --check -q .
	$(PYTHON) -m ruff check -q .
	$(PYTHON) -m mypy
	$(PYTHON) -m codespell_lib
	shellcheck -x scripts/lib.sh scripts/test scripts/demo scripts/lab scripts/persona scripts/build-debs .ci/run packaging/etc/persona.sh \
	    packaging/debian/*.postinst packaging/debian/*.prerm packaging/debian/*.postrm packaging/completions/*
	$(MAKE) -s -C guest/pam
	$(MAKE) -s -C guest/bpf

format: ## ruff, in place
	$(PYTHON) -m ruff format -q .
	$(PYTHON) -m ruff check -q --fix .

pictures: ## docs/*.svg from their sources; needs apt's graphviz
	dot -Tsvg docs/pieces.dot -o docs/pieces.svg

simulate: ## docs/simulation-*: a day of 1,000 VMs under three rules; needs apt's python3-matplotlib
	$(PYTHON) scripts/simulate.py

test-fast: ## tests that need no guest and take no seconds of their own, in a minute and a half
	$(PYTHON) -m pytest -q -n 4 -m "not guest and not long"

test: ## everything, guests included (root)
	scripts/test

soak: ## the long runs: races of 20,000 tries, storms of 200 sessions, hours of noise (root)
	scripts/test --soak

bench: ## side by side: each figure, its peer and the ratio; writes build/bench.json (root)
	PYTHONPATH=.:broker:guest $(PYTHON) -m tests.bench

deb: ## the three Debian packages, into build/debs
	scripts/build-debs

lab: ## a guest left running; prints how to ssh in (root)
	scripts/lab start

demo: ## real ssh sessions in a real guest, allowed and denied (root)
	scripts/demo

clean: ## what was built here; the guest image's cache stays
	rm -rf build
	$(MAKE) -s -C guest/pam clean
	$(MAKE) -s -C guest/bpf clean
