//! What Services lead to: by the objects of the cluster, as the agents read them.

use crate::state::State;
use aegis_core::policy::Packet;
use aegis_crds::services::{self, endpoints, service};
use k8s_openapi::api::core::v1::Service;
use kube::{Resource, ResourceExt};
use std::net::IpAddr;

/// Where pods send what is for a Service.
pub enum Leads<'a> {
    /// To whatever this name has as addresses.
    Name(&'a str),
    /// To its own addresses.
    Addresses(Vec<IpAddr>),
    /// To its endpoints, with the port of each.
    Endpoints(Vec<(IpAddr, Option<u16>)>),
}

/// The Service that pods of a namespace mean by a name: `NAME`, `NAME.NAMESPACE`, or this with `.svc` and the cluster's domain behind.
pub fn named<'a>(state: &'a State, host: &str, namespace: &str) -> Option<&'a Service> {
    let mut labels = host.split('.');
    let name = labels.next()?;
    let namespace = labels.next().unwrap_or(namespace);
    if labels.next().is_some_and(|label| label != "svc") {
        return None;
    }
    let is = |it: &&Service| it.name_any() == name && it.namespace().as_deref() == Some(namespace);
    state.service_objects.iter().find(is)
}

/// Namespace and name.
pub fn title(service: &Service) -> String {
    format!("Service {}/{}", service.namespace().unwrap_or_default(), service.name_any())
}

/// Where pods send what is for it.
pub fn leads<'a>(state: &State, service: &'a Service) -> Leads<'a> {
    let spec = service.spec.as_ref();
    let name = spec.and_then(|spec| spec.external_name.as_deref());
    if let Some(name) = name.filter(|_| spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName")) {
        return Leads::Name(name);
    }
    let own = spec.and_then(|spec| spec.cluster_ips.clone()).unwrap_or_default();
    let own = own.into_iter().chain(spec.and_then(|spec| spec.cluster_ip.clone()));
    let mut addresses: Vec<IpAddr> = own.filter_map(|address| address.parse().ok()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    if !addresses.is_empty() {
        return Leads::Addresses(addresses);
    }
    let slices = state.endpoints.iter().filter(|slice| slice.namespace() == service.namespace());
    let slices = slices.map(endpoints).filter(|slice| slice.service == service.name_any());
    let reached = slices.flat_map(|slice| {
        let ports: Vec<Option<u16>> = slice.ports.iter().map(|(.., port)| *port).collect();
        let ports = if ports.is_empty() { vec![None] } else { ports };
        let pairs = slice
            .addresses
            .into_iter()
            .flat_map(move |it| ports.clone().into_iter().map(move |port| (it, port)));
        pairs.collect::<Vec<_>>()
    });
    Leads::Endpoints(reached.collect())
}

/// Endpoints to which the nodes send what pods send to a Service's address, where people have written some.
pub fn behind(state: &State, packet: &Packet) -> Vec<(IpAddr, u16)> {
    let key = |meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
        (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    };
    let services: Vec<_> = state.service_objects.iter().map(|it| (key(it.meta()), service(it))).collect();
    let slices: Vec<_> = state.endpoints.iter().map(|it| (key(it.meta()), endpoints(it))).collect();
    let ports = services::ports(
        services.iter().map(|(key, record)| (key, record)),
        slices.iter().map(|(key, record)| (key, record)),
    );
    let reached = ports.into_iter().filter(|port| {
        port.address == packet.destination
            && port.protocol == packet.protocol
            && Some(port.port) == packet.port
    });
    reached.flat_map(|port| port.endpoints).collect()
}
