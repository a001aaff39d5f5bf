//! Nobody reads tokens on the way.

use crate::collector::{Collector, client, eventually, get, program, said};
use crate::world::World;
use http::StatusCode;
use std::path::Path;
use std::process::Command;

/// The certificate in DER of one in PEM.
fn der(pem: &Path) -> Vec<u8> {
    let mut openssl = Command::new("openssl");
    let output = openssl.args(["x509", "-outform", "DER", "-in"]).arg(pem).output().expect("openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn the_charts_certificate_is_served_and_read_again_when_it_changes() {
    let world = World::start().await;
    let (folder, arguments) = world.certificate("tls").await;
    let (chain, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let collector = Collector::start(&world, &arguments).await;
    let address = said(&collector.log, "reports are taken").expect("log")["address"].clone();
    let url = format!("https://{}", address.as_str().expect("address"));
    let trusts = |authority: Vec<u8>| {
        let url = url.clone();
        async move { get(&client(&url, Some(authority)), "/healthz").await }
    };
    let chart = der(&folder.join("ca.crt"));
    let (status, _) = trusts(chart.clone()).await.expect("by the chart's authority");
    assert_eq!(status, StatusCode::OK);
    let plain = get(&client(&url.replace("https", "http"), None), "/healthz").await;
    assert!(plain.is_err(), "not in plain text: {plain:?}");

    // Another certificate, for the same names.
    let mut openssl = Command::new("openssl");
    openssl.current_dir(&folder).args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
    openssl.args([
        "-subj",
        "/CN=other",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]);
    let output = openssl.args(["-keyout", "new.key", "-out", "new.crt"]).output().expect("openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let new = der(&folder.join("new.crt"));
    assert!(trusts(new.clone()).await.is_err(), "it is not in use yet");
    // First without its key: the one before stays.
    std::fs::copy(folder.join("new.crt"), &chain).expect("copy");
    eventually("it is tried", async || {
        match collector.metric("aegis_collector_certificate_failures_total").await {
            0.0 => Err("not yet".into()),
            _ => Ok(()),
        }
    })
    .await;
    assert!(trusts(chart.clone()).await.is_ok(), "the one before stays");
    std::fs::copy(folder.join("new.key"), &key).expect("copy");
    eventually("it is in use", async || trusts(new.clone()).await.map_err(|error| error.to_string())).await;
    assert!(trusts(chart).await.is_err(), "the one before is gone");
}

#[test]
fn tokens_are_not_taken_in_plain_text_from_elsewhere() {
    let mut program = Command::new(program());
    program.env("AEGIS_DATABASE", "/nonexistent/use.db").env("KUBECONFIG", "/nonexistent");
    let output = program.arg("--listen=0.0.0.0:0").output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("must not be sent in plain text"), "{text}");
    let mut help = Command::new(crate::collector::program());
    let output = help.arg("--help").env("AEGIS_DATABASE", "postgres://a:sesame@b/c").output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("AEGIS_DATABASE") && !text.contains("sesame"), "{text}");
}
