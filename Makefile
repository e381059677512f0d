# The verbs of the project. Each does its own set-up, and is quiet about it when all is there.
#
#   make help    lists them

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz check protos bench wheel clean

# The distribution's interpreter before any other: it is built with profile-guided and link-time
# optimisation, and a tier starts on it in four fifths of the time.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo /usr/bin/python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEBIAN := runc crun busybox-static iproute2 nftables docker-registry
# What the host must have, asked of dpkg so that a machine with all of it needs no network.
MISSING = $(shell dpkg-query -W -f '$${db:Status-Abbrev} $${Package}\n' $(DEBIAN) 2>/dev/null \
	| awk -v want="$(DEBIAN)" '$$1 == "ii" {have[$$2] = 1} \
	END {n = split(want, w); for (i = 1; i <= n; i++) if (!(w[i] in have)) printf "%s ", w[i]}')
# As root in namespaces of its own: real containers, and nothing of them left behind.
SANDBOX := $(if $(filter 0,$(shell id -u)),$(BIN)/python -m tools.sandbox)

# What draws the plots of the bench.
PLOTS = $(BIN)/python -c 'import matplotlib' 2>/dev/null || \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --group bench

help: ## lists the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Bytecode as pip makes it for an installed package: a tier of a checkout, whose environment may
# forbid Python to keep what it compiles, would otherwise compile itself at every start.
setup: $(READY) ## installs what the project needs: Debian packages, and Python packages in .venv
	@$(BIN)/python -m compileall -q services protos tools tests/fakes
	@missing="$(MISSING)"; if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then \
			echo "not root: without the Debian packages $$missing some verbs do not work" >&2; \
		else \
			echo "installing $$missing"; \
			export DEBIAN_FRONTEND=noninteractive; \
			(apt-get -qq update && apt-get -qq install -y --no-install-recommends $$missing) \
				> $(VENV)/apt.log 2>&1 || { cat $(VENV)/apt.log >&2; exit 1; }; \
		fi; \
	fi

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || { \
		rm -rf $(VENV); test "$$(id -u)" = 0; \
		apt-get -qq update && apt-get -qq install -y python3-venv >/dev/null; \
		$(PYTHON) -m venv $(VENV); }
	@echo "installing Python packages into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'pip>=25.1' 2>/dev/null
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[all,otel]' --group dev
	@touch $(READY)

demo: setup ## pulls an image, runs containers, kills the tiers under them: 20 seconds
	@$(BIN)/python -m tools.sandbox $(BIN)/python -m tools.demo

# The suite compares with containerd's own client and with skopeo, on several file systems.
test: DEBIAN += containerd skopeo btrfs-progs openssl
test: setup ## runs the whole suite; as root that includes real containers
	@$(PLOTS)
	@$(SANDBOX) $(BIN)/python -m pytest $(ARGS)

# Until it is interrupted, or a target fails; what was learnt stays in .fuzz for the next time.
fuzz: setup ## fuzzes without end [TARGET=layers|filters|references|manifests] [ARGS="-max_total_time=60"]
	@for target in $(or $(TARGET),layers filters references manifests); do \
		$(BIN)/python -m tests.fuzz.run $$target .fuzz/$$target -timeout=10 $(ARGS) & jobs="$$jobs $$!"; \
	done; trap 'kill $$jobs 2>/dev/null' EXIT; \
	for job in $$jobs; do wait -n $$jobs || exit 1; done

check: setup ## formatting, lint, types, import rules
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

protos: setup ## generates the stubs from protos/
	@$(BIN)/python -m tools.protos

# Installing a peer must not start its service: the bench starts what it measures. One that cannot
# be installed is named in the report.
bench: NEEDED := $(DEBIAN) isal e2fsprogs
bench: PEERS := containerd docker.io podman netavark tini
bench: POLICY := /usr/sbin/policy-rc.d
bench: ## measures Theseus beside its peers [QUICK=1] [ONLY=run,pull] [ARGS="--out DIR"]
	@test "$$(id -u)" = 0 || { echo "make bench: needs root, to run engines" >&2; exit 1; }
	@if [ ! -e $(POLICY) ]; then \
		trap 'rm -f $(POLICY)' EXIT; \
		printf '#!/bin/sh\nexit 101\n' > $(POLICY) && chmod 755 $(POLICY); \
	fi; \
	$(MAKE) --no-print-directory setup DEBIAN="$(NEEDED)" || exit 1; \
	for peer in $(PEERS); do $(MAKE) --no-print-directory setup DEBIAN="$$peer" || true; done
	@$(PLOTS)
	@exec $(SANDBOX) $(BIN)/python -m tools.bench \
		$(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(ARGS)

wheel: setup ## builds the distribution into dist/
	@$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean: ## removes what the verbs made
	@rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .fuzz
