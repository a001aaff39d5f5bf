//! Asking a routing daemon by its socket: answers that come in pieces, a daemon that is frozen, one that is not there.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

use aegis_core::egress::Egress;
use aegis_node_agent::announce::daemon::{DaemonError, bird, frr};
use std::net::Ipv4Addr;
use std::path::Path;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

const A: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 1));
const B: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 2));
/// 2001:db8:1:2::/64
const C: Egress = Egress::V6(0x2001_0db8_0001_0002);

/// A folder of its own, removed at the end.
fn folder() -> TempDir {
    tempfile::Builder::new().prefix("aegis-daemon-").tempdir().unwrap()
}

/// Greets, and answers each command (up to the byte `end`) byte by byte.
fn serve(
    path: &Path,
    greeting: &'static str,
    end: u8,
    answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(greeting.as_bytes()).await.unwrap();
            let mut command = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                if byte != end {
                    command.push(byte);
                    continue;
                }
                for byte in answer(&String::from_utf8(std::mem::take(&mut command)).unwrap()) {
                    stream.write_all(&[byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
        }
    });
}

fn bgpd(command: &str) -> Vec<u8> {
    let text = match command {
        "show bgp ipv4 unicast summary json" => r#"{"peers":{"192.0.2.254":{"state":"Established"}}}"#,
        // The same session, and one for IPv6 only.
        "show bgp ipv6 unicast summary json" => {
            r#"{"peers":{"192.0.2.254":{"state":"Established"},"2001:db8::fe":{"state":"Active"}}}"#
        }
        "show bgp ipv6 unicast 2001:db8:1:2::/64 json" => r#"{"advertisedTo":{"192.0.2.254":{}},"paths":[]}"#,
        "show bgp ipv4 unicast 203.0.113.1/32 json" => r#"{"advertisedTo":{"192.0.2.254":{}},"paths":[]}"#,
        _ => "{\n}\n",
    };
    [text.as_bytes(), &[0, 0, 0, 0]].concat()
}

#[tokio::test]
async fn frr_tells_what_it_announces_unless_one_of_its_daemons_is_frozen() {
    let folder = folder();
    let path = folder.path();
    serve(&path.join("bgpd.vty"), "", 0, bgpd);
    let absent = frr(path, &[A]).await.unwrap_err();
    assert!(matches!(absent, DaemonError::Absent("zebra", _)), "{absent}");
    let zebra = |_: &str| b"FRRouting\0\0\0\0".to_vec();
    serve(&path.join("zebra.vty"), "", 0, zebra);
    let answer = frr(path, &[A, B, C]).await.unwrap();
    let sessions: Vec<(&str, bool)> = answer.sessions.iter().map(|it| (it.name.as_str(), it.up)).collect();
    assert_eq!(sessions, [("192.0.2.254", true), ("2001:db8::fe", false)]);
    assert_eq!(answer.announced, [A, C].into());
    // The kernel takes the connection for a process that is stopped.
    let _frozen = UnixListener::bind(path.join("bfdd.vty")).unwrap();
    let silent = frr(path, &[A]).await.unwrap_err();
    assert!(matches!(silent, DaemonError::Silent("bfdd")), "{silent}");
}

fn bird_answer(command: &str) -> Vec<u8> {
    let text = match command {
        "show protocols" => {
            "2002-Name Proto Table State Since Info\n1002-up BGP --- up 12:00 Established\n down BGP --- start 12:00 Idle\n0000 \n"
        }
        "show route 2001:db8:1:2::/64 export up" => {
            "1007-Table six:\n 2001:db8:1:2::/64    blackhole [k] * (10)\n0000 \n"
        }
        "show route 203.0.113.1/32 export up" => {
            "1007-Table t:\n 203.0.113.1/32       blackhole [k] * (10)\n0000 \n"
        }
        _ => "8001 Network not found\n",
    };
    text.as_bytes().to_vec()
}

#[tokio::test]
async fn bird_tells_what_it_announces() {
    let folder = folder();
    serve(&folder.path().join("bird.ctl"), "0001 BIRD 2.0.12 ready.\n", b'\n', bird_answer);
    let answer = bird(folder.path(), &[A, B, C]).await.unwrap();
    assert_eq!(
        answer.sessions.iter().map(|it| (it.name.as_str(), it.up)).collect::<Vec<_>>(),
        [("up", true), ("down", false)]
    );
    assert_eq!(answer.announced, [A, C].into());
    let other = self::folder();
    assert!(matches!(bird(other.path(), &[A]).await.unwrap_err(), DaemonError::Absent("BIRD", _)));
}
