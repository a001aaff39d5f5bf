#!/usr/bin/env bash
# each.sh FOLDER PROGRAM... -- ARGUMENT...: runs test programs in the folder of their package, each whatever became of those before.
# As `cargo test --no-fail-fast` does, but for cargo: that waits for whoever else is compiling.
set -uo pipefail
cd "$1" || exit
shift
programs=()
while (($# > 0)) && [ "$1" != -- ]; do
  programs+=("$1")
  shift
done
shift
status=0
for program in "${programs[@]}"; do
  printf '     Running %s\n' "$(basename "$program")"
  "$program" "$@" || status=$?
done
exit "$status"
