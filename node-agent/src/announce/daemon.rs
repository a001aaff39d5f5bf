//! Asking FRR and BIRD by their own sockets: whether they answer, which sessions they have, what they announce.

use aegis_core::egress::{Egress, Family};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest time that a daemon may take for all that one look asks. A frozen one still accepts connections.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// A BGP session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Session {
    /// Neighbour's address (FRR) or the protocol's name (BIRD).
    pub name: String,
    /// It is established.
    pub up: bool,
}

/// What a routing daemon says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its BGP sessions.
    pub sessions: Vec<Session>,
    /// Of the addresses that were asked for, those that it announces to somebody.
    pub announced: BTreeSet<Egress>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The socket is not there, or nobody listens.
    #[error("{0} does not run: {1}")]
    Absent(&'static str, std::io::Error),
    /// It did not answer in time.
    #[error("{0} does not answer")]
    Silent(&'static str),
    /// The answer could not be read.
    #[error("{0} says what this agent does not understand: {1}")]
    Answer(&'static str, String),
}

/// Asks FRR: zebra, bgpd, and bfdd if it has been started.
pub async fn frr(folder: &Path, ask_for: &[Egress]) -> Result<Answer, DaemonError> {
    // Of a frozen zebra nobody else takes notice: sessions stay, and routes are not withdrawn.
    let zebra = within("zebra", async {
        let mut zebra = Vty::open("zebra", &folder.join("zebra.vty")).await?;
        zebra.ask("show version").await.map(drop)
    });
    let bfdd = within("bfdd", async {
        let path = folder.join("bfdd.vty");
        if !path.exists() {
            return Ok(());
        }
        Vty::open("bfdd", &path).await?.ask("show version").await.map(drop)
    });
    let bgpd = within("bgpd", async {
        let mut bgpd = Vty::open("bgpd", &folder.join("bgpd.vty")).await?;
        let mut sessions = BTreeSet::new();
        for family in Family::ALL.map(word) {
            // One with both families is in both answers.
            sessions
                .extend(frr_sessions(&bgpd.ask(&format!("show bgp {family} unicast summary json")).await?)?);
        }
        let mut announced = BTreeSet::new();
        for egress in ask_for {
            let (family, range) = (word(egress.family()), egress.range());
            let answer = bgpd.ask(&format!("show bgp {family} unicast {range} json")).await?;
            if is_advertised(&answer)? {
                announced.insert(*egress);
            }
        }
        Ok(Answer { sessions: sessions.into_iter().collect(), announced })
    });
    let ((), (), answer) = tokio::try_join!(zebra, bfdd, bgpd)?;
    Ok(answer)
}

/// A family as FRR calls it.
fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

async fn within<T>(
    name: &'static str,
    work: impl Future<Output = Result<T, DaemonError>>,
) -> Result<T, DaemonError> {
    tokio::time::timeout(TIMEOUT, work).await.map_err(|_| DaemonError::Silent(name))?
}

/// The terminal socket of an FRR daemon: commands end with a zero byte, answers with three and a status.
struct Vty {
    name: &'static str,
    stream: UnixStream,
}

impl Vty {
    async fn open(name: &'static str, path: &Path) -> Result<Vty, DaemonError> {
        let stream = UnixStream::connect(path).await.map_err(|error| DaemonError::Absent(name, error))?;
        Ok(Vty { name, stream })
    }

    async fn ask(&mut self, command: &str) -> Result<String, DaemonError> {
        let ended = |bytes: &[u8]| bytes.len() >= 4 && bytes[bytes.len() - 4..bytes.len() - 1] == [0, 0, 0];
        let mut answer =
            exchange(self.name, &mut self.stream, format!("{command}\0").as_bytes(), ended).await?;
        answer.truncate(answer.len() - 4);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Sends a command and reads until `ended` finds the end of the answer.
async fn exchange(
    name: &'static str,
    stream: &mut UnixStream,
    command: &[u8],
    ended: impl Fn(&[u8]) -> bool,
) -> Result<Vec<u8>, DaemonError> {
    let broken = |error| DaemonError::Absent(name, error);
    stream.write_all(command).await.map_err(broken)?;
    let mut answer = Vec::new();
    while !ended(&answer) {
        if answer.len() > MAX_ANSWER {
            return Err(DaemonError::Answer(name, format!("more than {MAX_ANSWER} bytes")));
        }
        if stream.read_buf(&mut answer).await.map_err(broken)? == 0 {
            return Err(DaemonError::Absent(name, std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(answer)
}

#[derive(Deserialize)]
struct Summary {
    #[serde(default)]
    peers: BTreeMap<String, Peer>,
}

#[derive(Deserialize)]
struct Peer {
    state: String,
}

/// `show bgp ipv4 unicast summary json`; `{}` before any neighbour is active in that family.
fn frr_sessions(answer: &str) -> Result<Vec<Session>, DaemonError> {
    let summary: Summary =
        serde_json::from_str(answer).map_err(|error| DaemonError::Answer("bgpd", error.to_string()))?;
    let session = |(name, peer): (String, Peer)| Session { name, up: peer.state == "Established" };
    Ok(summary.peers.into_iter().map(session).collect())
}

/// `show bgp ipv4 unicast X json`; `{}` for a route that bgpd does not have.
fn is_advertised(answer: &str) -> Result<bool, DaemonError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Route {
        #[serde(default)]
        advertised_to: BTreeMap<String, serde::de::IgnoredAny>,
    }
    let route: Route =
        serde_json::from_str(answer).map_err(|error| DaemonError::Answer("bgpd", error.to_string()))?;
    Ok(!route.advertised_to.is_empty())
}

/// Asks BIRD.
pub async fn bird(folder: &Path, ask_for: &[Egress]) -> Result<Answer, DaemonError> {
    within("BIRD", async {
        let path = folder.join("bird.ctl");
        let mut stream =
            UnixStream::connect(&path).await.map_err(|error| DaemonError::Absent("BIRD", error))?;
        exchange("BIRD", &mut stream, b"", bird_ended).await?;
        let mut ask = async |command: String| {
            let answer = exchange("BIRD", &mut stream, command.as_bytes(), bird_ended).await?;
            Ok::<_, DaemonError>(String::from_utf8_lossy(&answer).into_owned())
        };
        let sessions = bird_sessions(&ask("show protocols\n".to_owned()).await?);
        let mut announced = BTreeSet::new();
        for egress in ask_for {
            let range = egress.range();
            for session in sessions.iter().filter(|session| session.up) {
                let answer = ask(format!("show route {range} export {}\n", session.name)).await?;
                if answer.contains(&format!(" {range} ")) {
                    announced.insert(*egress);
                    break;
                }
            }
        }
        Ok(Answer { sessions, announced })
    })
    .await
}

/// Whether the last line is the end of an answer: a code, a blank, and not a dash as on lines that go on.
fn bird_ended(answer: &[u8]) -> bool {
    let Some(text) = answer.strip_suffix(b"\n") else { return false };
    let line = text.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    line.len() >= 5 && line[..4].iter().all(u8::is_ascii_digit) && line[4] == b' '
}

/// `show protocols`: name, kind, table, state, since, and for a session its state.
fn bird_sessions(answer: &str) -> Vec<Session> {
    let lines = answer.lines().map(|line| {
        // Each line begins with a code and a dash, or with a blank if the code is that of the line before.
        let code = line.len() > 4 && line.as_bytes()[..4].iter().all(u8::is_ascii_digit);
        if code { &line[5..] } else { line }
    });
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (name, kind) = (words.next()?, words.next()?);
            let up = words.any(|word| word == "Established");
            (kind == "BGP").then(|| Session { name: name.to_owned(), up })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(name: &str, up: bool) -> Session {
        Session { name: name.to_owned(), up }
    }

    #[test]
    fn sessions_of_frr() {
        let answer = r#"{"routerId":"192.0.2.1","as":65001,"peers":{
            "192.0.2.254":{"state":"Established","pfxSnt":1},"192.0.2.253":{"state":"Active","pfxSnt":0}}}"#;
        let sessions = frr_sessions(answer).unwrap();
        assert_eq!(sessions, [session("192.0.2.253", false), session("192.0.2.254", true)]);
        assert_eq!(frr_sessions("{\n}\n").unwrap(), []);
        assert!(frr_sessions("% Unknown command").is_err());
    }

    #[test]
    fn a_route_is_announced_by_frr_once_a_neighbour_has_it() {
        assert!(!is_advertised("{\n}\n").unwrap());
        assert!(!is_advertised(r#"{"prefix":"203.0.113.7/32","paths":[{"valid":true}]}"#).unwrap());
        let told =
            r#"{"prefix":"203.0.113.7/32","advertisedTo":{"192.0.2.254":{"hostname":"r"}},"paths":[]}"#;
        assert!(is_advertised(told).unwrap());
    }

    #[test]
    fn sessions_of_bird() {
        let answer = "2002-Name       Proto      Table      State  Since         Info\n\
                      1002-device1    Device     ---        up     21:30:32.820  \n\
                      \u{20}upstream   BGP        ---        up     21:30:57.151  Established   \n\
                      \u{20}other      BGP        ---        start  21:30:33.128  Idle          Error: BFD session down\n\
                      0000 \n";
        assert_eq!(bird_sessions(answer), [session("upstream", true), session("other", false)]);
        assert!(bird_ended(answer.as_bytes()));
        assert!(!bird_ended(&answer.as_bytes()[..answer.len() - 6]), "without its last line");
        assert!(bird_ended(b"0001 BIRD 2.0.12 ready.\n") && bird_ended(b"8001 Network not found\n"));
        assert!(!bird_ended(b"") && !bird_ended(b"1007-Table aegis4:\n"));
    }
}
