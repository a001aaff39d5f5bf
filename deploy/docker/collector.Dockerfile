# docker build -f deploy/docker/collector.Dockerfile -t aegis-collector:0.1.0 .
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends musl-tools
WORKDIR /src
COPY . .
# A static binary, so that the image holds nothing else.
RUN target="$(uname -m)-unknown-linux-musl" \
 && rustup target add "$target" \
 && cargo build --locked --release --target "$target" -p aegis-collector \
 && cp "target/$target/release/aegis-collector" /aegis-collector

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /aegis-collector /aegis-collector
ENTRYPOINT ["/aegis-collector"]
