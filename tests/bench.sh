#!/usr/bin/env bash
# Measures the node's NAT beside the kernel's own, and writes bench/results.json and the table of docs/benchmarks.md; then prints
# what policies cost a node, and the control plane in large clusters: plans at 5,000 nodes and 1,000 addresses, and the operator beside
# a real API server of that size (AEGIS_SCALE names another). Takes a quarter of an hour and 8 GiB of memory, and wants the machine
# for itself. With arguments only some of it: nat, policy, plan, scale.
set -euo pipefail
cd "$(dirname "$0")/.."
export AEGIS_TOOLS=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools} AEGIS_SCALE=${AEGIS_SCALE:-5000x1000}
unset KUBECONFIG

parts=${*:-nat policy plan scale}
cpu=$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)
printf '%s, %s CPUs, Linux %s\n' "$cpu" "$(nproc)" "$(uname -r)"
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac }

if wanted nat; then
  printf '== NAT\n'
  rows=$(mktemp) page=$(mktemp)
  trap 'rm -f "$rows" "$page"' EXIT
  cargo run --quiet --release --package aegis-node-agent --example nat_rate -- bench/results.json "$rows"
  awk -v rows="$rows" -v machine="$cpu, $(nproc) CPUs, Linux $(uname -r), $(date +%F)" '
    /^<!-- end -->/ { skip = 0 }
    !skip
    /^<!-- table -->/ {
      skip = 1
      printf "%s:\n\n| what, and the reference | Aegis | reference | unit | ratio |\n|---|---|---|---|---|\n", machine
      while ((getline line < rows) > 0) print line
    }' docs/benchmarks.md > "$page"
  cat "$page" > docs/benchmarks.md
fi

if wanted policy; then
  printf '\n== policies of a node, compiled\n'
  cargo bench --quiet --package aegis-core --bench policy
  printf '\n== an edit of one of 500\n'
  cargo run --quiet --release --package aegis-node-agent --example policy_edit
fi

if wanted plan; then
  printf '\n== plans\n'
  cargo bench --quiet --package aegis-core --bench plan
fi

if wanted scale; then
  printf '\n== the operator beside an API server, %s nodes x addresses\n' "$AEGIS_SCALE"
  # As in the image: another C library has another allocator.
  target=x86_64-unknown-linux-musl
  cargo build --quiet --release --target "$target" --package aegis-operator
  AEGIS_OPERATOR=$PWD/target/$target/release/aegis-operator \
    cargo test --quiet --package aegis-operator --test api_scale -- --nocapture
fi
