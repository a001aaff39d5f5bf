//! Host names: a pod asks a resolver, and goes where the answer says. Real packets, the whole data plane, and the agent's own proxy.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::Timeouts;
use aegis_core::policy::names::{HostPattern, Limits};
use aegis_core::policy::{Pod, patterns};
use aegis_node_agent::apply::apply;
use aegis_node_agent::conntrack;
use aegis_node_agent::desired::{Inputs, desired};
use aegis_node_agent::names::{self, Names};
use aegis_node_agent::nft::Queries;
use aegis_node_agent::ops::{Known, transition};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use netns_support::path::{Aegis, EGRESS, NODE, ORIGIN, POD, Row, holding, inputs};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A resolver of the pod's own, which nobody has told the agent of.
const OTHER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);
const PORT: u16 = 9412;
const NAMELESS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(8);
const LIMITS: Limits = Limits { per_name: 256, total: 300, grace: 300 };

fn at(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, last)
}

/// What the resolver at the origin answers over UDP (`None`: nothing), and before it what somebody forges.
fn answer(query: &Message, tcp: bool, changing: &AtomicU8) -> (Vec<Message>, Option<Message>) {
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.add_queries(query.queries.clone());
    let question = &query.queries[0];
    let own = question.name.clone();
    let name = |text: &str| Name::from_ascii(text).unwrap();
    let mut add = |name: &Name, data| {
        if question.query_type == RecordType::A {
            message.add_answer(Record::from_rdata(name.clone(), 5, data));
        }
    };
    match own.to_lowercase().to_ascii().as_str() {
        "changing.test." => add(&own, RData::A(A(at(20 + changing.fetch_add(1, Ordering::AcqRel) % 100)))),
        "many.test." if !tcp => message.metadata.truncation = true,
        "many.test." => (1..=200).for_each(|last| add(&own, RData::A(A(Ipv4Addr::new(198, 51, 101, last))))),
        "alias.test." => {
            add(&own, RData::CNAME(CNAME(name("middle.test."))));
            add(&name("middle.test."), RData::CNAME(CNAME(name("end.test."))));
            add(&name("end.test."), RData::A(A(at(150))));
        }
        "a.wild.test." => add(&own, RData::A(A(at(151)))),
        "deep.b.wild.test." => add(&own, RData::A(A(at(152)))),
        "plain.test." => add(&own, RData::A(A(at(153)))),
        "forged.test." => add(&own, RData::A(A(at(154)))),
        "huge.test." => (1..=251).for_each(|last| add(&own, RData::A(A(Ipv4Addr::new(198, 51, 102, last))))),
        "silent.test." => return (Vec::new(), None),
        _ => message.metadata.response_code = ResponseCode::ServFail,
    }
    let mut forged = Vec::new();
    if own.to_ascii() == "forged.test." {
        let mut wrong = message.clone();
        wrong.answers[0].data = RData::A(A(at(66)));
        // Under another number, and about something else.
        let mut other = wrong.clone();
        wrong.metadata.id = wrong.metadata.id.wrapping_add(1);
        other.queries[0].name = name("evil.test.");
        forged = vec![wrong, other];
    }
    (forged, Some(message))
}

/// The resolver, and the origin of everything: it says what source it sees.
fn serve(row: &Row, stop: &Arc<AtomicBool>) {
    let stop = Arc::clone(stop);
    row.origin.enter(move || {
        let changing = Arc::new(AtomicU8::new(0));
        for resolver in [ORIGIN, OTHER] {
            let udp = UdpSocket::bind((resolver, 53)).unwrap();
            let tcp = TcpListener::bind((resolver, 53)).unwrap();
            let (counter, ended) = (Arc::clone(&changing), Arc::clone(&stop));
            udp.set_read_timeout(Some(SHORT)).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while !ended.load(Ordering::Acquire) {
                    let Ok((length, from)) = udp.recv_from(&mut buffer) else { continue };
                    let query = Message::from_vec(&buffer[..length]).unwrap();
                    let (forged, answer) = answer(&query, false, &counter);
                    for message in forged.into_iter().chain(answer) {
                        udp.send_to(&message.to_vec().unwrap(), from).unwrap();
                    }
                }
            });
            let (counter, ended) = (Arc::clone(&changing), Arc::clone(&stop));
            tcp.set_nonblocking(true).unwrap();
            std::thread::spawn(move || {
                while !ended.load(Ordering::Acquire) {
                    let Ok((mut stream, _)) = tcp.accept() else {
                        std::thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    stream.set_nonblocking(false).unwrap();
                    let query = Message::from_vec(&read_message(&mut stream).unwrap()).unwrap();
                    let (_, Some(answer)) = answer(&query, true, &counter) else { continue };
                    let answer = answer.to_vec().unwrap();
                    let whole = [&(answer.len() as u16).to_be_bytes()[..], &answer].concat();
                    // In pieces, as a network may bring it.
                    for piece in whole.chunks(700) {
                        stream.write_all(piece).unwrap();
                        stream.flush().unwrap();
                    }
                }
            });
        }
        let everywhere = UdpSocket::bind("0.0.0.0:7").unwrap();
        everywhere.set_read_timeout(Some(SHORT)).unwrap();
        let origin = TcpListener::bind("0.0.0.0:7000").unwrap();
        origin.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                match origin.accept() {
                    Ok((mut stream, from)) => _ = stream.write_all(from.ip().to_string().as_bytes()),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
    });
}

fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

struct Lab {
    row: Row,
    aegis: Arc<Mutex<Aegis>>,
    names: Names,
    inputs: Inputs,
    stop: Arc<AtomicBool>,
    agent_ends: Arc<AtomicBool>,
    agent: Option<std::thread::JoinHandle<()>>,
}

/// What the pod's account covers.
fn covered() -> Inputs {
    let mut inputs = inputs(vec![holding(4, 255, "n0")], Timeouts::default());
    let hosts = [
        "changing.test",
        "many.test",
        "alias.test",
        "*.wild.test",
        "plain.test",
        "forged.test",
        "huge.test",
        "silent.test",
    ];
    // Another pod, which no rule with names covers.
    let other = Pod {
        uid: "other".into(),
        labels: Default::default(),
        addresses: vec![NAMELESS.into()],
        ..inputs.pods[0].clone()
    };
    inputs.pods.push(other);
    inputs.bindings[0].cidrs = Vec::new();
    inputs.bindings[0].hosts = hosts.iter().filter_map(|host| HostPattern::new(host)).collect();
    inputs
}

impl Lab {
    fn new() -> Lab {
        let row = Row::new();
        row.origin.run("ip route add local 198.51.100.0/24 dev lo; ip route add local 198.51.101.0/24 dev lo; ip route add 10.244.1.0/24 via 192.0.2.1; ethtool -K eth0 tx off >/dev/null");
        // As a CNI does.
        row.node.run("nft \"table ip cni { chain post { type nat hook postrouting priority srcnat; ip saddr 10.244.1.0/24 oifname eth0 masquerade; }; }\"");
        let stop = Arc::new(AtomicBool::new(false));
        serve(&row, &stop);
        let inputs = covered();
        let mut aegis = Aegis::with(&row, &inputs);
        aegis.direct(queries(&inputs));
        let (changed, changes) = channel();
        let names = Names::new(None, "n0", LIMITS, move || _ = changed.send(()));
        let mut lab = Lab {
            row,
            aegis: Arc::new(Mutex::new(aegis)),
            names,
            inputs,
            stop,
            agent_ends: Arc::default(),
            agent: None,
        };
        lab.start(changes);
        lab
    }

    /// The agent: its proxy, and what a turn of the controller does whenever names change.
    fn start(&mut self, changes: Receiver<()>) {
        self.names.follow(&patterns(&[], &self.inputs.bindings, &self.inputs.applications));
        self.names.serve_pods(&["10.244.1.0/24".parse().unwrap()]);
        let (names, aegis, inputs, stop) =
            (self.names.clone(), Arc::clone(&self.aegis), self.inputs.clone(), Arc::clone(&self.agent_ends));
        let (ready, is_ready) = channel();
        let netns = std::fs::File::open(format!("/run/netns/{}", self.row.node.name)).unwrap();
        self.agent = Some(std::thread::spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let listening = tokio::sync::watch::Sender::new(queries(&inputs).listening);
            runtime.spawn(names::serve(names.clone(), listening.subscribe()));
            ready.send(()).unwrap();
            let mut observed = aegis.lock().unwrap().plane.read().unwrap();
            while !stop.load(Ordering::Acquire) {
                if changes.recv_timeout(Duration::from_millis(50)).is_ok() {
                    let inputs = Inputs { resolved: names.resolved(), ..inputs.clone() };
                    let wanted = desired(&inputs);
                    let change = transition(&wanted, &observed, &Known::default());
                    let plane = &mut aegis.lock().unwrap().plane;
                    apply(plane.as_mut(), &change.ops, &mut observed, &mut (0, 0)).unwrap();
                    names.in_force(inputs.resolved.0, &wanted.nameless);
                }
            }
            runtime.shutdown_background();
        }));
        is_ready.recv().unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }

    /// The agent is gone; what is in the kernel stays.
    fn end_agent(&mut self) {
        self.agent_ends.store(true, Ordering::Release);
        self.agent.take().unwrap().join().unwrap();
    }

    fn ask(&self, socket: &UdpSocket, resolver: Ipv4Addr, name: &str, kind: RecordType) -> Option<Message> {
        let query = names::message::query(names::ask::random(), name, kind).unwrap();
        socket.send_to(&query.to_vec().unwrap(), (resolver, 53)).unwrap();
        let mut buffer = vec![0; 65_535];
        let (length, from) = socket.recv_from(&mut buffer).ok()?;
        assert_eq!(from, SocketAddr::from((resolver, 53)), "as if nobody stood between");
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.id, query.metadata.id);
        Some(answer)
    }

    fn socket(&self) -> UdpSocket {
        let socket = self.row.pod.enter(|| UdpSocket::bind((POD, 0)).unwrap());
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    }

    fn look_up(&self, name: &str) -> Vec<Ipv4Addr> {
        let answer = self.ask(&self.socket(), ORIGIN, name, RecordType::A).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
        addresses(&answer)
    }

    /// Whom an origin sees.
    fn source(&self, to: Ipv4Addr) -> Option<Ipv4Addr> {
        let stream =
            self.row.pod.enter(|| TcpStream::connect_timeout(&(to, 7000).into(), Duration::from_secs(2)));
        let mut text = String::new();
        stream.ok()?.read_to_string(&mut text).ok()?;
        text.parse().ok()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.agent_ends.store(true, Ordering::Release);
        if let Some(agent) = self.agent.take() {
            let _ = agent.join();
        }
    }
}

fn queries(inputs: &Inputs) -> Queries {
    Queries { listening: [(ORIGIN.into(), (NODE, PORT).into())].into(), nameless: desired(inputs).nameless }
}

fn addresses(answer: &Message) -> Vec<Ipv4Addr> {
    let address = |record: &Record| match &record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    };
    answer.answers.iter().filter_map(address).collect()
}

#[test]
fn a_pod_leaves_right_with_its_first_packet_whatever_the_name_is() {
    let lab = Lab::new();
    assert_eq!(lab.source(at(150)), Some(NODE), "what nobody has looked up matches nothing");
    for _ in 0..30 {
        let [now] = lab.look_up("changing.test")[..] else { panic!("one address") };
        assert_eq!(lab.source(now), Some(EGRESS), "{now}");
    }
    assert_eq!(lab.source(at(20)), Some(EGRESS), "one that it had before");
    for (name, last) in [("alias.test", 150), ("a.wild.test", 151), ("DEEP.b.wild.TEST", 152)] {
        assert_eq!(lab.look_up(name), [at(last)], "{name}");
        assert_eq!(lab.source(at(last)), Some(EGRESS), "{name}");
    }
    // Truncated over UDP, in pieces over TCP.
    assert!(lab.ask(&lab.socket(), ORIGIN, "many.test", RecordType::A).unwrap().metadata.truncation);
    let mut stream = lab.row.pod.enter(|| TcpStream::connect((ORIGIN, 53))).unwrap();
    let query = names::message::query(7, "many.test", RecordType::A).unwrap().to_vec().unwrap();
    stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat()).unwrap();
    let all = addresses(&Message::from_vec(&read_message(&mut stream).unwrap()).unwrap());
    assert_eq!(all.len(), 200);
    for address in [all[0], all[99], all[199]] {
        assert_eq!(lab.source(address), Some(EGRESS), "{address}");
    }
    // More than there is room for: the pod is told nothing rather than what would leave wrong.
    let refused = lab.ask(&lab.socket(), ORIGIN, "huge.test", RecordType::A).unwrap();
    assert_eq!((refused.metadata.response_code, refused.answers.len()), (ResponseCode::ServFail, 0));
    assert!(lab.names.lacks_room().is_some());
}

#[test]
fn only_the_resolvers_own_answers_count() {
    let lab = Lab::new();
    assert_eq!(lab.look_up("forged.test"), [at(154)]);
    assert_eq!(lab.source(at(154)), Some(EGRESS));
    assert_eq!(lab.source(at(66)), Some(NODE), "what was forged is not known");
    // A resolver of the pod's own tells it what it likes, and nobody else.
    let answer = lab.ask(&lab.socket(), OTHER, "plain.test", RecordType::A).unwrap();
    assert_eq!(addresses(&answer), [at(153)]);
    assert_eq!(lab.source(at(153)), Some(NODE));
    // One that fails, fails for the pod as it does.
    let answer = lab.ask(&lab.socket(), ORIGIN, "unknown.test", RecordType::A).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let socket = lab.socket();
    socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    assert!(lab.ask(&socket, ORIGIN, "silent.test", RecordType::A).is_none());
    // Nobody but pods is answered.
    let stranger = lab.row.origin.enter(|| UdpSocket::bind((ORIGIN, 0)).unwrap());
    stranger.set_read_timeout(Some(SHORT)).unwrap();
    let query = names::message::query(1, "plain.test", RecordType::A).unwrap().to_vec().unwrap();
    stranger.send_to(&query, (NODE, PORT)).unwrap();
    assert!(stranger.recv(&mut [0; 512]).is_err());
    assert!(lab.names.tally().unheard > 0);
}

#[test]
fn without_the_agent_only_pods_that_names_cover_wait_for_it() {
    let mut lab = Lab::new();
    assert_eq!(lab.look_up("plain.test"), [at(153)]);
    lab.end_agent();
    // What is known stays covered; what is not, the pod does not learn.
    assert_eq!(lab.source(at(153)), Some(EGRESS));
    let socket = lab.socket();
    let error = {
        let query = names::message::query(1, "plain.test", RecordType::A).unwrap().to_vec().unwrap();
        lab.row.pod.enter(|| socket.connect((ORIGIN, 53))).unwrap();
        socket.send(&query).unwrap();
        socket.recv(&mut [0; 512]).unwrap_err()
    };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "it need not wait to know");
    // Another pod, which no rule with names covers, asks as ever.
    lab.row.pod.run("ip addr add 10.244.1.3/24 dev eth0");
    let other = lab.row.pod.enter(|| UdpSocket::bind((NAMELESS, 0)).unwrap());
    other.set_read_timeout(Some(LONG)).unwrap();
    let answer = lab.ask(&other, ORIGIN, "plain.test", RecordType::A).unwrap();
    assert_eq!(addresses(&answer), [at(153)]);
}

#[test]
fn a_socket_that_asked_before_asks_the_agent_once_its_pod_is_covered() {
    let lab = Lab::new();
    let mut own = queries(&lab.inputs);
    own.nameless.insert(POD.into());
    lab.aegis.lock().unwrap().direct(own.clone());
    let socket = lab.socket();
    socket.set_read_timeout(Some(SHORT)).unwrap();
    // Its connection leads to the resolver itself.
    assert!(lab.ask(&socket, ORIGIN, "plain.test", RecordType::A).is_some());
    assert_eq!(lab.source(at(153)), Some(NODE));
    own.nameless.clear();
    lab.aegis.lock().unwrap().direct(own.clone());
    assert!(
        lab.ask(&socket, ORIGIN, "plain.test", RecordType::A).is_none(),
        "it must not be told behind our back"
    );
    assert_eq!(lab.row.node.enter(|| conntrack::forget_queries(ORIGIN.into(), &own.nameless).unwrap()), 1);
    socket.set_read_timeout(Some(LONG)).unwrap();
    assert!(lab.ask(&socket, ORIGIN, "plain.test", RecordType::A).is_some());
    assert_eq!(lab.source(at(153)), Some(EGRESS));
}

/// Shows what the way through the agent costs; asserts only that it is no other order of magnitude.
#[test]
fn an_answer_is_hardly_later() {
    let lab = Lab::new();
    let time = |name: &str, resolver| -> Vec<f64> {
        let socket = lab.socket();
        let mut times: Vec<f64> = (0..80)
            .map(|_| {
                let started = Instant::now();
                lab.ask(&socket, resolver, name, RecordType::A).unwrap();
                started.elapsed().as_secs_f64() * 1000.0
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times
    };
    time("plain.test", ORIGIN);
    for (what, name, resolver) in [
        ("asked directly", "plain.test", OTHER),
        ("through the agent, known", "plain.test", ORIGIN),
        ("through the agent, each time another address", "changing.test", ORIGIN),
    ] {
        let times = time(name, resolver);
        println!("{what}: median {:.2} ms, p99 {:.2} ms", times[40], times[78]);
        assert!(times[40] < 500.0);
    }
}

/// IPv6 addresses are learned as those of IPv4 are.
#[test]
fn six_is_read_too() {
    let query = names::message::query(1, "a.test", RecordType::AAAA).unwrap();
    let mut message = Message::response(1, query.metadata.op_code);
    message.add_queries(query.queries.clone());
    let address = "2001:db8::1".parse().unwrap();
    message.add_answer(Record::from_rdata(query.queries[0].name.clone(), 9, RData::AAAA(AAAA(address))));
    let read = names::message::read(&query, &message.to_vec().unwrap()).unwrap();
    let expected = aegis_core::policy::names::Record::Address("a.test".into(), address.into(), 9);
    assert_eq!(read.records, [expected]);
}
