#!/usr/bin/env bash
# A newcomer's first step: the code can be checked without root and without the BPF linker, and what is missing is named with
# the command that installs it. In the target folder of all other builds, whose dependencies it shares.
set -euo pipefail
cd "$(dirname "$0")/.."
# A bpf-linker may be installed beside the cargo on PATH; beside the toolchain's own there is none.
toolchain=$(rustc --print sysroot)/bin
# In a user namespace of its own nobody is root.
output=$(unshare --user env PATH="$toolchain:/usr/bin:/bin" AEGIS_TOOLS=/nonexistent \
  cargo check --workspace --lib --bins 2>&1) || { echo "$output"; exit 1; }
echo "$output"
# shellcheck disable=SC2016 # backquotes as they are printed
if ! grep -q 'bpf-linker is missing.*run `make setup`' <<<"$output"; then
  echo 'no hint what installs the missing bpf-linker'
  exit 1
fi
