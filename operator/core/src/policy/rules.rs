//! What people write: bindings and policies, and the pods that they are about.

use super::names::HostPattern;
use super::ports::PortRange;
use super::posture::{Conditions, NodeFacts, Posture};
use crate::model::AllocationName;
use crate::selector::{Labels, Selector, matches_labels};
use ipnet::IpNet;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Ranges of each country, by its ISO 3166-1 alpha-2 code.
pub type Countries = BTreeMap<String, Vec<IpNet>>;

/// Namespace and name of a `ZoneBinding`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingName {
    /// Namespace, which is the account.
    pub account: String,
    /// Name.
    pub name: String,
}

/// A `ZoneBinding`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name.
    pub name: BindingName,
    /// Allocation to leave from.
    pub allocation: AllocationName,
    /// Switched on.
    pub enabled: bool,
    /// Which pods of the account.
    pub workloads: Workloads,
    /// Which destinations.
    pub cidrs: Vec<IpNet>,
    /// Which destination ports; empty = all, and other protocols too.
    pub ports: Vec<PortRange>,
    /// Host names whose addresses are destinations too.
    pub hosts: Vec<HostPattern>,
    /// While the allocation is not usable on this node, leave with the node's address instead of being refused.
    pub use_node_address: bool,
    /// Connections of pods of the host network leave from sockets that have the egress address themselves.
    pub binds: bool,
    /// `metadata.generation`; no part of the rules, it is what the agent reports as enforced.
    pub generation: i64,
}

/// Which pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workloads {
    /// Labels that the pod carries.
    pub labels: BTreeMap<String, String>,
    /// Further conditions on its labels.
    pub expressions: Vec<Expression>,
    /// Service accounts, one of which it runs as; empty = any.
    pub service_accounts: Vec<String>,
    /// All pods of the account.
    pub all: bool,
}

/// A condition on labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// Key of the label.
    pub key: String,
    /// What is asked of it.
    pub operator: Operator,
    /// Values for `In` and `NotIn`.
    pub values: Vec<String>,
}

/// Operator of an [`Expression`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is missing or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is missing.
    DoesNotExist,
}

/// A pod of this node that runs (one that has ended no longer owns its address and must be left out).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace, which is the account.
    pub account: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account that it runs as.
    pub service_account: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Has the node's addresses, not one of its own.
    pub host_network: bool,
    /// Labels of its namespace.
    pub namespace_labels: Labels,
    /// Its conditions.
    pub conditions: Conditions,
}

/// An `EgressPolicy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Name.
    pub name: String,
    /// Lower ones come first, equal ones by name.
    pub precedence: i32,
    /// Which pods.
    pub identity: Identity,
    /// In which state they and their node are.
    pub posture: Posture,
    /// Ranges that the pod's address is in; empty = any.
    pub sources: Vec<IpNet>,
    /// Which destinations.
    pub cidrs: Vec<IpNet>,
    /// Those of these countries too.
    pub countries: Vec<String>,
    /// Which ports of these destinations; empty = all, and other protocols too.
    pub ports: Vec<PortRange>,
    /// Host names whose addresses are destinations too.
    pub hosts: Vec<HostPattern>,
    /// Named applications that are destinations too, with their own ports.
    pub applications: Vec<String>,
    /// What happens.
    pub exit: Exit,
    /// Nothing happens: what would is counted.
    pub observes: bool,
    /// `metadata.generation`; no part of the rules.
    pub generation: i64,
}

/// Which pods of the cluster. A pod must match everything that is given; nothing given = every pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Namespaces, one of which it is in; empty = any.
    pub namespaces: Vec<String>,
    /// What is asked of its namespace's labels; nothing = any.
    pub namespace_selector: Option<Selector>,
    /// Labels that the pod carries.
    pub labels: BTreeMap<String, String>,
    /// Further conditions on its labels.
    pub expressions: Vec<Expression>,
    /// Service accounts of its namespace, one of which it runs as; empty = any.
    pub service_accounts: Vec<String>,
    /// It may have the node's addresses.
    pub host_network: bool,
}

/// What an [`EgressPolicy`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Leave from an allocation of the pod's own account.
    Allocations {
        /// Its name.
        primary: String,
        /// That of the one to leave from where the first has nothing to leave from.
        secondary: Option<String>,
    },
    /// Leave with the node's address.
    Default,
    /// Be refused.
    Deny,
}

/// Names a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleName {
    /// An `EgressPolicy`.
    Policy(String),
    /// A `ZoneBinding`.
    Binding(BindingName),
}

impl RuleName {
    /// The binding, if it is one.
    pub fn binding(&self) -> Option<&BindingName> {
        match self {
            RuleName::Policy(_) => None,
            RuleName::Binding(name) => Some(name),
        }
    }
}

impl From<BindingName> for RuleName {
    fn from(name: BindingName) -> RuleName {
        RuleName::Binding(name)
    }
}

/// Everything that says where packets leave: policies first, by precedence and name, then bindings by name. A rule's number is its
/// place among them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule<'a> {
    Policy(&'a EgressPolicy),
    Binding(&'a Binding),
}

/// Which of two rules that cover a packet counts: the lesser.
pub(super) type Rank = (bool, Reverse<u8>, usize);

/// Policies in the order in which they are asked.
pub fn in_order(policies: &[EgressPolicy]) -> Vec<&EgressPolicy> {
    let mut policies: Vec<&EgressPolicy> = policies.iter().collect();
    policies.sort_by(|a, b| (a.precedence, &a.name).cmp(&(b.precedence, &b.name)));
    policies
}

impl<'a> Rule<'a> {
    /// All that are switched on, in order.
    pub fn all(policies: &'a [EgressPolicy], bindings: &'a [Binding]) -> Vec<Rule<'a>> {
        let policies = in_order(policies);
        let mut bindings: Vec<&Binding> = bindings.iter().filter(|binding| binding.enabled).collect();
        bindings.sort_by(|a, b| a.name.cmp(&b.name));
        policies.into_iter().map(Rule::Policy).chain(bindings.into_iter().map(Rule::Binding)).collect()
    }

    pub fn name(self) -> RuleName {
        match self {
            Rule::Policy(policy) => RuleName::Policy(policy.name.clone()),
            Rule::Binding(binding) => RuleName::Binding(binding.name.clone()),
        }
    }

    /// Account whose pods alone it can select.
    pub fn account(self) -> Option<&'a str> {
        match self {
            Rule::Policy(_) => None,
            Rule::Binding(binding) => Some(&binding.name.account),
        }
    }

    /// Whether it selects the pod, where that has this address (a pod of the host network has none of its own).
    pub fn selects(self, pod: &Pod, address: Option<IpAddr>, node: &NodeFacts) -> bool {
        match self {
            Rule::Policy(policy) => {
                policy.selects(pod, node)
                    && (policy.sources.is_empty()
                        || address.is_some_and(|own| policy.sources.iter().any(|range| range.contains(&own))))
            }
            Rule::Binding(binding) => binding.name.account == pod.account && binding.workloads.matches(pod),
        }
    }

    /// Whether it only tells what would happen.
    pub fn observes(self) -> bool {
        matches!(self, Rule::Policy(policy) if policy.observes)
    }

    /// Whether it refuses, and says so.
    pub fn denies(self) -> bool {
        matches!(self, Rule::Policy(policy) if policy.exit == Exit::Deny)
    }

    /// What it says of destinations, in words.
    pub fn destinations(self) -> Vec<String> {
        let cidrs = self.cidrs().iter().map(ToString::to_string);
        let hosts = self.own_hosts().iter().map(|host| host.as_str().to_owned());
        let applications = self.applications().iter().map(|name| format!("application {name}"));
        cidrs.chain(self.countries().iter().cloned()).chain(hosts).chain(applications).collect()
    }

    pub fn cidrs(self) -> &'a [IpNet] {
        match self {
            Rule::Policy(policy) => &policy.cidrs,
            Rule::Binding(binding) => &binding.cidrs,
        }
    }

    pub fn countries(self) -> &'a [String] {
        match self {
            Rule::Policy(policy) => &policy.countries,
            Rule::Binding(_) => &[],
        }
    }

    /// Those that it names itself.
    pub fn own_hosts(self) -> &'a [HostPattern] {
        match self {
            Rule::Policy(policy) => &policy.hosts,
            Rule::Binding(binding) => &binding.hosts,
        }
    }

    pub fn applications(self) -> &'a [String] {
        match self {
            Rule::Policy(policy) => &policy.applications,
            Rule::Binding(_) => &[],
        }
    }

    /// Those that go with what it names itself.
    pub fn ports(self) -> &'a [PortRange] {
        match self {
            Rule::Policy(policy) => &policy.ports,
            Rule::Binding(binding) => &binding.ports,
        }
    }

    /// Place among the rules that cover a packet, of which this one does so by a range of this length: policies go before
    /// bindings; of these the longest range counts first.
    pub fn rank(self, number: usize, length: u8) -> Rank {
        match self {
            Rule::Policy(_) => (false, Reverse(0), number),
            Rule::Binding(_) => (true, Reverse(length), number),
        }
    }

    /// What of a range's length matters to [`Rule::rank`].
    pub fn length(self, length: u8) -> u8 {
        match self {
            Rule::Policy(_) => 0,
            Rule::Binding(_) => length,
        }
    }

    /// Allocations that a pod of an account leaves from by it, in order.
    pub fn allocations(self, account: &str) -> Vec<AllocationName> {
        let own = |name: &String| AllocationName { account: account.to_owned(), name: name.clone() };
        match self {
            Rule::Policy(EgressPolicy { exit: Exit::Allocations { primary, secondary }, .. }) => {
                std::iter::once(primary).chain(secondary).map(own).collect()
            }
            Rule::Policy(_) => Vec::new(),
            Rule::Binding(binding) => vec![binding.allocation.clone()],
        }
    }

    /// Whether packets leave with the node's address where none of the allocations can be left from.
    pub fn passes_without(self) -> bool {
        match self {
            Rule::Policy(policy) => policy.exit == Exit::Default,
            Rule::Binding(binding) => binding.use_node_address,
        }
    }
}

impl EgressPolicy {
    /// Whether it is about the pod, wherever that has its address from.
    pub fn selects(&self, pod: &Pod, node: &NodeFacts) -> bool {
        self.identity.matches(pod) && self.posture.matches(pod, node)
    }
}

impl Workloads {
    /// Whether the pod (of the same account) is selected: by `all`, or by everything else that is given. Workloads
    /// that give nothing select no pod.
    pub fn matches(&self, pod: &Pod) -> bool {
        if self.all {
            return true;
        }
        let given =
            !(self.labels.is_empty() && self.expressions.is_empty() && self.service_accounts.is_empty());
        given && selects(&self.labels, &self.expressions, &self.service_accounts, pod)
    }
}

impl Identity {
    /// Whether the pod is selected.
    pub fn matches(&self, pod: &Pod) -> bool {
        (self.host_network || !pod.host_network)
            && (self.namespaces.is_empty() || self.namespaces.contains(&pod.account))
            && self.namespace_selector.as_ref().is_none_or(|it| it.matches(&pod.namespace_labels))
            && selects(&self.labels, &self.expressions, &self.service_accounts, pod)
    }
}

fn selects(
    labels: &BTreeMap<String, String>,
    expressions: &[Expression],
    service_accounts: &[String],
    pod: &Pod,
) -> bool {
    matches_labels(labels, &pod.labels)
        && expressions.iter().all(|expression| expression.matches(&pod.labels))
        && (service_accounts.is_empty() || service_accounts.contains(&pod.service_account))
}
