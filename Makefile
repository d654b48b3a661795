# SPDX-License-Identifier: LGPL-2.1-or-later
# `make demo` and `make test` do all their own set-up; see README.md.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint unit model lab bench proof ansible packages deb manuals bindings clean

demo: $(VENV)/ready
	@packaging/demo $(PY)

test: lint unit model lab

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check khod khoctl tests
	$(VENV)/bin/ruff check khod khoctl tests
	$(VENV)/bin/mypy

unit: $(VENV)/ready $(VENV)/unit-packages
	$(PY) -m pytest tests/unit -n 2 --dist loadfile

model: $(VENV)/ready
	$(PY) -m pytest tests/model -n 2

lab: $(VENV)/ready deb $(VENV)/lab-packages
	$(PY) -m pytest tests/lab -n 2 --dist loadfile

bench: $(VENV)/ready deb $(VENV)/lab-packages
	$(PY) -m compileall -q khod khoctl
	$(PY) -m tests.bench

# All that is repeated, and the scenarios that `make test` leaves out. It takes hours: start it in the background.
proof: $(VENV)/ready deb $(VENV)/lab-packages
	$(PY) -m tests.proof

# The Ansible collection in the checks of Debian's ansible-core, in a root of its own. As root.
ansible: $(VENV)/ready
	packaging/ensure-packages packaging/root-packages.txt
	packaging/ansible-test $(PY)

# The manual pages, from packaging/man/source, the help of khoctl and etc/kho/khod.toml.
manuals: $(VENV)/ready
	$(PY) -m tests.manuals

# The device tree schemas, from khod/trees/schemas.
bindings: $(VENV)/ready
	$(PY) -m tests.bindings

# Every package, built and checked in a root of its own. As root.
packages: $(VENV)/ready
	packaging/ensure-packages packaging/root-packages.txt
	packaging/check-packages $(PY)

deb: $(VENV)/deb-packages
	packaging/build-deb

$(VENV)/ready: pyproject.toml packaging/python-packages.txt
	packaging/ensure-packages packaging/python-packages.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev]'
	$(PY) -m compileall -q khod khoctl
	touch $@

$(VENV)/unit-packages: tests/unit/packages.txt
	packaging/ensure-packages $<
	mkdir -p $(VENV) && touch $@

$(VENV)/lab-packages: tests/lab/packages.txt
	packaging/ensure-packages $<
	mkdir -p $(VENV) && touch $@

$(VENV)/deb-packages: packaging/packages.txt
	packaging/ensure-packages $<
	mkdir -p $(VENV) && touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info
