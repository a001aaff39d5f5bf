use super::*;
use aegis_core::model::{AllocationName, Holding};

const A: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 1));
const B: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 2));
/// 2001:db8:1:2::/64
const C: Egress = Egress::V6(0x2001_0db8_0001_0002);

struct World {
    addresses: BTreeMap<Ipv4Addr, Address>,
    networks: BTreeMap<Egress, Address>,
    modes: BTreeMap<String, AnnouncementMode>,
    nodes: BTreeMap<String, NodeRecord>,
    programmed: BTreeSet<Egress>,
    entry: bool,
    present: BTreeSet<IpNet>,
}

/// One node "n1" that holds slices of A, whose prefix says BGP.
fn world() -> World {
    let mut world = World {
        addresses: BTreeMap::new(),
        networks: BTreeMap::new(),
        modes: [("bgp".to_owned(), AnnouncementMode::BGP)].into(),
        nodes: [("n1".to_owned(), NodeRecord::default()), ("n2".to_owned(), NodeRecord::default())].into(),
        programmed: [A, B, C].into(),
        entry: true,
        present: BTreeSet::new(),
    };
    world.address(A, "bgp", &[("n1", State::Held)]);
    world
}

impl World {
    fn address(&mut self, address: Egress, prefix: &str, holders: &[(&str, State)]) {
        let holding = |(index, (node, state)): (usize, &(&str, State))| Holding {
            first: 4 + index as u8,
            last: 4 + index as u8,
            node: (*node).to_owned(),
            epoch: 1,
            state: *state,
        };
        let object = Address {
            address,
            prefix: prefix.into(),
            allocation: AllocationName { account: "shop".into(), name: "main".into() },
            epoch: 1,
            fence: None,
            holdings: holders.iter().enumerate().map(holding).collect(),
        };
        match address {
            Egress::V4(address) => self.addresses.insert(address, object),
            Egress::Single(single) => self.addresses.insert(crate::singles::stand_in(single), object),
            Egress::V6(_) => self.networks.insert(address, object),
        };
    }

    fn announced(&self) -> Vec<Egress> {
        self.routes().into_keys().collect()
    }

    fn routes(&self) -> BTreeMap<Egress, BTreeSet<IpNet>> {
        let facts = Facts {
            node: "n1",
            addresses: &self.addresses,
            networks: &self.networks,
            modes: &self.modes,
            nodes: &self.nodes,
            programmed: &self.programmed,
            entry: self.entry,
        };
        announced(&facts, &self.present)
    }

    fn drain(&mut self, node: &str) {
        self.nodes.get_mut(node).unwrap().draining = true;
    }
}

#[test]
fn a_holder_announces_what_it_sends_from_and_nothing_else() {
    let mut world = world();
    world.address(B, "bgp", &[("n2", State::Held)]);
    assert_eq!(world.announced(), [A]);
    for (state, expected) in
        [(State::Held, vec![A]), (State::Draining, vec![A]), (State::Quarantined { until: 9 }, vec![])]
    {
        world.address(A, "bgp", &[("n1", state)]);
        assert_eq!(world.announced(), expected, "{state:?}");
    }
}

#[test]
fn only_the_mode_bgp_is_announced_by_bgp() {
    let mut world = world();
    world.present = [A.range()].into();
    for mode in [AnnouncementMode::None, AnnouncementMode::L2] {
        world.modes.insert("bgp".into(), mode);
        assert_eq!(world.announced(), [] as [Egress; 0], "{mode:?}");
    }
}

#[test]
fn a_node_that_takes_nothing_announces_nothing() {
    let mut world = world();
    world.present = [A.range()].into();
    world.programmed = [B].into();
    assert_eq!(world.announced(), [] as [Egress; 0], "the data plane does not know the address");
    world = self::world();
    world.entry = false;
    assert_eq!(world.announced(), [] as [Egress; 0], "an uplink has no program");
}

#[test]
fn a_node_that_drains_leaves_it_to_others_if_there_are_any() {
    let mut world = world();
    world.drain("n1");
    assert_eq!(world.announced(), [A], "nobody else would");
    world.address(A, "bgp", &[("n1", State::Held), ("n2", State::Held)]);
    assert_eq!(world.announced(), [] as [Egress; 0]);
    world.nodes.get_mut("n2").unwrap().lost = true;
    assert_eq!(world.announced(), [A], "the other one is lost");
    world.nodes.get_mut("n2").unwrap().lost = false;
    world.drain("n2");
    assert_eq!(world.announced(), [A], "all drain");
    world.nodes.remove("n1");
    world.nodes.insert("n2".into(), NodeRecord::default());
    assert_eq!(world.announced(), [] as [Egress; 0], "this node's object is gone");
}

#[test]
fn what_is_announced_stays_when_its_object_or_its_prefix_vanishes() {
    let mut world = world();
    world.modes.clear();
    assert_eq!(world.announced(), [] as [Egress; 0], "nothing begins without a word");
    world.present = [A.range()].into();
    assert_eq!(world.announced(), [A], "no prefix");
    world.addresses.clear();
    assert_eq!(world.announced(), [A], "no object");
    world.programmed.clear();
    assert_eq!(world.announced(), [] as [Egress; 0], "and no flow");
}

#[test]
fn a_64_is_announced_whole_and_with_the_own_slice() {
    let mut world = world();
    world.address(C, "bgp", &[("n2", State::Held), ("n1", State::Held)]);
    let texts = |world: &World| -> Vec<String> {
        world.routes().remove(&C).into_iter().flatten().map(|it| it.to_string()).collect()
    };
    let both = ["2001:db8:1:2::/64", "2001:db8:1:2:5::/80"];
    assert_eq!(texts(&world), both);
    world.address(C, "bgp", &[("n2", State::Held), ("n1", State::Quarantined { until: 9 })]);
    assert_eq!(texts(&world), [] as [&str; 0]);
    // What there is stays as it is when the object is gone.
    world.present = both.map(|it| it.parse().unwrap()).into();
    world.networks.clear();
    assert_eq!(texts(&world), both);
    world.programmed.remove(&C);
    assert_eq!(texts(&world), [] as [&str; 0]);
}
