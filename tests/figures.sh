#!/usr/bin/env bash
# Prints what Aegis costs, on this machine: nanoseconds per packet, how soon a binding is in force, how soon a gateway that
# fails is replaced, or a node that answers ARP, what pods wait for when they start, how slices follow 64,000 connections, memory. In a lab of its own; takes some minutes
# and wants the machine for itself.
set -euo pipefail
cd "$(dirname "$0")/.."
export AEGIS_TOOLS=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools} AEGIS_LAB=aegis-fig AEGIS_REQUIRE_LAB=1
export PATH="$AEGIS_TOOLS/bin:$PATH"
# Of fewer failures the 99th percentile says little.
export AEGIS_FAILURES=20
export AEGIS_POD_STARTS=20 AEGIS_BURST=200
# As users have it.
export AEGIS_PROFILE=release
unset KUBECONFIG
lab() { cargo run --quiet --package aegis-tests --bin aegis-lab -- "$@"; }
trap 'lab down' EXIT

printf '== cost per packet\n'
cargo run --quiet --release --package aegis-node-agent --example packet_cost

printf '\n== in a lab of three nodes on this machine (%s)\n' "$(nproc) CPUs, Linux $(uname -r)"
lab down
{ lab up && lab install; } >/dev/null
printf 'idle:\n'
lab status | grep resident
for test in latency a_gateway_that_fails an_address_on_the_link what_the_wait_costs pods_that_start_at_once; do
  cargo test --quiet --package aegis-tests --test e2e_life -- "$test" --nocapture --test-threads=1 2>&1 | grep p50 ||
    echo "$test: failed, or measured nothing"
done
printf 'five minutes without an API server:\n'
AEGIS_OUTAGE_SECONDS=300 cargo test --quiet --package aegis-tests --test e2e_life -- without_api_server --nocapture --test-threads=1 2>&1 |
  grep -E 'no API server|new connections|outage' || echo "failed, or measured nothing"
AEGIS_GROWTH=252 cargo test --quiet --package aegis-tests --test e2e_life -- growth_to --nocapture --test-threads=1 2>&1 |
  grep '^growth' || echo 'growth: failed, or measured nothing'
printf 'afterwards:\n'
lab status | grep resident
