//! The fast path: whether this node may use it.

use crate::status::{NotReady, reason};
use std::path::Path;

/// conntrack lets segments outside of the window pass (`Documentation/networking/nf_conntrack-sysctl.rst`).
const BE_LIBERAL: &str = "net/netfilter/nf_conntrack_tcp_be_liberal";

/// Why packets of established flows must not pass by the host stack here. `sysctls` is `/proc/sys` of the node.
///
/// Conntrack sees how a connection opens and closes, but nothing between: its last segments are far outside of the window that it
/// knows. Unless it is told to be liberal, it calls them invalid, kube-proxy and others drop those, and the connection hangs.
pub fn check(sysctls: &Path) -> Result<(), NotReady> {
    let not = |message: String| Err(NotReady { reason: reason::CONNTRACK_STRICT, message });
    match std::fs::read_to_string(sysctls.join(BE_LIBERAL)) {
        Ok(value) if value.trim() == "1" => Ok(()),
        Ok(_) => not("conntrack would take the end of a connection for invalid: set the sysctl \
             net.netfilter.nf_conntrack_tcp_be_liberal=1 on this node, or conntrack.tcpBeLiberal: true in the configuration of kube-proxy"
            .to_owned()),
        Err(error) => not(format!("cannot read the sysctl net.netfilter.nf_conntrack_tcp_be_liberal: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_conntrack_is_liberal() {
        let sysctls = std::env::temp_dir().join(format!("aegis-fast-{}", std::process::id()));
        let file = sysctls.join(BE_LIBERAL);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let message = || check(&sysctls).map_err(|why| (why.reason, why.message));
        assert!(
            message()
                .is_err_and(|(reason, text)| reason == "ConntrackStrict" && text.contains("cannot read"))
        );
        std::fs::write(&file, "0\n").unwrap();
        assert!(
            message()
                .is_err_and(|(reason, text)| reason == "ConntrackStrict" && text.contains("tcpBeLiberal"))
        );
        std::fs::write(&file, "1\n").unwrap();
        assert_eq!(message(), Ok(()));
        std::fs::remove_dir_all(&sysctls).unwrap();
    }
}
