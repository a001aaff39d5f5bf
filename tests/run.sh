#!/usr/bin/env bash
# Runs every suite in order, each to its end whatever the others did. The last line is "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
export AEGIS_TOOLS=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools}
export PATH="$AEGIS_TOOLS/bin:$PATH"
# A lab of its own: one that a developer has running stays as it is.
export AEGIS_LAB=aegis-test
unset KUBECONFIG
passed=0 failed=0 broken=()
log=$(mktemp)
lab() { cargo run --quiet --package aegis-tests --bin aegis-lab -- "$@"; }
trap 'rm -f "$log"; lab down' EXIT

# suite NAME COMMAND...: counts what cargo says; a command that says nothing is one test, a crash is one failure.
suite() {
  local name=$1 good bad begin=$SECONDS status=0
  shift
  printf '\n=== %s\n' "$name"
  "$@" 2>&1 | tee "$log" || status=1
  read -r good bad < <(awk '/^test result:/ { good += $4; bad += $6 } END { print good + 0, bad + 0 }' "$log")
  if [ $status -ne 0 ] && [ "$bad" -eq 0 ]; then
    bad=1
  elif [ $status -eq 0 ] && [ $((good + bad)) -eq 0 ] && ! grep -q '^test result:' "$log"; then
    good=1
  fi
  passed=$((passed + good)) failed=$((failed + bad))
  [ "$bad" -eq 0 ] || broken+=("$name")
  printf -- '--- %s: %d passed, %d failed, %d s\n' "$name" "$good" "$bad" $((SECONDS - begin))
}

# tests PACKAGE PREFIX: the integration tests of a package that begin so, if there are any.
tests() {
  local folder
  case $1 in
    aegis-node-agent) folder=node-agent/tests ;;
    aegis-operator) folder=operator/tests ;;
    aegis-core) folder=operator/core/tests ;;
    aegis-crds) folder=crds/tests ;;
    *) folder=tests/tests ;;
  esac
  compgen -G "$folder/$2*" >/dev/null || return 1
  printf -- '--package %s --test %s*' "$1" "$2"
}

# integration NAME PACKAGE PREFIX [ARGUMENTS OF THE TEST PROGRAM...]
integration() {
  local name=$1 selection
  selection=$(tests "$2" "$3") || return 0
  shift 3
  read -ra selection <<< "$selection"
  suite "$name" cargo test --no-fail-fast "${selection[@]}" -- "$@"
}

suite format cargo fmt --all --check
suite clippy cargo clippy --workspace --all-targets -- -D warnings
if command -v cargo-deny >/dev/null; then
  suite "licences and advisories" cargo deny --log-level error check
fi
suite unit cargo test --no-fail-fast --workspace --lib --bins
integration "planner properties" aegis-core ""
integration "resource types" aegis-crds ""
suite chart helm lint --quiet charts/aegis
integration packet aegis-node-agent "" --test-threads=1
integration API aegis-operator ""
integration documentation aegis-tests docs
integration admission aegis-tests admit

suite "lab starts" lab up
if [ -f /run/aegis-lab/$AEGIS_LAB/kubeconfig ]; then
  integration lab aegis-tests lab --test-threads=1
  if compgen -G "tests/tests/e2e_*" >/dev/null; then
    # Ports rest two minutes between two nodes, which a test of an allocation's end would have to wait for.
    suite "Aegis is installed" lab install --set operator.quarantineSeconds=5
    integration "traffic end to end" aegis-tests e2e_traffic --test-threads=1
    integration "life end to end" aegis-tests e2e_life --test-threads=1
  fi
fi
suite "lab ends" lab down

if [ ${#broken[@]} -gt 0 ]; then
  printf '\nfailed: %s\n' "${broken[@]}"
fi
trap 'rm -f "$log"' EXIT
printf '\n%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
