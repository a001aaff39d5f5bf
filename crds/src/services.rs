//! Services whose endpoints people (or programs) write: they may be outside the cluster. A Service with a selector may have such
//! endpoints too, beside its pods: a Service proxy does not ask who has written a slice.
//!
//! A headless Service and an `ExternalName` are only names: pods send to the endpoint itself.

use aegis_core::policy::ServicePort;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Label of an EndpointSlice: the Service that it belongs to.
const OF_SERVICE: &str = "kubernetes.io/service-name";
/// EndpointSlices that may say something: of the control plane's own the endpoints are pods.
pub const WRITTEN_BY_OTHERS: &str =
    "kubernetes.io/service-name,endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";

/// What is known of a Service: addresses to which pods send, and its ports by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRecord {
    /// Addresses that the node's Service proxy translates.
    pub addresses: Vec<IpAddr>,
    /// Name, protocol and number of each port.
    pub ports: Vec<(String, u8, u16)>,
}

/// Where packets for a Service go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointRecord {
    /// Name of the Service.
    pub service: String,
    /// Addresses, also of those that are not ready: the proxy may know better.
    pub addresses: Vec<IpAddr>,
    /// Name, protocol and number of each port; without a number it is any.
    pub ports: Vec<(String, u8, Option<u16>)>,
}

fn protocol(name: Option<&String>) -> Option<u8> {
    match name.map_or("TCP", String::as_str) {
        "TCP" => Some(6),
        "UDP" => Some(17),
        // Is refused where it leaves.
        _ => None,
    }
}

/// Reads a Service. Nothing of one that has no address.
pub fn service(object: &Service) -> ServiceRecord {
    let spec = object.spec.clone().unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return ServiceRecord::default();
    }
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_ref()).into_iter().flatten();
    let addresses = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
    let addresses = addresses.chain(spec.external_ips.into_iter().flatten());
    let addresses = addresses.chain(ingress.filter_map(|ingress| ingress.ip.clone()));
    // `None` is no address.
    let mut addresses: Vec<IpAddr> = addresses.filter_map(|address| address.parse().ok()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let ports = spec.ports.into_iter().flatten().filter_map(|port| {
        let number = u16::try_from(port.port).ok()?;
        Some((port.name.unwrap_or_default(), protocol(port.protocol.as_ref())?, number))
    });
    ServiceRecord { addresses, ports: ports.collect() }
}

/// Reads an EndpointSlice.
pub fn endpoints(object: &EndpointSlice) -> EndpointRecord {
    let service = object.metadata.labels.as_ref().and_then(|labels| labels.get(OF_SERVICE));
    let addresses = object.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
    let ports = object.ports.iter().flatten().filter_map(|port| {
        let number = port.port.and_then(|number| u16::try_from(number).ok());
        Some((port.name.clone().unwrap_or_default(), protocol(port.protocol.as_ref())?, number))
    });
    EndpointRecord {
        service: service.cloned().unwrap_or_default(),
        addresses: addresses.filter_map(|address| address.parse().ok()).collect(),
        ports: ports.collect(),
    }
}

/// The API server is of the cluster wherever it is: a policy for everything else must not cut pods off from it.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// Joins them. Keys are namespaces and names.
pub fn ports<'a>(
    services: impl Iterator<Item = (&'a (String, String), &'a ServiceRecord)>,
    endpoints: impl Iterator<Item = (&'a (String, String), &'a EndpointRecord)>,
) -> Vec<ServicePort> {
    let mut slices: BTreeMap<(&str, &str), Vec<&EndpointRecord>> = BTreeMap::new();
    for ((namespace, _), slice) in endpoints {
        slices.entry((namespace, &slice.service)).or_default().push(slice);
    }
    let mut all = Vec::new();
    for ((namespace, name), service) in services {
        if (namespace.as_str(), name.as_str()) == API_SERVER {
            continue;
        }
        let Some(slices) = slices.get(&(namespace.as_str(), name.as_str())) else { continue };
        for (port_name, protocol, port) in &service.ports {
            let behind = slices.iter().flat_map(|slice| {
                let named = slice.ports.iter().filter(|(name, of, _)| name == port_name && of == protocol);
                named.flat_map(|(_, _, target)| {
                    slice.addresses.iter().map(|address| (*address, target.unwrap_or(*port)))
                })
            });
            let behind: Vec<(IpAddr, u16)> = behind.collect();
            for address in &service.addresses {
                let same = behind.iter().filter(|(endpoint, _)| endpoint.is_ipv4() == address.is_ipv4());
                let endpoints: Vec<(IpAddr, u16)> = same.copied().collect();
                if !endpoints.is_empty() {
                    all.push(ServicePort { address: *address, protocol: *protocol, port: *port, endpoints });
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn key(name: &str) -> (String, String) {
        ("shop".into(), name.into())
    }

    fn read_service(spec: Value) -> ServiceRecord {
        service(&serde_json::from_value(json!({"spec": spec})).unwrap())
    }

    fn read_slice(of: &str, endpoints_and_ports: Value) -> EndpointRecord {
        let mut object = json!({"metadata": {"labels": {OF_SERVICE: of}}, "addressType": "IPv4"});
        for (field, value) in endpoints_and_ports.as_object().unwrap() {
            object[field] = value.clone();
        }
        endpoints(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_manual_slice_is_joined_with_its_service_by_the_ports_names() {
        let partner = read_service(json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"],
            "ports": [{"name": "https", "port": 443}, {"name": "dns", "port": 53, "protocol": "UDP"}]}));
        let slice = read_slice(
            "partner",
            json!({"endpoints": [{"addresses": ["198.51.100.9"]},
                {"addresses": ["198.51.100.10"], "conditions": {"ready": false}}],
            "ports": [{"name": "https", "port": 8443, "protocol": "TCP"}]}),
        );
        let joined = ports(
            [(&key("partner"), &partner), (&key("other"), &partner)].into_iter(),
            [(&key("partner-1"), &slice)].into_iter(),
        );
        let endpoint = |last| (IpAddr::from([198, 51, 100, last]), 8443);
        let expected = ServicePort {
            address: IpAddr::from([10, 96, 0, 7]),
            protocol: 6,
            port: 443,
            endpoints: vec![endpoint(9), endpoint(10)],
        };
        assert_eq!(joined, [expected]);
    }

    #[test]
    fn the_api_server_is_inside_wherever_it_is() {
        let service =
            read_service(json!({"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}));
        let endpoints = json!({"endpoints": [{"addresses": ["198.51.100.9"]}],
                               "ports": [{"name": "https", "port": 6443}]});
        let slice = read_slice("kubernetes", endpoints);
        let joined = |namespace: &str| {
            let key = (namespace.to_owned(), "kubernetes".to_owned());
            ports([(&key, &service)].into_iter(), [(&key, &slice)].into_iter()).len()
        };
        assert_eq!([joined("default"), joined("shop")], [0, 1]);
    }

    #[test]
    fn a_service_that_selects_pods_may_have_other_endpoints_and_without_any_it_says_nothing() {
        let ports_of = json!([{"port": 443}]);
        let spec = json!({"clusterIP": "10.96.0.7", "ports": ports_of, "selector": {"app": "cart"}});
        let selects = read_service(spec);
        let outside = json!({"endpoints": [{"addresses": ["198.51.100.9"]}], "ports": [{"port": 8443}]});
        let slice = read_slice("cart", outside);
        let joined = |slices: &[((String, String), EndpointRecord)]| {
            let slices = slices.iter().map(|(key, slice)| (key, slice));
            ports([(&key("cart"), &selects)].into_iter(), slices).len()
        };
        assert_eq!([joined(&[]), joined(&[(key("by-hand"), slice)])], [0, 1]);
    }

    #[test]
    fn services_that_are_only_names_say_nothing() {
        let ports = json!([{"port": 443}]);
        let spec = json!({"type": "ExternalName", "externalName": "partner.example", "ports": ports});
        assert_eq!(read_service(spec), ServiceRecord::default());
        assert!(read_service(json!({"clusterIP": "None", "ports": ports})).addresses.is_empty());
        let all =
            read_service(json!({"clusterIP": "10.96.0.7", "externalIPs": ["192.0.2.7"], "ports": ports}));
        assert_eq!(all.addresses, [IpAddr::from([10, 96, 0, 7]), IpAddr::from([192, 0, 2, 7])]);
    }
}
