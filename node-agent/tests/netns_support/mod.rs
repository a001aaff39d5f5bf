//! Network namespaces for tests: made with unique names, removed when dropped.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod hosts;
pub mod path;
pub mod plane;
pub mod traffic;

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A network namespace.
pub struct Namespace {
    /// Name under /run/netns.
    pub name: String,
}

/// Fails with a message, since none of these tests can say anything without the right to make namespaces.
pub fn need_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
}

/// Runs a command, which must succeed.
pub fn run(command: &str) {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Namespace {
    /// A new namespace with `lo` up and forwarding on.
    pub fn new(role: &str) -> Namespace {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("aegis-{role}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip netns add {name}"));
        let namespace = Namespace { name };
        namespace.run("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1");
        namespace
    }

    /// Runs a command inside.
    pub fn run(&self, command: &str) {
        run(&format!("nsenter --net=/run/netns/{} sh -ec '{command}'", self.name));
    }

    /// Output of a command inside.
    pub fn output(&self, command: &str) -> String {
        let arguments = [&format!("--net=/run/netns/{}", self.name), "sh", "-ec", command];
        let output = Command::new("nsenter").args(arguments).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs code on a thread of its own inside.
    pub fn enter<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                code()
            });
            thread.join().unwrap()
        })
    }

    /// Joins two namespaces with a veth pair.
    pub fn link(&self, device: &str, other: &Namespace, other_device: &str) {
        self.link_with(device, other, other_device);
    }

    /// The same; `device` may be followed by attributes, such as its index.
    pub fn link_with(&self, device: &str, other: &Namespace, other_device: &str) {
        run(&format!(
            "ip link add {device} netns {} type veth peer name {other_device} netns {}",
            self.name, other.name
        ));
        let device = device.split(' ').next().unwrap();
        self.run(&format!("ip link set {device} up"));
        other.run(&format!("ip link set {other_device} up"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
