//! Answers the DNS queries of pods that rules with host names may cover: nftables sends them here instead of to the resolver. Each is
//! put to the resolver that the pod asked, and what comes back is given to the pod when the data plane knows its addresses.

use super::ask::{self, Way};
use super::message;
use super::{Names, Refusal};
use hickory_proto::op::Message;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// Queries of one pod that are under way. Further ones are not heard: pods must not take the answers from each other.
const PER_POD: usize = 256;
/// Connections of all pods.
const CONNECTIONS: usize = 1024;
/// Time that a connection may be silent.
const IDLE: Duration = Duration::from_secs(30);
/// Time until another attempt to listen.
const AGAIN: Duration = Duration::from_secs(1);
/// Room for a query.
const QUERY: usize = 65_535;

/// Where is listened for queries to each resolver.
pub type Listening = BTreeMap<IpAddr, SocketAddr>;

/// Listens as it is told until the future is dropped.
pub async fn serve(names: Names, mut wanted: tokio::sync::watch::Receiver<Listening>) {
    loop {
        let listening = wanted.borrow_and_update().clone();
        let mut tasks = JoinSet::new();
        let busy = Busy::default();
        for (resolver, address) in listening {
            let (names, busy) = (names.clone(), busy.clone());
            tasks.spawn(async move { listen((resolver, ask::PORT).into(), address, names, busy).await });
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

async fn listen(resolver: SocketAddr, address: SocketAddr, names: Names, busy: Busy) {
    loop {
        let sockets = async { Ok((UdpSocket::bind(address).await?, TcpListener::bind(address).await?)) };
        let error: io::Error = match sockets.await {
            Ok((udp, tcp)) => {
                names.listens(address, None);
                tokio::select! {
                    error = datagrams(resolver, udp, &names, &busy) => error,
                    error = connections(resolver, tcp, &names, &busy) => error,
                }
            }
            Err(error) => error,
        };
        names.listens(address, Some(error.to_string()));
        tokio::time::sleep(AGAIN).await;
    }
}

/// Queries under way, by who asked.
#[derive(Clone, Default)]
struct Busy(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them.
struct Turn(Busy, IpAddr);

impl Busy {
    fn turn(&self, pod: IpAddr, most: usize) -> Option<Turn> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let turns = turns.entry(pod).or_default();
        (*turns < most).then(|| {
            *turns += 1;
            Turn(self.clone(), pod)
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = turns.get_mut(&self.1) {
            *number -= 1;
            if *number == 0 {
                turns.remove(&self.1);
            }
        }
    }
}

async fn datagrams(resolver: SocketAddr, socket: UdpSocket, names: &Names, busy: &Busy) -> io::Error {
    let socket = Arc::new(socket);
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; QUERY];
    loop {
        while tasks.try_join_next().is_some() {}
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // What is told of an answer that was sent before.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return error,
        };
        let Some(turn) = busy.turn(from.ip(), PER_POD).filter(|_| names.serves(from.ip())) else {
            names.unheard();
            continue;
        };
        let (query, names, socket) =
            (buffer.get(..length).unwrap_or_default().to_vec(), names.clone(), Arc::clone(&socket));
        tasks.spawn(async move {
            let _turn = turn;
            if let Some(answer) = answer(resolver, &query, Way::Udp, &names).await {
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn connections(resolver: SocketAddr, listener: TcpListener, names: &Names, busy: &Busy) -> io::Error {
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => return error,
        };
        let turn = busy.turn(from.ip(), PER_POD).filter(|_| names.serves(from.ip()));
        let (Some(turn), true) = (turn, tasks.len() < CONNECTIONS) else {
            names.unheard();
            continue;
        };
        let names = names.clone();
        tasks.spawn(async move {
            let _turn = turn;
            // Ends with the connection.
            let _ = connection(resolver, stream, &names).await;
        });
    }
}

async fn connection(resolver: SocketAddr, mut stream: TcpStream, names: &Names) -> io::Result<()> {
    loop {
        let query = tokio::time::timeout(IDLE, ask::read_message(&mut stream)).await??;
        let Some(answer) = answer(resolver, &query, Way::Tcp, names).await else { return Ok(()) };
        ask::write_message(&mut stream, &answer).await?;
    }
}

/// The answer to a pod's query; none if there is none.
async fn answer(resolver: SocketAddr, query: &[u8], way: Way, names: &Names) -> Option<Vec<u8>> {
    let parsed = Message::from_vec(query).ok()?;
    let refused = || message::refusal(&parsed).ok();
    let (answer, read) = match ask::ask(resolver, query, &parsed, way).await {
        Ok(answered) => answered,
        // The pod tries again.
        Err(ask::AskError::Timeout) => return None,
        Err(error) => {
            tracing::debug!(%resolver, %error, "no answer for a pod");
            names.refused(Refusal::NoAnswer);
            return refused();
        }
    };
    match names.take(&read.records).await {
        Ok(()) => Some(answer),
        Err(_) => refused(),
    }
}
