//! A plugin of the container runtime (NRI: containerd 2, CRI-O): a pod's containers start once the data plane knows the pod.
//!
//! The runtime tells of each sandbox when it has its network and no container, and waits for an answer; it tells of its end before
//! the address is given back. Without it pods are named by the results of the CNI library, which does not wait, and until then held.

mod frame;
pub mod messages;
mod sandboxes;
mod session;
#[cfg(test)]
mod tests;

pub use sandboxes::{Ended, Hook, Known, Naming, Outcome, Sandboxes, Told};
pub use session::{Plugin, SessionError};

use aegis_core::model::Seconds;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UnixStream;

/// Pause before another attempt to connect: doubles from the one to the other.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The time by which files and API objects are dated.
pub(crate) fn now() -> Seconds {
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Seconds::try_from(age.as_secs()).unwrap_or_default()
}

/// Keeps up the connection to the runtime, for as long as the future that this is lives.
pub async fn keep(socket: &Path, plugin: &Plugin, sandboxes: &Sandboxes) {
    let (first, last) = PAUSES;
    let mut pause = first;
    loop {
        let (hook, connected) = connect(socket, plugin, sandboxes).await;
        if connected {
            pause = first;
        }
        if sandboxes.hook() != hook {
            match &hook {
                Hook::Lost(reason) => {
                    tracing::warn!(
                        reason,
                        "no connection to the container runtime; pods start without waiting, and are held"
                    );
                }
                _ => tracing::info!(
                    socket = %socket.display(),
                    "the container runtime has no socket for plugins; pods are named by the results of the CNI library"
                ),
            }
            sandboxes.set_hook(hook);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(last);
    }
}

/// Why there is no connection any more, and whether there was one that worked.
async fn connect(socket: &Path, plugin: &Plugin, sandboxes: &Sandboxes) -> (Hook, bool) {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::NotFound => return (Hook::NoSocket, false),
        Err(error) => return (Hook::Lost(error.to_string()), false),
    };
    let reason = match plugin.serve(stream).await {
        Ok(()) => "it has ended".to_owned(),
        Err(error) => error.to_string(),
    };
    (Hook::Lost(reason), matches!(sandboxes.hook(), Hook::Connected(_)))
}
