#!/usr/bin/env bash
# Sets up, then runs every suite in order, each to its end whatever the others did. The very last line is
# "N passed, N failed", also when setup fails, a suite hangs or somebody interrupts.
set -uo pipefail
cd "$(dirname "$0")/.."
. tests/suite.sh
export AEGIS_TOOLS=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools}
export PATH="$AEGIS_TOOLS/bin:$PATH"
# Without it, tests that find no lab say "skipped" and pass.
export AEGIS_REQUIRE_LAB=1
unset KUBECONFIG AEGIS_ORIGINS AEGIS_PROBE_IMAGE AEGIS_PROFILE
lab=("${CARGO_TARGET_DIR:-target}/debug/aegis-lab")
lab_is_up=
# What cargo says of the programs of all tests.
compiled=$(mktemp)

cleanup() {
  rm -f "$compiled"
  end_lab
}

end_lab() {
  [ -z "$lab_is_up" ] || "${lab[@]}" down
}

# integration NAME PACKAGE PREFIX [ARGUMENTS OF THE TEST PROGRAM...]: the integration tests of a package that begin so. Those of the whole
# workspace have names of their own.
integration() {
  local name=$1 package=$2 prefix=$3 folder path program programs=() run=suite
  shift 3
  [ "$package" != aegis-core ] || run=behind
  case $package in
    aegis-node-agent) folder=node-agent/tests ;;
    aegis-operator) folder=operator/tests ;;
    aegis-core) folder=operator/core/tests ;;
    aegis-crds) folder=crds/tests ;;
    aegis-cli) folder=cli/tests ;;
    aegis-usage) folder=operator/usage/tests ;;
    aegis-delivery) folder=node-agent/delivery/tests ;;
    aegis-collector) folder=operator/usage/collector/tests ;;
    *) folder=tests/tests ;;
  esac
  for path in "$folder/$prefix"*; do
    if [[ $path == *.rs || -f $path/main.rs ]]; then
      program=$(sed -n "s|.* Executable tests/.* (\(.*/$(basename "$path" .rs)-[0-9a-f]*\))\$|\1|p" "$compiled")
      programs+=("$(realpath "${program:-/nonexistent/$path}")")
    fi
  done
  if ((${#programs[@]} == 0)); then
    printf '\n=== %s: there is no %s/%s*\n' "$name" "$folder" "$prefix"
    fail "$name"
    return 1
  fi
  "$run" "$name" tests/each.sh "${folder%/tests}" "${programs[@]}" -- "$@"
}

if ! tests/setup.sh; then
  fail setup
  exit
fi
# What an earlier run left, if it was killed, is not this one's failure.
tests/left.sh || true

suite format cargo fmt --all --check
if command -v cargo-deny >/dev/null; then
  suite "licences and advisories" cargo deny --log-level error check
else
  absent+=("licences and advisories (cargo-deny is not installed)")
fi
# All at once, so that dependencies have the same features for all of them, and are compiled once.
suite "tests and programs are compiled" cargo build --workspace --lib --bins --tests
cargo test --no-run --workspace --lib --bins --tests >"$compiled" 2>&1 </dev/null
# What needs nothing but a processor.
integration "planner properties" aegis-core ""
suite unit cargo test --no-fail-fast --workspace --lib --bins
# As the lab compiles them for the images: with other packages beside them they would have other features, and be compiled anew. The labs wait
# for it, so it yields less.
yields=5 behind "operator and agent are compiled" cargo build --quiet --profile lab --target x86_64-unknown-linux-musl \
  --package aegis-operator --package aegis-node-agent
integration "resource types" aegis-crds ""
suite chart helm lint --quiet charts/aegis

# Most of these wait for an API server or a collector.
with_servers() {
  integration API aegis-operator ""
  integration "command line" aegis-cli ""
  integration collector aegis-usage collector
  integration "delivery of reports" aegis-delivery ""
  integration "collector in a cluster" aegis-collector collector
  # Each has a browser of its own.
  integration "page in a browser" aegis-usage page --test-threads=2
  if command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
    integration "collector on PostgreSQL" aegis-usage postgres
  else
    absent+=("collector on PostgreSQL (PostgreSQL is not installed)")
  fi
  integration documentation aegis-tests docs
  integration scripts aegis-tests scripts
  integration admission aegis-tests admit
  if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    integration monitoring aegis-tests monitoring
  else
    absent+=("monitoring (Prometheus is not installed)")
  fi
}
strand "servers" with_servers
integration packet aegis-node-agent "" --test-threads=1
# What the labs need comes first. Then nobody needs the folder of what is compiled any more.
meet servers
meet "operator and agent are compiled"
behind clippy cargo clippy --workspace --all-targets -- -D warnings
behind "neither root nor BPF linker" tests/bare.sh

# with_lab NAME COMMAND...: starts a lab, does that, and ends the lab. Labs have names of their own: one that a developer has running
# stays as it is.
with_lab() {
  export AEGIS_LAB=$1
  shift
  suite "$AEGIS_LAB: no earlier lab" "${lab[@]}" down
  lab_is_up=maybe
  if suite "$AEGIS_LAB starts" "${lab[@]}" up; then
    "$@"
  fi
  if suite "$AEGIS_LAB ends and leaves nothing" "${lab[@]}" down; then
    lab_is_up=
  fi
}

# Ports rest two minutes between two nodes, and slices that are not needed stay ten: tests would have to wait for both.
installed() {
  suite "Aegis is installed on $AEGIS_LAB" "${lab[@]}" install --set operator.quarantineSeconds=5 --set agent.demandWindowSeconds=30 \
    --set usage.enabled=true
}

# Tests of life that the second lab has; the first has all others.
life_on_second=(api_outage:: autoscaler:: fence:: growth:: hosts:: l2:: leaving:: lost_nodes:: names:: pod_start:: upgrade:: withdrawal::)
on_first() {
  integration lab aegis-tests lab --test-threads=1
  installed || return
  integration "traffic end to end" aegis-tests e2e_traffic --test-threads=1
  integration "life end to end" aegis-tests e2e_life --test-threads=1 "${life_on_second[@]/#/--skip=}"
}

on_second() {
  installed || return
  integration "more of life end to end" aegis-tests e2e_life --test-threads=1 "${life_on_second[@]}"
  integration "chaos" aegis-tests e2e_chaos --test-threads=1
  # Last: it changes values of the release.
  integration "announcement end to end" aegis-tests e2e_announce --test-threads=1
}

second_lab() {
  cleanup() { end_lab; }
  with_lab aegis-test-2 on_second
}

# Most tests of the labs wait for something most of the time: two labs at once take half the time, and what else goes on takes what these
# leave of the processors.
strand "the second lab" second_lab
with_lab aegis-test on_first
meet
suite "tests leave nothing" tests/left.sh
