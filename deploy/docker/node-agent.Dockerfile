# docker build -f deploy/docker/node-agent.Dockerfile -t aegis-node-agent:0.1.0 .
FROM rust:1.95-slim-bookworm AS linker
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl gnupg \
 && curl -fsSL https://apt.llvm.org/llvm-snapshot.gpg.key | gpg --dearmor -o /usr/share/keyrings/llvm.gpg \
 && echo "deb [signed-by=/usr/share/keyrings/llvm.gpg] https://apt.llvm.org/bookworm llvm-toolchain-bookworm-22 main" \
    > /etc/apt/sources.list.d/llvm.list \
 && apt-get update && apt-get install -y --no-install-recommends \
    g++ llvm-22-dev libpolly-22-dev zlib1g-dev libzstd-dev
# Links the eBPF programs; the same version as in `make setup`.
RUN LLVM_PREFIX=/usr/lib/llvm-22 LLVM_SYS_221_PREFIX=/usr/lib/llvm-22 \
    cargo install bpf-linker@0.13.0 --locked --no-default-features --features llvm-22

FROM linker AS build
WORKDIR /src
COPY . .
# rust-toolchain.toml brings rust-src, from which `core` is compiled for the eBPF target.
RUN cargo build --locked --release -p aegis-node-agent

FROM debian:bookworm-slim
# nft writes the agent's table.
RUN apt-get update && apt-get install -y --no-install-recommends nftables \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/aegis-node-agent /usr/local/bin/aegis-node-agent
ENTRYPOINT ["/usr/local/bin/aegis-node-agent"]
