#!/usr/bin/env bash
# The end-to-end tests on a running kind cluster (made with tests/kind.yaml): builds the images with Docker, installs the
# chart, starts two origins beside the nodes, and routes the egress range from them to the nodes. Tests that need the lab's
# faults or captures say "skipped".
set -euo pipefail
cd "$(dirname "$0")/.."
cluster=${1:-aegis} tag=kind-test
for tool in docker kind helm cargo ip ethtool; do
  command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "needs root, for the ports of Docker's bridge" >&2; exit 1; }
origins=(aegis-origin-1 aegis-origin-2)
kubeconfig=$(mktemp)
clean() { docker rm --force "${origins[@]}" >/dev/null 2>&1 || true; }
trap 'clean; rm -f "$kubeconfig"' EXIT
clean

docker build --file deploy/docker/operator.Dockerfile --tag "aegis-operator:$tag" .
docker build --file deploy/docker/node-agent.Dockerfile --tag "aegis-node-agent:$tag" .
cargo build --release --target x86_64-unknown-linux-musl --package aegis-probe
probe=target/x86_64-unknown-linux-musl/release
# The `ip` of Alpine's busybox knows no routes with several next hops.
printf 'FROM alpine:3.22\nRUN apk add --no-cache iproute2\nCOPY aegis-probe /probe\nENTRYPOINT ["/probe", "pause"]\n' |
  docker build --file - --tag "aegis-probe:$tag" "$probe"
kind load docker-image --name "$cluster" "aegis-operator:$tag" "aegis-node-agent:$tag" "aegis-probe:$tag"

kind get kubeconfig --name "$cluster" > "$kubeconfig"
export KUBECONFIG=$kubeconfig AEGIS_PROBE_IMAGE=aegis-probe:$tag
helm upgrade --install aegis charts/aegis --namespace aegis-system --create-namespace --wait --timeout 180s \
  --set "operator.image=aegis-operator:$tag" --set "agent.image=aegis-node-agent:$tag"

# Where the nodes are, and the ports of Docker's bridge that face them: these must do what a real network's ports do.
nexthops=()
for node in $(kind get nodes --name "$cluster"); do
  address=$(docker inspect --format '{{.NetworkSettings.Networks.kind.IPAddress}}' "$node")
  nexthops+=(nexthop via "$address")
  peer=$(docker exec "$node" cat /sys/class/net/eth0/iflink)
  port=$(ip -o link | sed -n "s/^$peer: \([^@:]*\).*/\1/p")
  cargo run --quiet --package aegis-tests --bin aegis-lab -- wire "$port"
done
AEGIS_ORIGINS=
for origin in "${origins[@]}"; do
  docker run --detach --name "$origin" --network kind --cap-add NET_ADMIN --entrypoint /probe "aegis-probe:$tag" \
    serve --ports 7000-7009 --control 0.0.0.0:7099
  docker exec "$origin" ip route add 203.0.113.0/24 "${nexthops[@]}"
  address=$(docker inspect --format '{{.NetworkSettings.Networks.kind.IPAddress}}' "$origin")
  AEGIS_ORIGINS+=${AEGIS_ORIGINS:+,}$address@$address:7099
done
export AEGIS_ORIGINS
cargo test --package aegis-tests --test 'e2e_*' -- --test-threads=1
