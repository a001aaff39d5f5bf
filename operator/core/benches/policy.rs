//! What compiling a node's policy costs, and how large its tables get: `cargo bench -p aegis-core --bench policy`.
//! With the ranges of 200 countries, 1,000 ranges inside the cluster, and every fifth policy only observing.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a tool for developers")]

use aegis_core::model::AllocationName;
use aegis_core::policy::*;
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

/// Rules, ranges and pods of a large cluster's node: policies about one of 50 teams each, every tenth of them by port, with the
/// ranges of some countries and a few hosts, and a catch-all.
fn inputs(policies: u32, ranges: u32, pods: u32) -> PolicyInputs {
    let of_country = ranges / 200;
    let range = |number: u32| -> IpNet {
        let address = Ipv4Addr::from_bits((20 << 24) + number * 1024);
        format!("{address}/22").parse().unwrap()
    };
    let host = |number: u32| IpNet::from(IpAddr::from(Ipv4Addr::from_bits((20 << 24) + number * 3001)));
    let policies = (0..policies).map(|number| {
        // Four countries each, and one host.
        let countries = (0..4).map(|nth| format!("{}", (number * 7 + nth * 31) % 200)).collect();
        EgressPolicy {
            name: format!("p{number}"),
            precedence: number as i32,
            identity: Identity {
                labels: [("team".to_owned(), format!("t{}", number % 50))].into(),
                ..Identity::default()
            },
            posture: Posture::default(),
            countries,
            applications: Vec::new(),
            observes: number % 5 == 4,
            sources: Vec::new(),
            cidrs: vec![host(number)],
            hosts: Vec::new(),
            ports: match number % 10 {
                0 => vec![PortRange { protocol: 6, first: 8000 + number as u16, last: 8100 + number as u16 }],
                _ => Vec::new(),
            },
            exit: match number % 3 {
                0 => Exit::Deny,
                _ => Exit::Allocations { primary: format!("a{}", number % 7), secondary: None },
            },
            generation: 1,
        }
    });
    let countries: Countries = (0..200)
        .map(|country| {
            let ranges = (country * of_country..(country + 1) * of_country).map(range);
            (format!("{country}"), ranges.collect())
        })
        .collect();
    let last = EgressPolicy {
        name: "last".into(),
        precedence: i32::MAX,
        identity: Identity::default(),
        posture: Posture::default(),
        countries: Vec::new(),
        applications: Vec::new(),
        observes: false,
        sources: Vec::new(),
        cidrs: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        ports: Vec::new(),
        hosts: Vec::new(),
        exit: Exit::Deny,
        generation: 1,
    };
    let pods = (0..pods).map(|number| Pod {
        account: format!("shop{}", number % 20),
        name: format!("pod{number}"),
        uid: format!("{number}"),
        labels: [("team".to_owned(), format!("t{}", number % 50))].into(),
        service_account: "default".into(),
        addresses: vec![Ipv4Addr::from_bits((10 << 24) + number).into()],
        host_network: false,
        ..Pod::default()
    });
    let names = (0..20).flat_map(|account| (0..7).map(move |name| (account, name)));
    let usable = names.map(|(account, name)| AllocationName {
        account: format!("shop{account}"),
        name: format!("a{name}"),
    });
    PolicyInputs {
        policies: policies.chain([last]).collect(),
        bindings: Vec::new(),
        pods: pods.collect(),
        countries: Some(Arc::new(countries)),
        internal: (0..1_000)
            .map(|node| IpNet::from(IpAddr::from(Ipv4Addr::from_bits((10 << 24) + node * 256))))
            .collect(),
        usable: usable.collect(),
        usable6: Default::default(),
        ..PolicyInputs::default()
    }
}

fn main() {
    for (policies, ranges, pods) in [(1, 0, 1), (10, 0, 110), (100, 2_000, 250), (500, 20_000, 250)] {
        let inputs = inputs(policies, ranges, pods);
        let of =
            |policy: &EgressPolicy| policy.cidrs.len() + policy.countries.len() * (ranges / 200) as usize;
        let named: usize = inputs.policies.iter().map(of).sum();
        let begin = Instant::now();
        let policy = compile(&inputs);
        println!(
            "{policies} policies that name {named} ranges, {pods} pods: {:.1} ms; {} destinations, {} ports, {} verdicts",
            begin.elapsed().as_secs_f64() * 1000.0,
            policy.destinations.len(),
            policy.ports.len(),
            policy.verdicts.len(),
        );
    }
}
