//! Do the gateways answer? The data plane of each sends a probe back by itself, so that an agent that is away does not
//! look like a node that is.

use crate::geneve;
use aegis_common::{VNI_PROBE, VNI_PROBE_ANSWER};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two probes of a gateway.
pub const INTERVAL: Duration = Duration::from_millis(200);
/// Time for the answer to the last probe before a gateway is judged; those to the others have had longer.
const WAIT: Duration = Duration::from_millis(100);
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
    /// What it was found to be; unknown until it has answered, or has not.
    answer: Option<Answer>,
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
            self.seen.entry(*gateway).or_insert(Seen { answer: None, unanswered: 0, last: now });
        }
    }

    /// Those to send a probe to.
    pub fn probe(&mut self) -> Vec<Ipv4Addr> {
        for seen in self.seen.values_mut() {
            seen.unanswered = seen.unanswered.saturating_add(1);
        }
        self.seen.keys().copied().collect()
    }

    /// A gateway has answered.
    pub fn answered(&mut self, gateway: Ipv4Addr, now: Instant) {
        if let Some(seen) = self.seen.get_mut(&gateway) {
            *seen = Seen { answer: Some(Answer::Prompt), unanswered: 0, last: now };
        }
    }

    /// Finds out who does not answer: [`WAIT`] after a probe and again before the next, once every answer that has arrived
    /// is taken in. After a pause in which this node itself stood still (frozen, or short of CPU) nothing is held against
    /// anybody.
    pub fn judge(&mut self, since_last: Duration, now: Instant) {
        let stood_still = since_last > 3 * INTERVAL;
        for seen in self.seen.values_mut() {
            if stood_still && !matches!(seen.answer, Some(Answer::Silent | Answer::Lost)) {
                *seen = Seen { unanswered: 0, last: now, ..*seen };
            }
            if seen.unanswered >= MISSED {
                let lost = now.saturating_duration_since(seen.last) >= LOST;
                seen.answer = Some(if lost { Answer::Lost } else { Answer::Silent });
            }
        }
    }

    /// How those answer of which that is known.
    pub fn answers(&self) -> BTreeMap<Ipv4Addr, Answer> {
        self.seen.iter().filter_map(|(gateway, seen)| Some((*gateway, seen.answer?))).collect()
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
        self.with(|all| all.answers())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Gateways) -> T) -> T {
        work(&mut self.gateways.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Probes without end, on a thread of its own: whatever else the agent does must not delay it. `changed` is called when
    /// a gateway answers that did not, or the other way round. Ends only if the socket fails.
    pub fn run(&self, tunnel_port: u16, changed: impl Fn()) -> io::Error {
        let socket = match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)) {
            Ok(socket) => socket,
            Err(error) => return error,
        };
        let probe = geneve::header(VNI_PROBE);
        let (mut known, mut judged) = (BTreeMap::new(), Instant::now());
        let mut tell = || {
            let answers = self.answers();
            if answers != known {
                log_changes(&known, &answers);
                known = answers;
                changed();
            }
        };
        loop {
            for gateway in self.with(Gateways::probe) {
                // What cannot be sent is not answered, which is what counts.
                let _ = socket.send_to(&probe, SocketAddrV4::new(gateway, tunnel_port));
            }
            for pause in [WAIT, INTERVAL - WAIT] {
                let end = Instant::now() + pause;
                loop {
                    match self.take_in(&socket, tunnel_port, end) {
                        Ok(true) => tell(),
                        Ok(false) => break,
                        Err(error) => return error,
                    }
                }
                let now = Instant::now();
                self.with(|all| all.judge(now - std::mem::replace(&mut judged, now), now));
                tell();
            }
        }
    }

    /// Takes in one datagram. False if there is none and it is `end` or later: what has arrived by then counts, however late
    /// this thread gets to run.
    fn take_in(&self, socket: &UdpSocket, tunnel_port: u16, end: Instant) -> io::Result<bool> {
        let left = end.saturating_duration_since(Instant::now());
        socket.set_nonblocking(left.is_zero())?;
        if !left.is_zero() {
            socket.set_read_timeout(Some(left))?;
        }
        let mut buffer = [0; 64];
        match socket.recv_from(&mut buffer) {
            Ok((length, SocketAddr::V4(from))) => {
                if buffer.get(..length) == Some(&geneve::header(VNI_PROBE_ANSWER))
                    && from.port() == tunnel_port
                {
                    self.with(|all| all.answered(*from.ip(), Instant::now()));
                }
                Ok(true)
            }
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            // It may have waited, and what came meanwhile must be looked for once more.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(!left.is_zero()),
            Err(error) => Err(error),
        }
    }
}

fn log_changes(before: &BTreeMap<Ipv4Addr, Answer>, now: &BTreeMap<Ipv4Addr, Answer>) {
    for (gateway, answer) in now {
        match (before.get(gateway), answer) {
            (before, now) if before == Some(now) => {}
            (None, Answer::Prompt) => {}
            (Some(_), Answer::Prompt) => tracing::info!(node = %gateway, "a node answers probes again"),
            _ => tracing::warn!(node = %gateway, ?answer, "a node does not answer probes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    /// Probes every 200 ms from `from` on; those in `answers` answer each. The last one has had its time at the end.
    fn probe(gateways: &mut Gateways, from: Instant, count: u32, answers: &[Ipv4Addr]) -> Instant {
        let mut now = from;
        for _ in 0..count {
            for gateway in gateways.probe() {
                if answers.contains(&gateway) {
                    gateways.answered(gateway, now);
                }
            }
            for _ in 0..2 {
                now += INTERVAL / 2;
                gateways.judge(INTERVAL / 2, now);
            }
        }
        now
    }

    fn silent(gateways: &Gateways) -> BTreeMap<Ipv4Addr, Answer> {
        gateways.answers().into_iter().filter(|(_, answer)| *answer != Answer::Prompt).collect()
    }

    #[test]
    fn nothing_is_known_of_a_gateway_that_is_new() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A, B].into(), start);
        assert_eq!(gateways.answers(), [].into(), "what an agent before knew of it stays");
        probe(&mut gateways, start, 2, &[B]);
        assert_eq!(gateways.answers(), [(B, Answer::Prompt)].into());
    }

    #[test]
    fn three_unanswered_probes_make_a_gateway_silent_and_five_seconds_lost() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A, B].into(), start);
        let now = probe(&mut gateways, start, 2, &[B]);
        assert_eq!(silent(&gateways), [].into());
        gateways.probe();
        assert_eq!(silent(&gateways), [].into(), "the third may still be answered");
        gateways.judge(WAIT, now + WAIT);
        assert_eq!(silent(&gateways), [(A, Answer::Silent)].into(), "B has answered since the second");
        let now = probe(&mut gateways, now, 22, &[B]);
        assert_eq!(silent(&gateways), [(A, Answer::Silent)].into());
        let now = probe(&mut gateways, now, 1, &[B]);
        assert_eq!(silent(&gateways), [(A, Answer::Lost)].into());
        gateways.answered(A, now);
        assert_eq!(silent(&gateways), [].into(), "one answer is enough");
    }

    #[test]
    fn who_stands_still_blames_nobody() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A].into(), start);
        let mut now = start;
        for _ in 0..10 {
            now += Duration::from_secs(2);
            gateways.probe();
            gateways.judge(Duration::from_secs(2), now);
        }
        assert_eq!(silent(&gateways), [].into());
        let now = probe(&mut gateways, now, 3, &[]);
        assert_eq!(silent(&gateways), [(A, Answer::Silent)].into());
        gateways.judge(Duration::from_secs(2), now);
        assert_eq!(silent(&gateways), [(A, Answer::Silent)].into(), "but a silent one stays so");
    }

    #[test]
    fn what_arrived_while_the_prober_did_not_run_counts() {
        let answering = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = answering.local_addr().unwrap().port();
        let prober = Prober::default();
        prober.watch(&[Ipv4Addr::LOCALHOST].into());
        for _ in 0..MISSED {
            prober.with(Gateways::probe);
            answering.send_to(&geneve::header(VNI_PROBE_ANSWER), socket.local_addr().unwrap()).unwrap();
        }
        // Its time is over before it gets to look.
        let end = Instant::now();
        while prober.take_in(&socket, port, end).unwrap() {}
        prober.with(|all| all.judge(WAIT, Instant::now()));
        assert_eq!(prober.answers(), [(Ipv4Addr::LOCALHOST, Answer::Prompt)].into());
        // What comes while it waits is taken in, and then it stops waiting.
        answering.send_to(&geneve::header(VNI_PROBE_ANSWER), socket.local_addr().unwrap()).unwrap();
        let end = Instant::now() + Duration::from_millis(20);
        while prober.take_in(&socket, port, end).unwrap() {}
        assert!(Instant::now() >= end);
    }

    #[test]
    fn a_gateway_is_probed_every_200_ms_and_silent_after_the_third() {
        let gateway = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = gateway.local_addr().unwrap().port();
        let prober = Prober::default();
        prober.watch(&[Ipv4Addr::LOCALHOST].into());
        let (tell, told) = std::sync::mpsc::channel();
        let (background, start) = (prober.clone(), Instant::now());
        // It goes on until the process ends.
        std::thread::spawn(move || {
            background.run(port, || drop(tell.send((background.answers(), start.elapsed()))))
        });
        let mut buffer = [0; 64];
        let (length, from) = gateway.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], geneve::header(VNI_PROBE));
        gateway.send_to(&geneve::header(VNI_PROBE_ANSWER), from).unwrap();
        let expect = |answer, not_before: Duration| {
            let (answers, after) = told.recv().unwrap();
            assert_eq!(answers, [(Ipv4Addr::LOCALHOST, answer)].into());
            assert!(after >= not_before, "{answer:?} after {after:?}");
        };
        expect(Answer::Prompt, Duration::ZERO);
        expect(Answer::Silent, 3 * INTERVAL + WAIT);
    }

    #[test]
    fn a_gateway_that_is_not_used_any_more_is_forgotten() {
        let start = Instant::now();
        let mut gateways = Gateways::default();
        gateways.watch(&[A].into(), start);
        let now = probe(&mut gateways, start, 5, &[]);
        gateways.watch(&[B].into(), now);
        assert_eq!(silent(&gateways), [].into());
        assert_eq!(gateways.probe(), [B]);
        gateways.answered(A, now);
        assert_eq!(gateways.probe(), [B], "nor does an answer bring it back");
    }
}
