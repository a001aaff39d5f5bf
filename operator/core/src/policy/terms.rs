//! What a rule names as destinations: ranges, countries and host names, each with the ports that go with them.

use super::PolicyInputs;
use super::names::HostPattern;
use super::ports::PortRange;
use super::rules::{Countries, Rule};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeMap;

/// Named applications, by name.
pub type Applications = BTreeMap<String, Vec<Endpoint>>;

/// A part of an application: what is in one of the ranges or has one of the names, at one of the ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Ranges.
    pub cidrs: Vec<IpNet>,
    /// Host names whose addresses are part of it too.
    pub hosts: Vec<HostPattern>,
    /// Ports; empty = all, and other protocols too.
    pub ports: Vec<PortRange>,
}

/// Everything, of both families.
fn everything() -> [IpNet; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()]
}

/// All that a rule names with the same ports. Which terms a rule has follows from what people write alone, and not from which addresses
/// are known.
#[derive(Clone, Debug, Default)]
pub(super) struct Term<'a> {
    /// Ports, ascending; empty = all, and other protocols too.
    pub ports: Vec<PortRange>,
    cidrs: Vec<&'a [IpNet]>,
    /// Countries.
    pub countries: &'a [String],
    hosts: Vec<&'a [HostPattern]>,
    /// Nobody knows what is meant: it may be any destination.
    anything: bool,
}

impl<'a> Term<'a> {
    /// The terms of a rule. What belongs to an application that is not known may be anything.
    pub fn of(rule: Rule<'a>, applications: &'a Applications) -> Vec<Term<'a>> {
        let mut terms: BTreeMap<Vec<PortRange>, Term<'a>> = BTreeMap::new();
        let (cidrs, countries, hosts) = (rule.cidrs(), rule.countries(), rule.own_hosts());
        if !(cidrs.is_empty() && countries.is_empty() && hosts.is_empty()) {
            let own = with(&mut terms, rule.ports());
            (own.cidrs, own.countries, own.hosts) = (vec![cidrs], countries, vec![hosts]);
        }
        for name in rule.applications() {
            let Some(endpoints) = applications.get(name) else {
                with(&mut terms, &[]).anything = true;
                continue;
            };
            for endpoint in endpoints {
                let term = with(&mut terms, &endpoint.ports);
                term.cidrs.push(&endpoint.cidrs);
                term.hosts.push(&endpoint.hosts);
            }
        }
        terms.into_iter().map(|(ports, term)| Term { ports, ..term }).collect()
    }

    /// All ranges: its own, and those of its countries.
    pub fn ranges(&self, inputs: &'a PolicyInputs) -> impl Iterator<Item = IpNet> {
        let of_countries = self.countries.iter().flat_map(|country| inputs.ranges_of(country));
        self.own_ranges(inputs).chain(of_countries.copied())
    }

    /// The ranges but for those of its countries, and what its host names are known to be. Without a table of countries theirs may be any.
    pub fn own_ranges(&self, inputs: &'a PolicyInputs) -> impl Iterator<Item = IpNet> {
        let any = self.anything || lacks(self.countries, inputs.countries.as_deref());
        let resolved = self.hosts.iter().flat_map(move |hosts| inputs.resolved.of(hosts));
        let cidrs = self.cidrs.iter().copied().flatten().copied();
        cidrs
            .chain(resolved.map(|address| IpNet::from(*address)))
            .chain(everything().into_iter().filter(move |_| any))
    }

    /// Whether the destinations of the other are its destinations, at ports that are its ports. Which ranges a country has, and which
    /// addresses a name, does not matter: what contains them all are the country or the name itself, or all addresses.
    pub fn contains(&self, other: &Term<'_>) -> bool {
        let within =
            |range: &IpNet| self.cidrs.iter().copied().flatten().any(|around| around.contains(range));
        let named =
            |host: &HostPattern| self.hosts.iter().copied().flatten().any(|pattern| pattern.contains(host));
        let reaches = self.anything
            || everything().iter().all(within)
            || !other.anything
                && other.cidrs.iter().copied().flatten().all(within)
                && other.countries.iter().all(|it| self.countries.contains(it))
                && other.hosts.iter().copied().flatten().all(named);
        reaches && covers(&self.ports, &other.ports)
    }
}

/// The term with these ports.
fn with<'t, 'a>(terms: &'t mut BTreeMap<Vec<PortRange>, Term<'a>>, ports: &[PortRange]) -> &'t mut Term<'a> {
    let mut ports = ports.to_vec();
    ports.sort_unstable();
    ports.dedup();
    terms.entry(ports).or_default()
}

/// Whether there are countries of which nothing is known.
fn lacks(countries: &[String], table: Option<&Countries>) -> bool {
    !countries.is_empty() && table.is_none()
}

impl<'a> Rule<'a> {
    /// Whether it names something of which nobody knows what it is: countries without a table of them, or an application that is missing.
    pub fn is_blind(self, inputs: &PolicyInputs) -> bool {
        lacks(self.countries(), inputs.countries.as_deref())
            || self.applications().iter().any(|name| !inputs.applications.contains_key(name))
    }

    /// All host names that it means, also by applications.
    pub fn hosts(self, applications: &'a Applications) -> impl Iterator<Item = &'a HostPattern> {
        let endpoints = self.applications().iter().filter_map(|name| applications.get(name)).flatten();
        self.own_hosts().iter().chain(endpoints.flat_map(|endpoint| &endpoint.hosts))
    }
}

/// Whether all of the one's ports are the other's, too.
fn covers(wide: &[PortRange], narrow: &[PortRange]) -> bool {
    // Several ranges together may contain one: so each of its ports has to be in the next that goes on from there.
    let contains = |range: &PortRange| {
        let mut next = u32::from(range.first);
        while next <= u32::from(range.last) {
            let reaches =
                wide.iter().filter(|it| it.protocol == range.protocol && u32::from(it.first) <= next);
            match reaches.map(|it| u32::from(it.last)).max().filter(|last| *last >= next) {
                Some(last) => next = last + 1,
                None => return false,
            }
        }
        true
    };
    wide.is_empty() || !narrow.is_empty() && narrow.iter().all(contains)
}
