//! What a plan comes to when all that drains has drained, and has rested.

use aegis_core::holding::Rights;
use aegis_core::model::{Address, Inputs, Programmed, QUARANTINE, State};
use aegis_core::plan::{Plan, plan};

/// Turns after which it is told as it stands: each gives slices on once, so a few are enough.
const TURNS: usize = 64;

/// Plans on as if every agent had programmed what stands, no flow used what drains, and time went by.
pub fn settle(inputs: &Inputs, first: &Plan) -> Vec<Address> {
    let mut inputs = inputs.clone();
    let mut addresses = first.addresses.clone();
    for _ in 0..TURNS {
        for node in &mut inputs.nodes {
            for address in &addresses {
                let drained = Rights::of(address, &node.name).draining;
                let programmed =
                    Programmed { epoch: address.epoch, drained, fenced: address.fence.is_some() };
                node.programmed.insert(address.address, programmed);
            }
        }
        inputs.now += inputs.quarantine.max(QUARANTINE) + 1;
        inputs.unrested.clear();
        inputs.addresses.clone_from(&addresses);
        let next = plan(&inputs).addresses;
        let rests = next.iter().flat_map(|it| &it.holdings).any(|it| it.state != State::Held);
        if next == addresses && !rests {
            break;
        }
        addresses = next;
    }
    addresses
}
