# The project's commands; `make` lists them. Those that build or test run `setup` first, which is quick once done.
# After a failure make itself adds a line; `.ci/run` is `make test` without it.
SHELL := /bin/bash
export AEGIS_TOOLS ?= $(HOME)/.cache/aegis/tools
LAB := cargo run --quiet --package aegis-tests --bin aegis-lab --
IMAGES := --package aegis-operator --package aegis-node-agent --package aegis-probe

.PHONY: help setup build lab lab-down demo chaos fuzz test figures bench kind-test fmt clippy crds

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | column -t -s "$$(printf '\t')"

setup: ## install what is missing: packages, toolchain, BPF linker, Kubernetes
	@tests/setup.sh

build: setup ## compile the static binaries that go into the images
	cargo build --release --target x86_64-unknown-linux-musl $(IMAGES)
	cargo build --release --target x86_64-unknown-linux-musl --package aegis-collector

lab: setup ## start the lab, install Aegis, and print how to use it
	@$(LAB) up
	@$(LAB) install
	@$(LAB) usage

lab-down: ## end the lab and remove all it made (demo and test end their own)
	@$(LAB) down

demo: setup ## one address on three nodes, shown with real traffic
	@cargo run --quiet --package aegis-tests --bin demo

chaos: setup ## break things while traffic flows: SECONDS=300 SEED=n; the last line is "chaos: ok", or what failed
	@cargo run --quiet --package aegis-tests --bin aegis-chaos -- $(if $(filter command line,$(origin SECONDS)),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

fuzz: setup ## random frames and map states through the eBPF programs: FRAMES=1000000 SEED=n
	AEGIS_FUZZ=$(or $(FRAMES),1000000) AEGIS_FUZZ_SEED=$(or $(SEED),$(shell date +%s)) \
	  cargo test --quiet --package aegis-node-agent --test xdp_fuzz -- --nocapture

test: ## set up, then every suite; the last line is "N passed, N failed"
	@tests/run.sh

figures: setup ## what Aegis costs on this machine: packets, latency, memory
	@tests/figures.sh

bench: setup ## NAT beside the kernel's own (docs/benchmarks.md), 500 policies on a node, the control plane at 5,000 nodes; PARTS=nat does only that
	@tests/bench.sh $(PARTS)

kind-test: ## the end-to-end tests on a kind cluster (needs Docker, kind, helm)
	@tests/kind.sh

fmt: ## format the code
	cargo fmt --all

clippy: ## the linter, as strict as in the tests
	cargo clippy --workspace --all-targets -- -D warnings

crds: ## generate crds/generated from the Rust types
	cargo run --quiet --package aegis-crds --bin crdgen
