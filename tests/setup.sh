#!/usr/bin/env bash
# Installs what building and testing need: Debian packages, the Rust toolchain, the BPF linker, and Kubernetes built
# from the Go modules that tests/tools pins. Run again, it does nothing in under a second.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${AEGIS_TOOLS:-$HOME/.cache/aegis/tools}
packages=(containernetworking-plugins nftables iptables iproute2 openssl ethtool tcpdump conntrack kmod procps
  iputils-ping iputils-tracepath traceroute iperf3 curl dnsmasq-base bind9-dnsutils util-linux frr bird2 prometheus gcc g++ musl-tools libc6-dev llvm-22-dev libpolly-22-dev zlib1g-dev libzstd-dev)
# Docker's packages bring a runc of their own, which Debian's would push out.
command -v runc >/dev/null || packages+=(runc)
# A browser for the tests of the page: any that runs. What Ubuntu has under these names only brings a snap, which needs a service to run.
browser() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    ! timeout 20 "$name" --version >/dev/null 2>&1 || return 0
  done
  return 1
}
linker=0.13.0
# Distributions switch this off in their Go: tests/tools says which Go it needs, and `go` fetches that.
export GOTOOLCHAIN=auto

say() { printf '[setup %4d s] %s\n' "$SECONDS" "$*"; }
missing=()
need() { missing+=("$1"); }

# --- what this script cannot install ---
[ "$(id -u)" = 0 ] || need "root: run it as root, or with sudo -E env \"PATH=\$PATH\""
[ "$(uname -m)" = x86_64 ] || need "an x86_64 machine"
kernel=$(uname -r)
printf '6.6\n%s\n' "${kernel%%-*}" | sort -CV || need "Linux 6.6 or newer (this is $kernel)"
command -v apt-get >/dev/null || need "Debian or Ubuntu: packages are installed by apt-get"
go=$(go version 2>/dev/null | sed -n 's/^go version go\([0-9.]*\).*/\1/p' || true)
[ -n "$go" ] && printf '1.21\n%s\n' "$go" | sort -CV ||
  need "Go 1.21 or newer (this is ${go:-none}): https://go.dev/dl (it fetches the version that tests/tools asks for)"
command -v rustup >/dev/null || need "Rust: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup needs, and cannot install itself:" >&2
  printf '  - %s\n' "${missing[@]}" >&2
  exit 1
fi

# --- Debian packages ---
# Ubuntu 24.04 has no LLVM 22; the LLVM project's own packages do.
add_llvm() {
  local release key=/etc/apt/keyrings/apt.llvm.org.asc
  release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  say "this distribution has no LLVM 22: adding the package source https://apt.llvm.org/$release"
  apt-get install -y -qq --no-install-recommends ca-certificates curl >/dev/null
  mkdir -p /etc/apt/keyrings
  if curl -fsSL --max-time 60 https://apt.llvm.org/llvm-snapshot.gpg.key -o "$key"; then
    echo "deb [signed-by=$key] https://apt.llvm.org/$release/ llvm-toolchain-$release-22 main" \
      > /etc/apt/sources.list.d/aegis-llvm.list
    apt-get update -qq || true
  fi
  apt-cache show llvm-22-dev >/dev/null 2>&1 && return
  rm -f /etc/apt/sources.list.d/aegis-llvm.list "$key"
  cat >&2 <<'MESSAGE'
The BPF linker is built with LLVM 22. This distribution does not have it, and https://apt.llvm.org does not answer or has
nothing for this release. Install llvm-22-dev and libpolly-22-dev from elsewhere, then run this again.
MESSAGE
  exit 1
}

# Routing daemons and Prometheus come as services that start at once and at every boot; lab and tests run their own.
services=(frr bird prometheus)
policy=/usr/sbin/policy-rc.d
start_nothing() {
  [ ! -e "$policy" ] || return 0
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
}
start_services_again() {
  for service in "${services[@]}"; do
    [[ " ${absent[*]} " != *" $service"* ]] || update-rc.d "$service" disable >/dev/null
  done
  if trap -p EXIT | grep -q policy; then
    rm -f "$policy"
    trap - EXIT
  fi
}

absent=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || absent+=("$package")
done
if [ ${#absent[@]} -gt 0 ]; then
  say "apt-get install ${absent[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-cache show llvm-22-dev >/dev/null 2>&1 || add_llvm
  start_nothing
  apt-get install -y -qq --no-install-recommends "${absent[@]}" >/dev/null
  start_services_again
fi

# Not among the packages above: any browser will do, and where none is to be had all tests but those of the page can run.
if ! browser; then
  export DEBIAN_FRONTEND=noninteractive
  version=$(apt-cache policy chromium 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
  [ -n "$version" ] || { apt-get update -qq && version=$(apt-cache policy chromium | awk '$1 == "Candidate:" { print $2 }'); }
  case ${version:-(none)} in
    "(none)" | *snap*) ;;
    *) say "apt-get install chromium" && apt-get install -y -qq --no-install-recommends chromium >/dev/null ;;
  esac
  browser || say "there is no browser: install Chromium or Chrome, or the tests of the page will fail"
fi

# --- Rust: rust-toolchain.toml names version, components and targets ---
root=$(RUSTUP_AUTO_INSTALL=0 rustc --print sysroot 2>/dev/null || true)
if [ ! -d "$root/lib/rustlib/src/rust" ] || [ ! -d "$root/lib/rustlib/x86_64-unknown-linux-musl" ] ||
  [ ! -x "$root/bin/cargo-clippy" ] || [ ! -x "$root/bin/rustfmt" ]; then
  say "Rust toolchain of rust-toolchain.toml"
  rustup toolchain install || rustup show
fi

# --- the BPF linker ---
if ! "$tools/bpf-linker/bin/bpf-linker" --version 2>/dev/null | grep -qw "$linker"; then
  say "bpf-linker $linker (2 to 4 min)"
  LLVM_PREFIX=/usr/lib/llvm-22 LLVM_SYS_221_PREFIX=/usr/lib/llvm-22 \
    cargo install --locked "bpf-linker@$linker" --no-default-features --features llvm-22 --root "$tools/bpf-linker" --force
fi

# --- Kubernetes and what it stands on ---
# build GROUP LDFLAGS NAME=PACKAGE...: builds the programs of tests/tools/GROUP, unless the stamp says they are these. At once, so that one
# is compiled while another is linked, which takes one processor only.
build() {
  local group=$1 flags=$2 stamp="$tools/bin/.$1" pair
  shift 2
  local wanted
  wanted=$({ cat "tests/tools/$group/go.mod" "tests/tools/$group/go.sum"; echo "$flags $*"; } | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  say "building ${*%%=*}"
  mkdir -p "$tools/bin/new"
  (cd "tests/tools/$group" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w $flags" -o "$tools/bin/new/" "${@#*=}")
  for pair in "$@"; do
    mv "$tools/bin/new/$(go_name "${pair#*=}")" "$tools/bin/${pair%%=*}"
  done
  rmdir "$tools/bin/new"
  echo "$wanted" > "$stamp"
}
# go_name PACKAGE: what `go build` calls its program: the last part of the path that is no version.
go_name() {
  local path=$1
  [[ ! ${path##*/} =~ ^v[0-9]+$ ]] || path=${path%/*}
  echo "${path##*/}"
}
mkdir -p "$tools/bin"
version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' tests/tools/kubernetes/go.mod)
base=k8s.io/component-base/version
minor=${version#v1.}
kubernetes=()
for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
  kubernetes+=("$name=k8s.io/kubernetes/cmd/$name")
done
build kubernetes "-X $base.gitVersion=$version -X $base.gitMajor=1 -X $base.gitMinor=${minor%%.*}" "${kubernetes[@]}"
containerd=()
for name in containerd containerd-shim-runc-v2 ctr; do
  containerd+=("$name=github.com/containerd/containerd/v2/cmd/$name")
done
build containerd "" "${containerd[@]}"
build etcd "" etcd=go.etcd.io/etcd/server/v3
build helm "" helm=helm.sh/helm/v3/cmd/helm
say "everything is there ($tools)"
