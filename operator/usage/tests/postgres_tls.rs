//! TLS to PostgreSQL: whom the store believes. A server of its own on loopback, with a certificate of a test's authority.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod support;

use aegis_usage::{Address, Error, PostgresTls, SslMode, Store};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::server::Server;
use tempfile::TempDir;

/// The name in the server's certificate. Nobody resolves it: addresses are given beside it.
const NAME: &str = "db.example.com";

fn openssl(folder: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").current_dir(folder).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority: `NAME.crt` and `NAME.key`.
fn authority(folder: &Path, name: &str) {
    let (crt, key, subject) = (format!("{name}.crt"), format!("{name}.key"), format!("/CN={name}"));
    let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let rest = ["-subj", &subject, "-keyout", &key, "-out", &crt];
    openssl(folder, &[&["req", "-x509"][..], &curve, &rest].concat());
}

/// A certificate of `authority` for a name: `FILE.crt` and `FILE.key`.
fn certificate(folder: &Path, authority: &str, file: &str, name: &str) {
    let [crt, key, csr, ext] = ["crt", "key", "csr", "ext"].map(|it| format!("{file}.{it}"));
    let [by, of] = ["crt", "key"].map(|it| format!("{authority}.{it}"));
    let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let subject = format!("/CN={name}");
    openssl(folder, &[&["req"][..], &curve, &["-subj", &subject, "-keyout", &key, "-out", &csr]].concat());
    std::fs::write(folder.join(&ext), format!("subjectAltName=DNS:{name}\nbasicConstraints=CA:FALSE\n"))
        .unwrap();
    let sign = ["x509", "-req", "-in", &csr, "-CA", &by, "-CAkey", &of, "-CAcreateserial", "-days", "2"];
    openssl(folder, &[&sign[..], &["-extfile", &ext, "-out", &crt]].concat());
    std::fs::set_permissions(folder.join(key), std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Authorities, and certificates of the right one for the server and for a client.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Files {
        let folder = support::folder("postgres-tls");
        authority(folder.path(), "right");
        authority(folder.path(), "wrong");
        certificate(folder.path(), "right", "server", NAME);
        certificate(folder.path(), "right", "client", "aegis");
        Files { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A port that nobody has.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server that answers on loopback, too: with TLS if there are `files`.
fn server(files: Option<&Files>) -> (Server, u16) {
    let port = port();
    let mut settings = vec!["fsync=off".into(), "listen_addresses=127.0.0.1".into(), format!("port={port}")];
    if files.is_some() {
        // Beside its data, where it runs.
        settings.extend(
            ["ssl=on", "ssl_cert_file=../server.crt", "ssl_key_file=../server.key"].map(String::from),
        );
        settings.push("ssl_ca_file=../right.crt".into());
    }
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let server = Server::prepared(&settings, |folder| {
        let Some(files) = files else { return };
        for name in ["server.crt", "server.key", "right.crt"] {
            std::fs::copy(files.path(name), folder.join(name)).unwrap();
        }
    });
    (server.expect("PostgreSQL is not installed (apt-get install postgresql): these tests need it"), port)
}

fn open(port: u16, host: &str, options: &str, otherwise: &PostgresTls) -> Result<Store, Error> {
    let text = format!(
        "host={host} hostaddr=127.0.0.1 port={port} user=aegis password=sesame dbname=postgres {options}"
    );
    Store::postgres_at(Address::parse(&text, otherwise)?, support::PATIENCE)
}

fn refused(port: u16, host: &str, options: &str, remedy: &str) {
    let Err(error) = open(port, host, options, &PostgresTls::default()) else {
        panic!("{host} {options}: it is believed");
    };
    let text = error.to_string();
    assert!(text.contains(remedy), "{host} {options}: {text}");
    assert!(!format!("{text} {error:?}").contains("sesame"), "{error:?}");
}

fn believed(port: u16, host: &str, options: &str) -> Store {
    let opened = open(port, host, options, &PostgresTls::default());
    opened.unwrap_or_else(|error| panic!("{host} {options}: {error}"))
}

/// One test, since it takes two servers. What fails is named by its own message.
#[test]
fn a_server_is_believed_as_far_as_is_said() {
    let files = Files::new();
    let [right, wrong] = ["right.crt", "wrong.crt"].map(|it| files.path(it).display().to_string());
    let (with, port) = server(Some(&files));
    // Without a word it is verified in full; by authorities of the system here, and the test's is none of those.
    refused(port, NAME, "", "sslrootcert");
    refused(port, NAME, &format!("sslrootcert={wrong}"), "name the file of the authority");
    refused(port, "other.example.com", &format!("sslrootcert={right}"), "subjectAltName");
    refused(port, NAME, &format!("sslmode=verify-ca sslrootcert={wrong}"), "name the file of the authority");
    refused(port, NAME, &format!("sslmode=require sslrootcert={wrong}"), "name the file of the authority");
    refused(port, NAME, "sslmode=verify-ca", "believes everybody");
    refused(port, NAME, "sslrootcert=/nonexistent/ca.crt", "/nonexistent/ca.crt");
    refused(port, NAME, &format!("sslrootcert={right} sslcert={right}"), "go together");
    for (host, options) in [
        (NAME, format!("sslrootcert={right}")),
        (NAME, format!("sslmode=verify-full sslrootcert={right} channel_binding=require")),
        ("other.example.com", format!("sslmode=verify-ca sslrootcert={right}")),
        ("other.example.com", format!("sslmode=require sslrootcert={right}")),
        ("other.example.com", "sslmode=require".into()),
        (NAME, "sslmode=prefer".into()),
        (NAME, "sslmode=disable".into()),
    ] {
        if options.contains("channel_binding") {
            // With a password that is checked, which binds it to the connection.
            with.run("ALTER ROLE aegis PASSWORD 'sesame'");
            with.only("hostssl all all 127.0.0.1/32 scram-sha-256");
        }
        drop(believed(port, host, &options));
        with.only("host all all 127.0.0.1/32 trust");
    }
    // What flags say, where the connection string does not.
    let flags = PostgresTls {
        sslmode: Some(SslMode::VerifyFull),
        sslrootcert: Some(files.path("right.crt")),
        sslcert: Some(files.path("client.crt")),
        sslkey: Some(files.path("client.key")),
    };
    with.only("hostssl all all 127.0.0.1/32 cert");
    let store = open(port, NAME, "", &flags).unwrap();
    assert!(store.ingest(&[support::report("n", 0, vec![])], support::T0 + 10).is_ok());
    // The connections that read are encrypted, too: no other gets in.
    assert_eq!(store.contents().unwrap().newest, Some(support::T0 + 10));
    drop(store);
    refused(port, NAME, "sslmode=disable", "take sslmode=disable away");
    drop(with);

    let (_without, port) = server(None);
    for options in ["", "sslmode=require", "sslmode=verify-full"] {
        refused(port, NAME, options, "ssl = on");
    }
    for options in ["sslmode=prefer", "sslmode=disable"] {
        drop(believed(port, NAME, options));
    }
}

#[test]
fn a_server_without_tls_is_told_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 8];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(b"N").unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        (request, rest)
    });
    refused(port, NAME, "", "ssl = on");
    // It asked for TLS, and left.
    assert_eq!(heard.join().unwrap(), ([0, 0, 0, 8, 4, 210, 22, 47], vec![]));
}
