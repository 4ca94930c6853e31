# `make demo` and `make test` do their own set-up. Everything built is kept outside the source tree, so that a fresh
# clone on the same machine starts warm.

SHELL := /bin/bash
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/tp-target
TARGET  := $(shell rustc -vV | sed -n 's/^host: //p')
STATIC  := --release --target $(TARGET) --config 'target.$(TARGET).rustflags=["-Ctarget-feature=+crt-static"]'
export TP_BIN_DIR = $(CARGO_TARGET_DIR)/$(TARGET)/release
IMAGE   := target/image/tp.tar
CLUSTER := tests/cluster

.PHONY: help demo demo-cluster test test-only binaries image cluster cluster-down packages lint fuzz fuzz-smoke soak bench bench-cluster bench-run

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: ## the proxy before two services in a network namespace; no Kubernetes needed
	cargo build --locked $(STATIC) -p tp -p tp-manager
	@demo/demo.sh

demo-cluster: binaries image cluster ## the same story on the real cluster
	@demo/demo-cluster.sh

test: packages cluster binaries image test-only ## installs what tests need, brings up the cluster, runs all

test-only: ## the tests alone; everything must be built
	@tests/run.sh

binaries: ## tp, tp-manager and tp-agent as static release binaries, and the tests' own tools
	cargo build --locked $(STATIC) -p tp -p tp-manager -p tp-agent -p tp-tests --bins
	@echo 'programs: $(TP_BIN_DIR)'

image: binaries ## the manager's image, as target/image/tp.tar
	manager/image.sh $(TP_BIN_DIR)

cluster: ## builds and starts the test cluster
	@$(CLUSTER)/build.sh
	@$(CLUSTER)/status.sh >/dev/null 2>&1 || $(CLUSTER)/up.sh

cluster-down: ## ends the test cluster
	$(CLUSTER)/down.sh

packages:
	@[ "$$(id -u)" != 0 ] || tests/packages.sh

lint: ## formatting, clippy, documentation, and what may depend on what
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then cargo deny --locked check -A duplicate bans licenses sources; else echo 'cargo-deny is not installed: deny.toml was not checked'; fi

fuzz: ## ten CPU minutes for each fuzz target (SECONDS_EACH=600)
	tests/fuzz.sh $(or $(SECONDS_EACH),600)

fuzz-smoke: ## twenty seconds for each fuzz target
	tests/fuzz.sh 20

soak: packages cluster binaries image ## the long counts: 100,000 short connections, 10,000 idle flows, faults with 20 seeds
	TP_SOAK=1 cargo test --locked -p tp-tests --test many_flows -- --nocapture --test-threads=1
	TP_SOAK=1 cargo test --locked -p tp-tests --test intercept_faults --test intercept_faults_cluster -- --nocapture

bench: bench-cluster bench-run ## the benchmarks, each against its peer in the same run
	$(CARGO_TARGET_DIR)/release/tunnel
	cargo bench --locked -p tp-netstack
	cargo bench --locked -p tp-manager-api
	cargo bench --locked -p tp-agent

bench-run: binaries ## tp run beside loopback, slirp4netns, pasta, sshuttle and ssh -L, in namespaces of its own; needs root
	tests/packages.sh iproute2 mount util-linux nftables slirp4netns passt sshuttle openssh-client openssh-server
	cargo build --locked --release -p tp-benches --bin run --bin peer
	$(CARGO_TARGET_DIR)/release/run $(QUESTIONS)

bench-cluster: packages cluster binaries image ## tp beside kubectl port-forward on the test cluster
	cargo build --locked --release -p tp-benches --bins
	benches/cluster.sh $(TP_BIN_DIR) $(CARGO_TARGET_DIR)/release $(QUESTIONS)
