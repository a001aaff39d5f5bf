//! The page for browsers: a few files that are part of the program. They say nothing about anybody: what is shown, the page asks for by the token of
//! whoever opened it.

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::LazyLock;

/// A file of the folder, with its type.
macro_rules! file {
    ($name:literal, $kind:literal) => {
        ($name, $kind, include_bytes!(concat!("../page/", $name)))
    };
}

/// All of them, as they lie in the repository.
const FILES: &[(&str, &str, &[u8])] = &[
    file!("index.html", "text/html; charset=utf-8"),
    file!("style.css", "text/css; charset=utf-8"),
    file!("app.js", "text/javascript; charset=utf-8"),
    file!("api.js", "text/javascript; charset=utf-8"),
    file!("dom.js", "text/javascript; charset=utf-8"),
    file!("format.js", "text/javascript; charset=utf-8"),
    file!("session.js", "text/javascript; charset=utf-8"),
    file!("fill.js", "text/javascript; charset=utf-8"),
    file!("accounts.js", "text/javascript; charset=utf-8"),
    file!("address.js", "text/javascript; charset=utf-8"),
    file!("strip.js", "text/javascript; charset=utf-8"),
    file!("plot.js", "text/javascript; charset=utf-8"),
    file!("alerts.js", "text/javascript; charset=utf-8"),
    file!("policies.js", "text/javascript; charset=utf-8"),
];

/// What a browser is told about each answer. Nothing is loaded from elsewhere, nothing is run that is not one of the files, and no other page may
/// show this one in a frame. A name of a pod that were taken for HTML could still do nothing.
const HEADERS: [(HeaderName, HeaderValue); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
             frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        ),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    // An upgrade is seen at once; until then the answer is that nothing changed.
    (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    (header::VARY, HeaderValue::from_static("accept-encoding")),
    (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
];

struct File {
    kind: HeaderValue,
    tag: HeaderValue,
    plain: Bytes,
    packed: Bytes,
}

/// Packed once, when somebody first asks.
static SERVED: LazyLock<BTreeMap<&'static str, File>> = LazyLock::new(|| {
    let file = |(name, kind, bytes): &(&'static str, &'static str, &'static [u8])| {
        let tag: String = Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        // Weak: packed and plain are the same page, but not the same bytes.
        let tag = HeaderValue::from_str(&format!("W/\"{tag}\"")).ok()?;
        let plain = Bytes::from_static(bytes);
        let packed = pack(bytes).unwrap_or_else(|_| plain.clone());
        Some((*name, File { kind: HeaderValue::from_static(kind), tag, plain, packed }))
    };
    FILES.iter().filter_map(file).collect()
});

fn pack(bytes: &[u8]) -> std::io::Result<Bytes> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::best());
    packer.write_all(bytes)?;
    Ok(packer.finish()?.into())
}

/// `/`, and what it consists of below `/page/`.
pub(crate) fn router() -> Router {
    Router::new().route("/", get(|headers: HeaderMap| async move { serve("index.html", &headers) })).route(
        "/page/{name}",
        get(|Path(name): Path<String>, headers: HeaderMap| async move { serve(&name, &headers) }),
    )
}

/// `/graphiql`: a place to try questions, for whoever develops with the collector on their own machine. Its scripts come from elsewhere, and get to
/// see the token: so it is for no other place.
pub fn graphiql() -> Router {
    Router::new().route("/graphiql", get(|| async { Html(include_str!("../graphiql/index.html")) }))
}

fn serve(name: &str, asked: &HeaderMap) -> Response {
    let Some(file) = SERVED.get(name) else {
        return (StatusCode::NOT_FOUND, HEADERS, "there is no such file\n").into_response();
    };
    let listed = |name: HeaderName, word: &str| {
        let lists = asked.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        lists.flat_map(|list| list.split(',')).any(|entry| entry.trim() == word)
    };
    let tag = [(header::ETAG, file.tag.clone())];
    if file.tag.to_str().is_ok_and(|tag| listed(header::IF_NONE_MATCH, tag)) {
        return (StatusCode::NOT_MODIFIED, HEADERS, tag).into_response();
    }
    let kind = [(header::CONTENT_TYPE, file.kind.clone())];
    if listed(header::ACCEPT_ENCODING, "gzip") {
        let packed = [(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"))];
        return (HEADERS, tag, kind, packed, Body::from(file.packed.clone())).into_response();
    }
    (HEADERS, tag, kind, Body::from(file.plain.clone())).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_folder_is_served_and_small() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/page");
        for entry in std::fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(SERVED.contains_key(name.as_str()), "{name} is in no list");
        }
        let packed: usize = SERVED.values().map(|file| file.packed.len()).sum();
        assert!(packed < 64 << 10, "{packed} bytes are much for somebody on a phone");
    }

    #[test]
    fn a_file_is_sent_once() {
        let ask = |name: HeaderName, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            serve("app.js", &headers)
        };
        let plain = ask(header::ACCEPT, "*/*");
        assert_eq!((plain.status(), plain.headers().get(header::CONTENT_ENCODING)), (StatusCode::OK, None));
        let packed = ask(header::ACCEPT_ENCODING, "deflate, gzip, br");
        assert_eq!(packed.headers()[header::CONTENT_ENCODING], "gzip");
        let mut again = HeaderMap::new();
        again.insert(header::IF_NONE_MATCH, plain.headers()[header::ETAG].clone());
        let again = serve("app.js", &again);
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert!(again.headers().contains_key(header::CONTENT_SECURITY_POLICY));
        assert_eq!(serve("../Cargo.toml", &HeaderMap::new()).status(), StatusCode::NOT_FOUND);
    }
}
