//! Messages of the protocol, as far as they are used. Fields that are not named here are passed over when one is read.
//!
//! By `pkg/api/api.proto` of containerd/nri and `request.proto` of containerd/ttrpc.

use prost::Message;
use std::collections::HashMap;

/// Service that the runtime serves to plugins.
pub const RUNTIME: &str = "nri.pkg.api.v1alpha1.Runtime";
/// Service that plugins serve to the runtime.
pub const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";

/// Events of [`Configured::events`]: the bit of an event is its number less one.
pub const RUN_POD_SANDBOX: i32 = 1 << 0;
/// A sandbox was stopped; its address is still its own.
pub const STOP_POD_SANDBOX: i32 = 1 << 1;
/// A sandbox is gone.
pub const REMOVE_POD_SANDBOX: i32 = 1 << 2;

/// `ttrpc.Request`.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Name of the service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Name of the method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The method's own message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// Time that the caller waits.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// `ttrpc.Response`.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Absent: it went well.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The method's own message.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// A code of gRPC; 0 is none.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// In words.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `Unimplemented` and `InvalidArgument` of gRPC.
pub const UNIMPLEMENTED: i32 = 12;
/// A message cannot be read.
pub const INVALID_ARGUMENT: i32 = 3;

/// `RegisterPluginRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct Register {
    /// Name of the plugin.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Two digits: plugins are called in this order.
    #[prost(string, tag = "2")]
    pub index: String,
}

/// `ConfigureRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct Configure {
    /// Name of the runtime.
    #[prost(string, tag = "2")]
    pub runtime: String,
    /// Its version.
    #[prost(string, tag = "3")]
    pub version: String,
}

/// `ConfigureResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct Configured {
    /// A bit for each event that the plugin wants.
    #[prost(int32, tag = "2")]
    pub events: i32,
}

/// `SynchronizeRequest`. Containers are passed over.
#[derive(Clone, PartialEq, Message)]
pub struct Synchronize {
    /// Sandboxes, dead ones too.
    #[prost(message, repeated, tag = "1")]
    pub pods: Vec<PodSandbox>,
    /// More will follow.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

/// `SynchronizeResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct Synchronized {
    /// That of the request, said by who can take more than one.
    #[prost(bool, tag = "2")]
    pub more: bool,
}

/// `RunPodSandboxRequest`, `StopPodSandboxRequest`, `RemovePodSandboxRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct OfPod {
    /// The sandbox.
    #[prost(message, optional, tag = "1")]
    pub pod: Option<PodSandbox>,
}

/// `StateChangeEvent`: how older runtimes say the same.
#[derive(Clone, PartialEq, Message)]
pub struct StateChange {
    /// Number of the event.
    #[prost(int32, tag = "1")]
    pub event: i32,
    /// The sandbox.
    #[prost(message, optional, tag = "2")]
    pub pod: Option<PodSandbox>,
}

/// A sandbox: one life of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandbox {
    /// Of the sandbox: a pod whose sandbox is made anew has another one.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Name of the pod.
    #[prost(string, tag = "2")]
    pub name: String,
    /// UID of the pod, as kubelet knows it.
    #[prost(string, tag = "3")]
    pub uid: String,
    /// Its namespace.
    #[prost(string, tag = "4")]
    pub namespace: String,
    /// Its annotations.
    #[prost(map = "string, string", tag = "6")]
    pub annotations: HashMap<String, String>,
    /// What is particular to Linux.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandbox>,
    /// Its first process; 0: dead, or not known.
    #[prost(uint32, tag = "9")]
    pub pid: u32,
    /// Addresses. None of pods with the host's network.
    #[prost(string, repeated, tag = "10")]
    pub ips: Vec<String>,
}

/// `LinuxPodSandbox`.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPodSandbox {
    /// Its namespaces.
    #[prost(message, repeated, tag = "5")]
    pub namespaces: Vec<LinuxNamespace>,
}

/// `LinuxNamespace`.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxNamespace {
    /// Which.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Where.
    #[prost(string, tag = "2")]
    pub path: String,
}

impl PodSandbox {
    /// A dead one has neither process nor network, but still the address that it had.
    pub fn lives(&self) -> bool {
        let namespaces = self.linux.iter().flat_map(|linux| &linux.namespaces);
        self.pid != 0 || namespaces.into_iter().any(|it| it.r#type == "network" && !it.path.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_reference_writes() {
        let register = Register { name: "aegis".into(), index: "90".into() };
        let request = Request {
            service: RUNTIME.into(),
            method: "RegisterPlugin".into(),
            payload: register.encode_to_vec(),
            timeout_nano: 0,
        };
        // Field 1: 28 bytes, field 2: 14 bytes, field 3: 11 bytes with the fields 1 and 2 of the inner message.
        let expected = [
            &[0x0a, 28][..],
            b"nri.pkg.api.v1alpha1.Runtime",
            &[0x12, 14],
            b"RegisterPlugin",
            &[0x1a, 11, 0x0a, 5],
            b"aegis",
            &[0x12, 2],
            b"90",
        ];
        assert_eq!(request.encode_to_vec(), expected.concat());
        assert_eq!(Request::decode(expected.concat().as_slice()).unwrap(), request);
        assert_eq!(Configured { events: 7 }.encode_to_vec(), [0x10, 7]);
        assert_eq!(Response::default().encode_to_vec(), [0u8; 0], "an empty response went well");
    }

    #[test]
    fn a_sandbox_is_read_past_what_is_not_used() {
        let bytes = [
            &[0x0a, 2][..],
            b"s1",
            &[0x12, 6],
            b"cart-0",
            &[0x1a, 2],
            b"u1",
            &[0x22, 4],
            b"shop",
            // A label (5), the runtime handler (7), LinuxPodSandbox (8) with cgroup_parent (3) and a namespace (5).
            &[0x2a, 6, 0x0a, 1, b'a', 0x12, 1, b'b'],
            &[0x3a, 4],
            b"runc",
            &[0x42, 21, 0x1a, 1, b'/', 0x2a, 16, 0x0a, 7],
            b"network",
            &[0x12, 5],
            b"/ns/1",
            &[0x48, 0x90, 0x03],
            &[0x52, 10],
            b"10.244.1.7",
            // A field of a later version.
            &[0x7a, 1, 0],
        ];
        let pod = PodSandbox::decode(bytes.concat().as_slice()).unwrap();
        let named = (pod.id.as_str(), pod.name.as_str(), pod.uid.as_str(), pod.namespace.as_str());
        assert_eq!(named, ("s1", "cart-0", "u1", "shop"));
        assert_eq!((pod.pid, pod.ips.as_slice()), (400, ["10.244.1.7".to_owned()].as_slice()));
        assert!(pod.lives());
        assert!(PodSandbox { pid: 0, ..pod.clone() }.lives(), "the network is still there");
        assert!(!PodSandbox { pid: 0, linux: None, ..pod }.lives());
    }
}
