#!/usr/bin/env bash
# Prints what the control plane costs in large clusters, on this machine: plans at 5,000 nodes and 1,000 addresses, then the
# operator beside a real API server of that size (AEGIS_SCALE names another). Takes some minutes and 8 GiB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."
export AEGIS_TOOLS=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools} AEGIS_SCALE=${AEGIS_SCALE:-5000x1000}
unset KUBECONFIG

cpu=$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)
printf '== plans (%s, %s CPUs, Linux %s)\n' "$cpu" "$(nproc)" "$(uname -r)"
cargo bench --quiet --package aegis-core --bench plan

printf '\n== the operator beside an API server, %s nodes x addresses\n' "$AEGIS_SCALE"
# As in the image: another C library has another allocator.
target=x86_64-unknown-linux-musl
cargo build --quiet --release --target "$target" --package aegis-operator
AEGIS_OPERATOR=$PWD/target/$target/release/aegis-operator \
  cargo test --quiet --package aegis-operator --test api_scale -- --nocapture
