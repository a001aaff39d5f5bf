//! States of the maps: what an agent could have written at some time, and flows of any age.

use crate::random::Random;
use crate::support::*;
use aegis_common::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// What the judges have to know of the maps.
#[derive(Debug)]
pub struct State {
    /// Slices that are this node's, by index of the address.
    pub own: [BTreeSet<u16>; 2],
    /// Pods that a binding covers.
    pub covered: BTreeSet<Ipv4Addr>,
}

const SLICES: [u16; 4] = [SLICE, SLICE_2, 9, 255];

impl State {
    /// As [`World::new`] has it.
    pub fn new() -> State {
        State { own: [[SLICE].into(), [SLICE].into()], covered: [POD, POD_2].into() }
    }

    /// Changes something.
    pub fn change(&mut self, world: &mut World, random: &mut Random) {
        match random.below(9) {
            0 => {
                let (address, slice) = (random.below(2), random.pick(&SLICES));
                let owner = random.pick(&[0, 1, 1, 2]);
                if owner == 1 {
                    self.own[address].insert(slice);
                } else if self.own[address].remove(&slice) {
                    // No flow may begin there before it is another's.
                    let left: Vec<u16> = self.own[address].iter().copied().collect();
                    world.allow([EGRESS, EGRESS_2][address], &left);
                }
                world.own(address as u32, slice, owner);
            }
            1 | 2 => {
                // Only what it owns, and of that not all: some drain.
                let address = random.below(2);
                let own: Vec<u16> = self.own[address].iter().copied().filter(|_| random.chance(80)).collect();
                world.allow([EGRESS, EGRESS_2][address], &own);
            }
            3 => {
                let pod = random.pick(&[POD, POD_2]);
                match random.below(3) {
                    0 => {
                        if self.covered.remove(&pod) {
                            world.remove_pod(pod);
                        }
                    }
                    1 => {
                        world.next_pod(pod, 1);
                        self.covered.insert(pod);
                    }
                    _ => {
                        world.pod_class(1, pod, 1);
                        self.covered.insert(pod);
                    }
                }
            }
            4 => {
                let address = random.pick(&[EGRESS, EGRESS_2]);
                let times = random.pick(&[(0, 0), (45, 60), (5, 10), (1, 1000)]);
                world.fence(address, times.0, times.1);
                world.renewed(random.pick(&[0, 7, 50, 100]), 10);
            }
            5 => world.home(random.below(2) as u32, random.pick(&[0, 1, 2])),
            6 => world.set_config(&Config {
                hold_unknown: random.pick(&[0, 1]),
                mss: random.pick(&[0, 536, 1424]),
                tunnel_mtu: random.pick(&[1464, 600, 8964]),
                ..config()
            }),
            // Through a gateway, or from here; and with one address or two.
            7 => match random.below(3) {
                0 => gateway::gateways(world, &[2], 1),
                1 => world.allocation(&[EGRESS], Timeouts::default()),
                _ => world.allocation(&[EGRESS, EGRESS_2], Timeouts::default()),
            },
            _ => {
                let value = AddressValue { index: 0, allocation: random.pick(&[0, 1]) };
                world.plane.hash("ADDRESSES").unwrap().insert(raw(EGRESS), value, 0).unwrap();
                // Its bitmaps count for another account, or for none.
                world.recount();
            }
        }
    }
}
