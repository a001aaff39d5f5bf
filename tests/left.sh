#!/usr/bin/env bash
# Names and removes the network namespaces of packet tests that are gone (`aegis-<role>-<process>-<number>`): there are none
# unless a test was killed. A lab looks after itself.
set -euo pipefail
left=0
while read -r name process; do
  [ ! -d "/proc/$process" ] || continue
  echo "left by a test: network namespace $name"
  ip netns del "$name"
  left=1
done < <(ip netns list | sed -nE 's/^(aegis-[a-z]+-([0-9]+)-[0-9]+)( .*)?$/\1 \2/p')
exit $left
