# Runs suites and counts what they say. Sourced by run.sh, and by the test of it (tests/tests/scripts.rs).
# shellcheck shell=bash
passed=0 failed=0 broken=() absent=() reasons=() running=
# What runs beside the others, suites and strands: process, log and name of each; of a strand also the file with what it has counted.
aside=() aside_log=() aside_name=() aside_counts=()
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

# behind NAME COMMAND...: begins a suite at the lowest priority (or what `yields` says, for nice), beside those that follow: it takes what these
# leave of the processors, and so may take longer. `meet` counts it.
behind() {
  aside_name+=("$1") aside_log+=("$(mktemp)")
  shift
  timeout --kill-after=20 $((2 * limit)) nice -n "${yields:-19}" "$@" >"${aside_log[-1]}" 2>&1 </dev/null &
  aside[${#aside_name[@]} - 1]=$!
}

# strand NAME COMMAND...: begins a row of suites, most often a function, beside what follows. They run in order and at no lower priority,
# and count for themselves. `meet` shows what they printed, and adds what they have counted.
strand() {
  local counts
  counts=$(mktemp)
  aside_name+=("$1") aside_log+=("$(mktemp)")
  shift
  in_strand "$counts" "$@" >"${aside_log[-1]}" 2>&1 </dev/null &
  aside[${#aside_name[@]} - 1]=$!
  aside_counts[${#aside_name[@]} - 1]=$counts
}

# in_strand FILE COMMAND...: what a strand's shell does. What it has counted is in the file however it ends.
in_strand() {
  counts=$1
  shift
  passed=0 failed=0 broken=() absent=() reasons=() running=
  aside=() aside_log=() aside_name=() aside_counts=()
  log=$(mktemp)
  cleanup() { :; }
  trap end_strand EXIT
  trap 'fail "interrupted"; exit 1' INT TERM HUP
  "$@"
}

end_strand() {
  trap - EXIT INT TERM HUP
  stop_running
  cleanup
  rm -f "$log"
  declare -p passed failed broken absent reasons | sed 's/^declare -\(a\|-\) //' >"$counts"
}

# meet [NAME]: waits for what was begun by `behind` and `strand`, or for one of them, and counts it.
meet() {
  local at status
  for at in "${!aside[@]}"; do
    [ "${1:-${aside_name[at]}}" = "${aside_name[at]}" ] || continue
    status=0
    { wait "${aside[at]}" || status=$?; } 2>/dev/null
    if [ -n "${aside_counts[at]:-}" ]; then
      add_strand "$at"
    else
      suite "${aside_name[at]}" sh -c 'cat "$1"; exit "$2"' sh "${aside_log[at]}" "$status"
    fi
    unset "aside[at]"
  done
}

# add_strand INDEX: shows what a strand printed, and adds what it has counted.
add_strand() {
  local name=${aside_name[$1]} counts=${aside_counts[$1]} sums=("$passed" "$failed")
  local all_broken=("${broken[@]}") all_absent=("${absent[@]}") all_reasons=("${reasons[@]}")
  printf '\n=== %s: what ran beside the above\n' "$name"
  cat "${aside_log[$1]}"
  # A strand that was killed has counted nothing.
  passed=0 failed=1 broken=("$name") absent=() reasons=()
  [ ! -s "$counts" ] || . "$counts"
  passed=$((passed + sums[0])) failed=$((failed + sums[1]))
  broken=("${all_broken[@]}" "${broken[@]}") absent=("${all_absent[@]}" "${absent[@]}")
  reasons=("${all_reasons[@]}" "${reasons[@]}")
  rm -f "$counts"
}

# stop_running: ends the suite that runs and all that run beside it.
stop_running() {
  local process
  for process in $running "${aside[@]}"; do
    kill "$process" 2>/dev/null
    wait "$process"
  done
}

# why: what the log says of a suite that failed: of each test that did its name and its message, at most 15 lines of the first and 6 of the
# others; where no test says anything, the first error and what follows, or else the end.
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
      most = 6
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
  local at
  trap - EXIT INT TERM HUP
  stop_running
  cleanup
  rm -f "$log" "${aside_log[@]}" "${aside_counts[@]}"
  printf '\n'
  # What failed first stands last, where one looks: often it is the cause of the others.
  for ((at = ${#reasons[@]} - 1; at >= 0; at--)); do
    printf '%s\n\n' "${reasons[at]}"
  done
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
