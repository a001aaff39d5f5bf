//! Services whose endpoints are outside the cluster: a pod sends to the Service's address, and the node's Service proxy translates that
//! after the packet was looked at. So the Service's address stands for its endpoints.

use super::PolicyInputs;
use super::ports::PortClasses;
use super::rules::Rule;
use super::terms::Term;
use std::net::IpAddr;

/// A port of a Service with what is behind it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// Address to which pods send.
    pub address: IpAddr,
    /// IP protocol number: 6 (TCP) or 17 (UDP).
    pub protocol: u8,
    /// Port to which they send.
    pub port: u16,
    /// Where it may go, outside the cluster and inside.
    pub endpoints: Vec<(IpAddr, u16)>,
}

/// One of the places to which what is sent to a Service's address may go.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Way {
    /// Protocol and port to which pods send.
    sent: (u8, u16),
    /// Terms of rules that cover the endpoint, ascending, and what matters of the longest range's length.
    pub terms: Vec<(usize, u8)>,
}

impl Way {
    /// `None` where no rule covers the endpoint.
    pub fn new(
        port: &ServicePort,
        endpoint: (IpAddr, u16),
        rules: &[Rule<'_>],
        terms: &[(usize, Term<'_>)],
        inputs: &PolicyInputs,
    ) -> Option<Way> {
        let (address, target) = endpoint;
        let covering = terms.iter().enumerate().filter_map(|(number, (rule, term))| {
            let named = |it: &super::PortRange| {
                it.protocol == port.protocol && (it.first..=it.last).contains(&target)
            };
            if !term.ports.is_empty() && !term.ports.iter().any(named) {
                return None;
            }
            let around = term.ranges(inputs).filter(|range| range.contains(&address));
            Some((number, rules[*rule].length(around.map(|range| range.prefix_len()).max()?)))
        });
        let terms: Vec<(usize, u8)> = covering.collect();
        (!terms.is_empty()).then_some(Way { sent: (port.protocol, port.port), terms })
    }

    /// Whether packets of a class of ports may go it.
    pub fn takes(&self, class: u32, ports: &PortClasses) -> bool {
        ports.class(self.sent.0, self.sent.1) == class
    }
}
