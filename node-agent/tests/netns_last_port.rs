//! Real connections up to the very last port of a node.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::Timeouts;
use netns_support::path::{Aegis, Row};
use netns_support::traffic::{Origin, connect, many_files};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

const PORT: u16 = 8080;
/// Patience with which a connection is waited for: what is refused is refused at once.
const LONG: Duration = Duration::from_secs(10);

#[test]
fn all_of_4096_ports_are_used_and_the_next_connection_is_refused() {
    many_files();
    let row = Row::new();
    let _aegis = Aegis::on(&row, 4 + 15, Timeouts { tcp_closed: 1, rest: 1, ..Timeouts::default() });
    let _origin = Origin::on(&row.origin, PORT);
    row.pod.enter(|| {
        let mut open: Vec<TcpStream> = (0..4096)
            .map(|number| connect(PORT, LONG).unwrap_or_else(|error| panic!("connection {number}: {error}")))
            .collect();
        let refused = || {
            for _ in 0..10 {
                assert_eq!(connect(PORT, LONG).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            }
        };
        refused();
        // Each port that is closed comes back, and nothing else does.
        open.drain(..100);
        let end = Instant::now() + Duration::from_secs(60);
        while open.len() < 4096 {
            match connect(PORT, LONG) {
                Ok(stream) => open.push(stream),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    assert!(Instant::now() < end, "{} of 4096 are open again", open.len());
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        refused();
    });
}
