//! As much of a kubelet as a forwarded port needs: what the API server asks of a node, and what becomes of it.

use futures::{SinkExt, StreamExt};
use http::{HeaderValue, header};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

/// A node's side of forwarded ports.
pub struct Kubelet {
    pub port: u16,
    /// Where ports lead to, whichever are asked for.
    pub behind: Arc<Mutex<Option<SocketAddr>>>,
    /// Path and query of what was asked for.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Kubelet {
    pub async fn start(folder: &Path) -> Kubelet {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let port = listener.local_addr().expect("address").port();
        let acceptor = acceptor(folder);
        let kubelet = Kubelet { port, behind: Arc::default(), asked: Arc::default() };
        let (behind, asked) = (kubelet.behind.clone(), kubelet.asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, behind, asked) = (acceptor.clone(), behind.clone(), asked.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    forward(stream, &behind, &asked).await;
                });
            }
        });
        kubelet
    }
}

/// A certificate of its own: API servers that are told of no authority take any.
fn acceptor(folder: &Path) -> TlsAcceptor {
    let (chain, key) = (folder.join("kubelet.crt"), folder.join("kubelet.key"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kubelet"]);
    let output = openssl.arg("-keyout").arg(&key).arg("-out").arg(&chain).output().expect("openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let chain = vec![CertificateDer::from_pem_file(&chain).expect("certificate")];
    let key = PrivateKeyDer::from_pem_file(&key).expect("key");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a certificate");
    TlsAcceptor::from(Arc::new(config))
}

/// `v4.channel.k8s.io`: an even channel for the bytes of a port, an odd one for what went wrong; each begins with the port's number.
async fn forward<S>(stream: S, behind: &Mutex<Option<SocketAddr>>, asked: &Mutex<Vec<String>>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut wanted = String::new();
    #[allow(clippy::result_large_err, reason = "it is the callback's")]
    let upgrade = |request: &Request, mut response: Response| {
        wanted = request.uri().to_string();
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        Ok(response)
    };
    let mut socket = accept_hdr_async(stream, upgrade).await.expect("a web socket");
    let port: u16 = wanted.split("port=").nth(1).and_then(|it| it.parse().ok()).expect(&wanted);
    asked.lock().expect("lock").push(wanted);
    let [low, high] = port.to_le_bytes();
    for channel in [0, 1] {
        socket.send(Message::binary(vec![channel, low, high])).await.expect("a port's number");
    }
    let to = *behind.lock().expect("lock");
    let pod = match to {
        Some(to) => TcpStream::connect(to).await.ok(),
        None => None,
    };
    let Some(pod) = pod else {
        let _ = socket.send(Message::binary([&[1][..], b"nobody listens in the pod"].concat())).await;
        let _ = socket.close(None).await;
        return;
    };
    let (mut from_pod, mut to_pod) = pod.into_split();
    let mut buffer = vec![0; 32 << 10];
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) if bytes.first() == Some(&0) => {
                    if to_pod.write_all(&bytes[1..]).await.is_err() {
                        return;
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
            read = from_pod.read(&mut buffer) => match read {
                Ok(count) if count > 0 => {
                    let message = [&[0][..], &buffer[..count]].concat();
                    if socket.send(Message::binary(message)).await.is_err() {
                        return;
                    }
                }
                _ => {
                    let _ = socket.close(None).await;
                    return;
                }
            },
        }
    }
}
