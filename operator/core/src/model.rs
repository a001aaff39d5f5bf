//! What planning reads and writes. These types know nothing of Kubernetes; the operator translates.

use crate::egress::{Egress, Family, Kind};
use crate::selector::{Labels, Selector};
use crate::slice::{FIRST, LAST, SliceSet};
use ipnet::IpNet;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// Seconds since the Unix epoch.
pub type Seconds = i64;

/// Namespace and name of an `EgressAllocation`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllocationName {
    /// Namespace, which is the account.
    pub account: String,
    /// Name.
    pub name: String,
}

/// Everything a plan is made from. Order does not matter.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// All prefixes.
    pub prefixes: Vec<Prefix>,
    /// All allocations, also those being deleted.
    pub allocations: Vec<Allocation>,
    /// All nodes that exist (a Node object), with what their agents report.
    pub nodes: Vec<Node>,
    /// Ranges from which Services get their addresses.
    pub services: Vec<IpNet>,
    /// All `EgressAddress` objects as they stand, but for `frozen`.
    pub addresses: Vec<Address>,
    /// Those that are no part of planning (all of them are `withheld`), since their allocation or prefix can't be read. They
    /// count for their account.
    pub frozen: Vec<Address>,
    /// Labels of the namespaces of all accounts that have allocations or addresses, by name.
    pub namespaces: BTreeMap<String, Labels>,
    /// Now.
    pub now: Seconds,
    /// How long a slice rests between two holders; [`QUARANTINE`] but for tests.
    pub quarantine: Seconds,
    /// Slices in quarantine that rest on although their time has come: clocks of machines differ, and by one that
    /// nobody sets they have not rested for the whole of it under the eyes of the caller.
    pub unrested: BTreeMap<Egress, SliceSet>,
    /// Addresses that nobody gets, and whose holdings stay as they are if they stand, with what to tell the owner, if
    /// there is anything to tell (yet): what is known of them does not suffice to change them.
    pub withheld: BTreeMap<Egress, Option<String>>,
    /// Highest epochs known of addresses whose object is gone: one that is made anew gets a higher one.
    pub epochs: BTreeMap<Egress, i64>,
}

impl Default for Inputs {
    fn default() -> Inputs {
        Inputs {
            prefixes: Vec::new(),
            allocations: Vec::new(),
            nodes: Vec::new(),
            services: Vec::new(),
            addresses: Vec::new(),
            frozen: Vec::new(),
            namespaces: BTreeMap::new(),
            now: 0,
            quarantine: QUARANTINE,
            unrested: BTreeMap::new(),
            withheld: BTreeMap::new(),
            epochs: BTreeMap::new(),
        }
    }
}

impl Inputs {
    /// Whether a slice that is in quarantine until a time must rest on.
    pub fn rests(&self, address: Egress, slice: u8, until: Seconds) -> bool {
        self.now < until || self.unrested.get(&address).is_some_and(|slices| slices.contains(slice))
    }
}

/// An `AegisPrefix`.
#[derive(Clone, Debug, PartialEq)]
pub struct Prefix {
    /// Name.
    pub name: String,
    /// Creation time; of two prefixes that overlap the older one counts, then the first by name.
    pub created: Seconds,
    /// The range; every address of it is usable. An IPv6 one is at most a /64 long, or one address.
    pub cidr: IpNet,
    /// Ranges that are not to be allocated.
    pub reserved: Vec<IpNet>,
    /// Account that owns it.
    pub account: String,
    /// To whom else addresses of it may go.
    pub delegations: Vec<Delegation>,
    /// Being deleted: nothing new is taken from it, and it goes when none of its addresses is in use.
    pub deleting: bool,
}

/// Lets other accounts than the owner take addresses of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delegation {
    /// Name.
    pub name: String,
    /// To whom.
    pub to: Delegate,
    /// Most addresses that each of these accounts may have.
    pub max: u32,
}

/// To whom a prefix is delegated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delegate {
    /// The account of this name.
    Account(String),
    /// Accounts whose namespaces carry such labels.
    Namespaces(Selector),
}

/// An `EgressAllocation`.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Name.
    pub name: AllocationName,
    /// Creation time: where addresses are short, older allocations are served first, then by name.
    pub created: Seconds,
    /// Names of prefixes, in order of preference.
    pub prefixes: Vec<String>,
    /// Which addresses.
    pub request: AddressRequest,
    /// How many IPv6 /64s and single IPv6 addresses, beside a number of IPv4 addresses; not counted where the request is a list.
    pub ipv6: u32,
    /// Sites by name; empty = every node may hold slices.
    pub sites: BTreeMap<String, Site>,
    /// Slices that may be used of each address whose slices are ports: of IPv4 addresses and single IPv6 ones.
    pub slices: SliceSet,
    /// Slices of each of these that every eligible node holds.
    pub per_node_min: u32,
    /// Slices of each of these that a node can grow to. It takes nothing away from who holds more already.
    pub per_node_max: u32,
    /// Seconds without a renewal of its Lease after which a node sends no more from its addresses; never if there is
    /// none.
    pub fence: Option<Seconds>,
    /// Addresses that its status lists: those it had when somebody looked last.
    pub listed: BTreeSet<Egress>,
    /// Being deleted: its slices drain, and its addresses go when nothing is held any more.
    pub deleting: bool,
}

impl Allocation {
    /// How many addresses of a family it asks for, unless it lists them.
    pub fn count(&self, family: Family) -> Option<u32> {
        match (&self.request, family) {
            (AddressRequest::Explicit(_), _) => None,
            (AddressRequest::Count(count), Family::V4) => Some(*count),
            (AddressRequest::Count(_), Family::V6) => Some(self.ipv6),
        }
    }

    /// The same as it is for the addresses of a kind: of a /64 every node holds one slice, whatever its ports are.
    pub fn of(&self, kind: Kind) -> Cow<'_, Allocation> {
        if kind.has_ports() {
            return Cow::Borrowed(self);
        }
        Cow::Owned(Allocation {
            slices: SliceSet::range(FIRST, LAST),
            per_node_min: 1,
            per_node_max: 1,
            ..self.clone()
        })
    }
}

/// A set of nodes from which an allocation may leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Labels that its nodes carry, all of them. A node that matches several sites belongs to the first by name.
    pub selector: BTreeMap<String, String>,
    /// Its share of the slices of each address, in proportion to the other sites' weights.
    pub weight: u32,
}

/// Which addresses an allocation asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressRequest {
    /// As many IPv4 addresses as this, any.
    Count(u32),
    /// Exactly these.
    Explicit(Vec<Egress>),
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Labels of the Node object.
    pub labels: BTreeMap<String, String>,
    /// Its own addresses, which can't be egress addresses.
    pub addresses: Vec<IpAddr>,
    /// Ranges of its pods, which can't be in a prefix.
    pub pod_ranges: Vec<IpNet>,
    /// The agent has reported a tunnel address and is ready: only such a node is given new slices. A node that is
    /// not ready keeps what it has.
    pub ready: bool,
    /// The agent is being taken off the node and waits for its slices to be empty: it belongs to no site any more.
    pub leaving: bool,
    /// Slices wanted of each address, per allocation. An allocation that is missing here is not in demand: the node
    /// gets `min`, and gives back what it has beyond that if it is ready.
    pub demand: BTreeMap<AllocationName, u32>,
    /// Per address: the epoch that the node's data plane has.
    pub programmed: BTreeMap<Egress, Programmed>,
    /// Who holds its Lease.
    pub lease: Lease,
}

/// Who holds the Lease of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Lease {
    /// Nobody, as far as is known.
    #[default]
    Free,
    /// The node.
    Own,
    /// The operator, who took it over.
    Taken {
        /// For how long it has been so under the eyes of the caller, who has just made sure that it still is.
        waited: Duration,
    },
}

/// What a node reports of one address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Programmed {
    /// Epoch in force.
    pub epoch: i64,
    /// Draining slices of this node that carry no flow any more. Counts only when `epoch` is at least the epoch at
    /// which those slices began to drain.
    pub drained: SliceSet,
    /// The data plane keeps the deadline of the address's fence, as of that epoch.
    pub fenced: bool,
}

/// An `EgressAddress`: who holds which slices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: Egress,
    /// Prefix it was taken from.
    pub prefix: String,
    /// Allocation it is dedicated to.
    pub allocation: AllocationName,
    /// Grows by one with every change of `holdings` or `fence`. Starts at the second in which the address is made, so that it
    /// stays above whatever a former object of the same address reached.
    pub epoch: i64,
    /// Sorted by `first`, disjoint, neighbours of the same owner, epoch and state merged.
    pub holdings: Vec<Holding>,
    /// Deadline of nodes that can't renew their Lease, if there is one.
    pub fence: Option<Fence>,
}

/// A deadline of nodes that can't renew their Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fence {
    /// Seconds from the last renewal after which a node sends no more.
    pub after: Seconds,
    /// Epoch of the address at which this fence was set.
    pub epoch: i64,
}

impl Address {
    /// Whether some node may start flows from it.
    pub fn is_held(&self) -> bool {
        self.holdings.iter().any(|holding| holding.state == State::Held)
    }
}

/// Consecutive slices of one address in one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// First slice.
    pub first: u8,
    /// Last slice.
    pub last: u8,
    /// Node that holds, or last held, them.
    pub node: String,
    /// Epoch of the address at which this holding began (a change of state is a new beginning too).
    pub epoch: i64,
    /// State.
    pub state: State,
}

/// State of a holding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The node may start flows.
    Held,
    /// Flows that live go on, none starts.
    Draining,
    /// Nobody sends until this time.
    Quarantined {
        /// When the slices become free.
        until: Seconds,
    },
}

/// Most egress addresses of a cluster: the tables of every node's data plane have room for as many.
pub const MAX_ADDRESSES: usize = 1024;
/// Most allocations of a cluster that have addresses, for the same reason.
pub const MAX_ALLOCATIONS: usize = 1024;

/// Seconds that a slice rests between two holders, unless [`Inputs::quarantine`] says otherwise.
pub const QUARANTINE: Seconds = 120;
