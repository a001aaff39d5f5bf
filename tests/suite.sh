# Runs suites and counts what they say. Sourced by run.sh, and by the test of it (tests/tests/scripts.rs).
# shellcheck shell=bash
passed=0 failed=0 broken=() absent=() reasons=() running=
# Suites that run beside the others: process, log and name of each.
aside=() aside_log=() aside_name=()
log=$(mktemp)
# Longest time of one suite in seconds, unless a call says otherwise: one that hangs must not eat the time of the others.
limit=1800
# A test's message says what is wrong; a backtrace only pushes it out of sight.
export RUST_BACKTRACE=0

# suite NAME COMMAND...: counts what cargo says; a command that says nothing is one test, a crash is one failure.
suite() {
  local name=$1 good bad begin=$SECONDS status=0 tee
  shift
  printf '\n=== %s\n' "$name"
  exec 3> >(exec tee "$log")
  tee=$!
  # In the background, because a shell heeds a signal only while it waits; `timeout` passes it on to all that it started.
  timeout --kill-after=20 "$limit" "$@" >&3 2>&1 3>&- </dev/null &
  running=$!
  exec 3>&-
  # Without the shell's own word on a process that had to be killed.
  { wait "$running" || status=$?; } 2>/dev/null
  running=
  wait "$tee"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || printf '%s was ended after %d s\n' "$name" $((SECONDS - begin))
  read -r good bad < <(awk '/^test result:/ { good += $4; bad += $6 } END { print good + 0, bad + 0 }' "$log")
  if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then
    bad=1
  elif [ "$status" -eq 0 ] && [ $((good + bad)) -eq 0 ] && ! grep -q '^test result:' "$log"; then
    good=1
  fi
  passed=$((passed + good)) failed=$((failed + bad))
  [ "$bad" -eq 0 ] || { broken+=("$name") && reasons+=("=== $name"$'\n'"$(why)"); }
  printf -- '--- %s: %d passed, %d failed, %d s\n' "$name" "$good" "$bad" $((SECONDS - begin))
  [ "$bad" -eq 0 ]
}

# behind NAME COMMAND...: begins a suite at the lowest priority, beside those that follow: it takes what these leave of the processors.
# `meet` counts it.
behind() {
  aside_name+=("$1") aside_log+=("$(mktemp)")
  shift
  timeout --kill-after=20 "$limit" nice -n 19 "$@" >"${aside_log[-1]}" 2>&1 </dev/null &
  aside+=($!)
}

# meet [NAME]: waits for the suites that were begun by `behind`, or for one of them, and counts them.
meet() {
  local at status
  for at in "${!aside[@]}"; do
    [ "${1:-${aside_name[at]}}" = "${aside_name[at]}" ] || continue
    status=0
    { wait "${aside[at]}" || status=$?; } 2>/dev/null
    suite "${aside_name[at]}" sh -c 'cat "$1"; exit "$2"' sh "${aside_log[at]}" "$status"
    unset "aside[at]"
  done
}

# why: what the log says of a suite that failed: of each test that did its name and its message, at most 15 lines; where no test
# says anything, the first error and what follows, or else the end.
why() {
  awk -v most=15 '
    function line(text) {
      if (text ~ /^[ \t]*$/ || text ~ /^note: run with .RUST_BACKTRACE/) return 0
      print "  " substr(text, 1, 400)
      return 1
    }
    function show(lines, count, pattern,    from, i, shown) {
      for (from = 1; from <= count && lines[from] !~ pattern; from++);
      if (from > count) from = count > most ? count - most + 1 : 1
      for (i = from; i <= count && shown < most; i++) shown += line(lines[i])
    }
    function conclude() {
      if (name == "") return
      print name
      show(section, size, "panicked at|^Error:")
      name = ""
    }
    /^---- .* stdout ----$/ { conclude(); name = $2; size = 0; tests++; next }
    /^failures:$/ { conclude(); next }
    name != "" { section[++size] = $0; next }
    { all[++total] = $0 }
    END { conclude(); if (!tests) show(all, total, "^error") }
  ' "$log"
}

# fail NAME: something that should have run did not.
fail() {
  failed=$((failed + 1)) broken+=("$1")
}

# conclude: what failed and why, and the closing line. For the EXIT trap: sets the exit code.
conclude() {
  trap - EXIT INT TERM HUP
  for process in $running "${aside[@]}"; do
    kill "$process" 2>/dev/null
    wait "$process"
  done
  cleanup
  rm -f "$log" "${aside_log[@]}"
  printf '\n'
  [ ${#reasons[@]} -eq 0 ] || printf '%s\n\n' "${reasons[@]}"
  [ ${#absent[@]} -eq 0 ] || printf 'not run: %s\n' "${absent[@]}"
  [ ${#broken[@]} -eq 0 ] || printf 'failed: %s\n' "${broken[@]}"
  printf '%d min %d s in all\n' $((SECONDS / 60)) $((SECONDS % 60))
  printf '%d passed, %d failed\n' "$passed" "$failed"
  exit $((failed > 0))
}

# What the sourcing script made and has to remove.
cleanup() { :; }

trap conclude EXIT
trap 'fail "interrupted"; exit 1' INT TERM HUP
