//! Meters as the agent reads them.

use super::six::{NETWORK, SINGLE, single_key};
use super::{EGRESS, EGRESS_2, World};
use aegis_core::egress::Egress;
use aegis_core::model::AllocationName;
use aegis_core::policy::RuleName;
use aegis_node_agent::meter::{Book, Look, Maps, Names, Step, Whose};
use aegis_node_agent::observed::from_map;
use aegis_usage_report::{Figures, Protocol, Row, Volume};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The agent's side.
pub struct Meters {
    pub maps: Maps,
    pub book: Book,
}

impl Meters {
    pub fn new(world: &World) -> Meters {
        let mut maps = Maps::open(&world.plane).unwrap();
        maps.withdraw().unwrap();
        maps.give_out().unwrap();
        let book = Book::new(maps.told().unwrap());
        Meters { maps, book }
    }

    pub fn read(&mut self) -> Look {
        self.maps.look(self.book.numbers()).unwrap()
    }

    /// Looks, and does what that leads to.
    pub fn look(&mut self) -> (Vec<Row>, Vec<Step>) {
        let look = self.read();
        let (rows, steps) = self.book.look(&look, Some(&names()));
        self.maps.follow(&steps).unwrap();
        (rows, steps)
    }

    /// Rows of what has come, which are told.
    pub fn rows(&mut self) -> BTreeMap<Place, Figures> {
        let (rows, _) = self.look();
        rows.into_iter()
            .map(|Row { key, figures }| ((key.address, key.origin, key.protocol, key.rule), figures))
            .collect()
    }
}

/// What a row is of: egress address, origin, protocol, rule.
pub type Place = (Option<IpAddr>, Option<SocketAddr>, Protocol, String);

pub fn names() -> Names {
    let network = Egress::containing(NETWORK.into());
    let whose = |name: &str, sole: &[Egress]| Whose {
        name: AllocationName { account: "shop".into(), name: name.into() },
        site: String::new(),
        sole: sole.iter().map(|egress| (egress.family(), *egress)).collect(),
    };
    let allocations =
        [(0, whose("first", &[EGRESS.into(), network])), (1, whose("second", &[EGRESS_2.into()]))];
    Names {
        rules: Arc::new([(3, RuleName::Policy("partners".into()))].into()),
        allocations: allocations.into(),
        addresses: [(EGRESS.into(), 0), (network, 0)].into(),
        singles: [(from_map(single_key(SINGLE)), SINGLE)].into(),
    }
}

pub fn volume(packets: u64, bytes: u64) -> Volume {
    Volume { packets, bytes }
}
