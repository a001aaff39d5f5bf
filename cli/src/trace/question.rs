//! What is asked: whose packets, and where to.

use super::services::{self, Leads};
use super::with_node;
use crate::state::State;
use aegis_core::policy::names::normal;
use aegis_core::policy::{Packet, Pod};
use aegis_crds::rules;
use anyhow::{Context, Result, bail};
use kube::ResourceExt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

/// Whose packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A pod's, by namespace and name.
    Pod(String, String),
    /// Those of all pods that run as a service account, by namespace and name.
    ServiceAccount(String, String),
}

/// A pod, and its node if it has one.
pub type Placed = (Pod, Option<String>);

impl Subject {
    /// Reads `POD`, `pod/POD`, `NAMESPACE/POD` or `sa/NAME`.
    pub fn parse(text: &str, namespace: &str) -> Result<Subject> {
        let own = namespace.to_owned();
        match text.split_once('/') {
            _ if text.is_empty() || text.ends_with('/') => bail!("{text:?} names no pod"),
            Some((_, name)) if name.contains('/') => {
                bail!("{text:?} is none of POD, NAMESPACE/POD and sa/NAME")
            }
            Some(("sa" | "serviceaccount", name)) => Ok(Subject::ServiceAccount(own, name.to_owned())),
            Some(("pod" | "pods" | "po", name)) => Ok(Subject::Pod(own, name.to_owned())),
            Some((namespace, name)) => Ok(Subject::Pod(namespace.to_owned(), name.to_owned())),
            None => Ok(Subject::Pod(own, text.to_owned())),
        }
    }

    /// Namespace.
    pub fn namespace(&self) -> &str {
        match self {
            Subject::Pod(namespace, _) | Subject::ServiceAccount(namespace, _) => namespace,
        }
    }

    /// The pods with their nodes, and what to say of the choice.
    pub fn pods(&self, state: &State) -> Result<(Vec<Placed>, Vec<String>)> {
        match self {
            Subject::Pod(namespace, name) => {
                let pod = state.pod(namespace, name).with_context(|| match state.missing.get("pods") {
                    Some(why) => format!("pod {name} of namespace {namespace}: pods {why}"),
                    None => format!("there is no pod {name} in namespace {namespace}"),
                })?;
                let ended = rules::is_finished(pod);
                let note = ended.then(|| format!("pod {name} has ended: it sends nothing any more"));
                Ok((vec![with_node(state, pod)], note.into_iter().collect()))
            }
            Subject::ServiceAccount(namespace, name) => {
                let own = state.pods.iter().filter(|pod| pod.namespace().as_deref() == Some(namespace));
                let running = own.filter(|pod| !rules::is_finished(pod)).map(|pod| with_node(state, pod));
                let mut pods: Vec<_> = running.filter(|(pod, _)| pod.service_account == *name).collect();
                pods.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
                if !pods.is_empty() {
                    return Ok((pods, Vec::new()));
                }
                let pod = Pod {
                    account: namespace.clone(),
                    name: format!("any that runs as {name}"),
                    service_account: name.clone(),
                    ..Pod::default()
                };
                let note = format!(
                    "no pod of namespace {namespace} runs as {name}: this is about one without labels"
                );
                Ok((vec![(pod, None)], vec![note]))
            }
        }
    }
}

/// Protocol of the packet.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// Ping.
    Icmp,
}

/// Where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address or name.
    pub host: String,
    /// Port.
    pub port: Option<u16>,
}

/// Addresses of a name that are looked at.
const MOST: usize = 16;

/// Where the packets go that somebody asks about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// One that opens a flow, for each address.
    pub packets: Vec<Packet>,
    /// Names whose addresses these are.
    pub names: Vec<String>,
    /// What to say of it.
    pub notes: Vec<String>,
}

/// Addresses of a name, as this machine resolves it.
fn resolve(host: &str) -> Result<Vec<IpAddr>> {
    let found = (host, 0).to_socket_addrs();
    let found = found.with_context(|| format!("{host}: this machine does not resolve it"))?;
    let mut addresses: Vec<IpAddr> = found.map(|it| it.ip()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

impl Destination {
    /// Reads `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT`, `NAME` or `NAME:PORT`.
    pub fn parse(text: &str) -> Result<Destination> {
        if text.parse::<IpAddr>().is_ok() {
            return Ok(Destination { host: text.to_owned(), port: None });
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Destination { host: address.ip().to_string(), port: Some(address.port()) });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => {
                let port = port.parse().with_context(|| format!("{text:?}: {port:?} is no port"))?;
                (host, Some(port))
            }
            None => (text, None),
        };
        let letter = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if host.is_empty() || !host.chars().all(letter) {
            bail!("{text:?} is none of ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, NAME and NAME:PORT");
        }
        Ok(Destination { host: host.to_owned(), port })
    }

    /// The address, if it is one.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// Where packets go that pods of a namespace send there. Names that are no Service's are resolved by this machine.
    pub fn find(&self, state: &State, namespace: &str, protocol: Protocol) -> Result<Found> {
        self.find_by(state, namespace, protocol, resolve)
    }

    fn find_by(
        &self,
        state: &State,
        namespace: &str,
        protocol: Protocol,
        resolve: impl Fn(&str) -> Result<Vec<IpAddr>>,
    ) -> Result<Found> {
        let mut found = Found::default();
        if let Some(address) = self.address() {
            self.reach(state, address, protocol, &mut found);
            return Ok(found);
        }
        let mut host = normal(&self.host);
        if let Some(service) = services::named(state, &host, namespace) {
            let title = services::title(service);
            match services::leads(state, service) {
                Leads::Name(name) => {
                    found.notes.push(format!("{title} is another name of {name}"));
                    found.names.push(std::mem::replace(&mut host, normal(name)));
                }
                Leads::Addresses(addresses) => {
                    addresses.into_iter().for_each(|it| self.reach(state, it, protocol, &mut found));
                    return Ok(found);
                }
                Leads::Endpoints(endpoints) => {
                    let port = self.port.filter(|_| protocol != Protocol::Icmp);
                    let taken = endpoints
                        .iter()
                        .filter(|(_, target)| target.is_none() || *target == port || port.is_none());
                    found.packets = taken.map(|(address, _)| self.packet(*address, protocol)).collect();
                    found.packets.dedup();
                    if found.packets.is_empty() {
                        bail!(
                            "{title} has no address, and no endpoint that somebody has written for this port"
                        );
                    }
                    found
                        .notes
                        .push(format!("{title} has no address of its own: pods send to its endpoints"));
                    return Ok(found);
                }
            }
        }
        let addresses = resolve(&host)?;
        found.notes.push(format!(
            "{host} was resolved here, and what was found counts as its addresses; the pod's resolver may answer otherwise"
        ));
        found.names.push(host);
        found.packets = addresses.into_iter().take(MOST).map(|it| self.packet(it, protocol)).collect();
        Ok(found)
    }

    /// Adds where a packet to an address goes: if that is a Service's, to the endpoints outside of the cluster.
    fn reach(&self, state: &State, address: IpAddr, protocol: Protocol, found: &mut Found) {
        let packet = self.packet(address, protocol);
        let behind = services::behind(state, &packet);
        if behind.is_empty() {
            found.packets.push(packet);
            return;
        }
        found.notes.push(format!(
            "{address} is a Service's: what is sent there goes to endpoints that somebody has written; where one of them is not left to \
             the node's address, that is done to all"
        ));
        let target =
            |(address, port): (IpAddr, u16)| Packet { destination: address, port: Some(port), ..packet };
        found.packets.extend(behind.into_iter().take(MOST).map(target));
    }

    /// A packet that opens a flow there.
    fn packet(&self, address: IpAddr, protocol: Protocol) -> Packet {
        let protocol = match protocol {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Icmp if address.is_ipv6() => 58,
            Protocol::Icmp => 1,
        };
        let port = self.port.filter(|_| [6, 17].contains(&protocol));
        Packet { destination: address, protocol, port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::state_of;

    /// Services of `shop`: with an address, without one, and another name of a host.
    const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: partner, namespace: shop}, spec: {clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7],
 ports: [{name: https, port: 443}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: partner-1, namespace: shop,
 labels: {kubernetes.io/service-name: partner}}, addressType: IPv4, endpoints: [{addresses: [198.51.100.9, 198.51.100.10]}],
 ports: [{name: https, port: 8443, protocol: TCP}]}
---
{apiVersion: v1, kind: Service, metadata: {name: drop, namespace: shop}, spec: {clusterIP: None, ports: [{port: 22}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: drop-1, namespace: shop,
 labels: {kubernetes.io/service-name: drop}}, addressType: IPv4, endpoints: [{addresses: [198.51.100.22]}], ports: [{port: 22}]}
---
{apiVersion: v1, kind: Service, metadata: {name: alias, namespace: shop}, spec: {type: ExternalName, externalName: Partner.example}}
---
{apiVersion: v1, kind: Service, metadata: {name: cart, namespace: shop}, spec: {clusterIP: 10.96.0.8, clusterIPs: [10.96.0.8],
 selector: {app: cart}, ports: [{port: 80}]}}
";

    fn found(state: &State, text: &str, namespace: &str) -> Result<Found> {
        let resolve = |host: &str| match host {
            "partner.example" => Ok(vec!["203.0.113.5".parse().unwrap()]),
            _ => bail!("{host} is unknown"),
        };
        Destination::parse(text)?.find_by(state, namespace, Protocol::Tcp, resolve)
    }

    fn find(text: &str, namespace: &str) -> Result<(Vec<String>, Vec<String>)> {
        let found = found(&state_of(SERVICES), text, namespace)?;
        let packets = found.packets.iter().map(|it| format!("{} {it}", it.destination));
        Ok((packets.collect(), found.names))
    }

    #[test]
    fn a_service_is_what_it_leads_to() {
        let nobody: [String; 0] = [];
        let partner = ["198.51.100.9 TCP 8443", "198.51.100.10 TCP 8443"];
        for (text, namespace) in [
            ("10.96.0.7:443", "bank"),
            ("partner:443", "shop"),
            ("partner.shop:443", "bank"),
            ("partner.shop.svc:443", "bank"),
            ("partner.shop.svc.cluster.local:443", "bank"),
        ] {
            let (packets, names) = find(text, namespace).unwrap();
            assert_eq!((&packets[..], &names[..]), (&partner.map(str::to_owned)[..], &nobody[..]), "{text}");
        }
        for (text, expected) in [
            ("10.96.0.7:80", "10.96.0.7 TCP 80"),
            ("cart:80", "10.96.0.8 TCP 80"),
            ("drop:22", "198.51.100.22 TCP 22"),
            ("198.51.100.77:1", "198.51.100.77 TCP 1"),
        ] {
            assert_eq!(find(text, "shop").unwrap().0, [expected], "{text}");
        }
        assert!(
            find("drop:23", "shop").unwrap_err().to_string().contains("Service shop/drop has no address")
        );
        assert!(find("partner:443", "bank").unwrap_err().to_string().contains("partner is unknown"));
    }

    #[test]
    fn an_external_name_is_looked_up_and_both_names_have_the_addresses() {
        let (packets, names) = find("alias.shop:443", "bank").unwrap();
        assert_eq!(packets, ["203.0.113.5 TCP 443"]);
        assert_eq!(names, ["alias.shop", "partner.example"]);
        assert_eq!(find("Partner.Example.:1", "bank").unwrap().1, ["partner.example"]);
    }

    #[test]
    fn what_is_asked_for_by_name_is_what_rules_with_the_name_are_about() {
        let objects = format!(
            "{SERVICES}---
{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop}}, status: {{podIPs: [{{ip: 10.244.1.7}}]}}}}
---
{{apiVersion: aegis.dev/v1alpha1, kind: EgressApplication, metadata: {{name: partner}}, spec: {{endpoints: [{{hosts: ['*.example']}}]}}}}
---
{{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {{name: partner}},
 spec: {{precedence: 1, action: Deny, match: {{destination: {{applications: [partner]}}}}}}}}
"
        );
        let state = state_of(&objects);
        let subject = Subject::Pod("shop".into(), "web".into());
        for (to, outcome) in [
            ("partner.example:443", super::super::Outcome::Refused),
            ("alias:443", super::super::Outcome::Refused),
            ("203.0.113.5:443", super::super::Outcome::NodeAddress),
        ] {
            let found = found(&state, to, "shop").unwrap();
            let told = super::super::traces(&state, &subject, &found).unwrap();
            assert_eq!(told.traces[0].outcome, outcome, "{to}: {}", told.traces[0].message);
        }
    }
}
