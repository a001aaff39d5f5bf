//! Do the gateways answer? The data plane of each sends a probe back by itself, so that an agent that is away does not
//! look like a node that is.

use aegis_common::{VNI_PROBE, VNI_PROBE_ANSWER};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;

/// Time between two probes of a gateway.
pub const INTERVAL: Duration = Duration::from_millis(200);
/// Probes without an answer after which a gateway counts as silent.
const MISSED: u32 = 3;
/// Silence after which a gateway counts as lost.
const LOST: Duration = Duration::from_secs(5);

/// How a gateway answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does.
    Prompt,
    /// Not to the last probes: new flows take another.
    Silent,
    /// For so long that its flows are given up.
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// It has answered since it became one of ours.
    answered: bool,
    /// Probes since the last answer.
    unanswered: u32,
    /// When it answered last, or became one of ours.
    last: Instant,
}

/// What is known of the gateways. Pure: time is passed in.
#[derive(Clone, Debug, Default)]
pub struct Gateways {
    seen: BTreeMap<Ipv4Addr, Seen>,
}

impl Gateways {
    /// Probes these from now on. Of one that is new nothing is known until it has answered, or has not.
    pub fn watch(&mut self, gateways: &BTreeSet<Ipv4Addr>, now: Instant) {
        self.seen.retain(|gateway, _| gateways.contains(gateway));
        for gateway in gateways {
            self.seen.entry(*gateway).or_insert(Seen { answered: false, unanswered: 0, last: now });
        }
    }

    /// Those to send a probe to. After a pause in which this node itself stood still (frozen, or short of CPU) nothing is
    /// held against anybody.
    pub fn probe(&mut self, since_last: Duration, now: Instant) -> Vec<Ipv4Addr> {
        let stood_still = since_last > 3 * INTERVAL;
        for seen in self.seen.values_mut() {
            if stood_still && seen.unanswered < MISSED {
                *seen = Seen { unanswered: 0, last: now, ..*seen };
            }
            seen.unanswered = seen.unanswered.saturating_add(1);
        }
        self.seen.keys().copied().collect()
    }

    /// A gateway has answered.
    pub fn answered(&mut self, gateway: Ipv4Addr, now: Instant) {
        if let Some(seen) = self.seen.get_mut(&gateway) {
            *seen = Seen { answered: true, unanswered: 0, last: now };
        }
    }

    /// How those answer of which that is known.
    pub fn answers(&self, now: Instant) -> BTreeMap<Ipv4Addr, Answer> {
        self.seen.iter().filter_map(|(gateway, seen)| Some((*gateway, judge(seen, now)?))).collect()
    }
}

fn judge(seen: &Seen, now: Instant) -> Option<Answer> {
    // The probe that was sent last is still under way.
    if seen.unanswered <= MISSED {
        seen.answered.then_some(Answer::Prompt)
    } else if now.saturating_duration_since(seen.last) < LOST {
        Some(Answer::Silent)
    } else {
        Some(Answer::Lost)
    }
}

/// Shared by the prober and the controller.
#[derive(Clone, Debug, Default)]
pub struct Prober {
    gateways: Arc<Mutex<Gateways>>,
}

impl Prober {
    /// See [`Gateways::watch`].
    pub fn watch(&self, gateways: &BTreeSet<Ipv4Addr>) {
        self.with(|all| all.watch(gateways, Instant::now()));
    }

    /// See [`Gateways::answers`].
    pub fn answers(&self) -> BTreeMap<Ipv4Addr, Answer> {
        self.with(|all| all.answers(Instant::now()))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Gateways) -> T) -> T {
        work(&mut self.gateways.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Probes without end; `changed` is called when a gateway answers that did not, or the other way round. Ends only if
    /// there can be no socket.
    pub async fn run(&self, tunnel_port: u16, changed: impl Fn()) -> std::io::Error {
        let socket = match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await {
            Ok(socket) => socket,
            Err(error) => return error,
        };
        let (message, answer) = (message(VNI_PROBE), message(VNI_PROBE_ANSWER));
        let mut timer = tokio::time::interval(INTERVAL);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut known, mut last) = (BTreeMap::new(), Instant::now());
        let mut buffer = [0; 64];
        loop {
            tokio::select! {
                _ = timer.tick() => {
                    let now = Instant::now();
                    let due = self.with(|all| all.probe(now - std::mem::replace(&mut last, now), now));
                    for gateway in due {
                        // What cannot be sent is not answered, which is what counts.
                        let _ = socket.send_to(&message, SocketAddrV4::new(gateway, tunnel_port)).await;
                    }
                }
                received = socket.recv_from(&mut buffer) => {
                    let Ok((length, std::net::SocketAddr::V4(from))) = received else { continue };
                    if buffer.get(..length) == Some(answer.as_slice()) && from.port() == tunnel_port {
                        self.with(|all| all.answered(*from.ip(), Instant::now()));
                    }
                }
            }
            let answers = self.answers();
            if answers != known {
                for (gateway, answer) in &answers {
                    match (known.get(gateway), answer) {
                        (before, now) if before == Some(now) => {}
                        (None, Answer::Prompt) => {}
                        (Some(_), Answer::Prompt) => tracing::info!(%gateway, "a gateway answers again"),
                        _ => tracing::warn!(%gateway, ?answer, "a gateway does not answer"),
                    }
                }
                known = answers;
                changed();
            }
        }
    }
}

/// A Geneve header (RFC 8926) without anything behind it.
fn message(vni: u32) -> [u8; 8] {
    let mut message = [0, 0, 0x08, 0, 0, 0, 0, 0];
    message[4..].copy_from_slice(&(vni << 8).to_be_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    /// Probes every 200 ms from `from` on; those in `answers` answer each.
    fn probe(gateways: &mut Gateways, from: Instant, count: u32, answers: &[Ipv4Addr]) -> Instant {
        let mut now = from;
        for _ in 0..count {
            now += INTERVAL;
            for gateway in gateways.probe(INTERVAL, now) {
                if answers.contains(&gateway) {
                    gateways.answered(gateway, now);
                }
            }
        }
        now
    }

    fn silent(gateways: &Gateways, now: Instant) -> BTreeMap<Ipv4Addr, Answer> {
        gateways.answers(now).into_iter().filter(|(_, answer)| *answer != Answer::Prompt).collect()
    }

    #[test]
    fn nothing_is_known_of_a_gateway_that_is_new() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A, B].into(), start);
        assert_eq!(gateways.answers(start), [].into(), "what an agent before knew of it stays");
        let now = probe(&mut gateways, start, 2, &[B]);
        assert_eq!(gateways.answers(now), [(B, Answer::Prompt)].into());
    }

    #[test]
    fn three_unanswered_probes_make_a_gateway_silent_and_five_seconds_lost() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A, B].into(), start);
        let now = probe(&mut gateways, start, 3, &[B]);
        assert_eq!(silent(&gateways, now), [].into(), "the third may still be answered");
        let now = probe(&mut gateways, now, 1, &[B]);
        assert_eq!(silent(&gateways, now), [(A, Answer::Silent)].into());
        let now = probe(&mut gateways, now, 20, &[B]);
        assert_eq!(silent(&gateways, now), [(A, Answer::Silent)].into());
        let now = probe(&mut gateways, now, 2, &[B]);
        assert_eq!(silent(&gateways, now), [(A, Answer::Lost)].into());
        gateways.answered(A, now);
        assert_eq!(silent(&gateways, now), [].into(), "one answer is enough");
    }

    #[test]
    fn who_stands_still_blames_nobody() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A].into(), start);
        let mut now = start;
        for _ in 0..10 {
            now += Duration::from_secs(2);
            gateways.probe(Duration::from_secs(2), now);
        }
        assert_eq!(silent(&gateways, now), [].into());
        let now = probe(&mut gateways, now, 4, &[]);
        assert_eq!(silent(&gateways, now), [(A, Answer::Silent)].into());
        gateways.probe(Duration::from_secs(2), now);
        assert_eq!(silent(&gateways, now), [(A, Answer::Silent)].into(), "but a silent one stays so");
    }

    #[test]
    fn a_gateway_that_is_not_used_any_more_is_forgotten() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A].into(), start);
        let now = probe(&mut gateways, start, 5, &[]);
        gateways.watch(&[B].into(), now);
        assert_eq!(silent(&gateways, now), [].into());
        assert_eq!(gateways.probe(INTERVAL, now), [B]);
        gateways.answered(A, now);
        assert_eq!(gateways.probe(INTERVAL, now), [B], "nor does an answer bring it back");
    }
}
