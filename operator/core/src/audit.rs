//! Checks a plan, apart from the planner's code: what it finds is a mistake of the planner, or inputs that a
//! stranger wrote, and in both cases the plan must not be applied.

use crate::model::Inputs;
use crate::plan::Plan;
use std::net::Ipv4Addr;
use thiserror::Error;

/// An invariant that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// The same address twice, or not in ascending order.
    #[error("{address}: planned twice, or not in ascending order")]
    AddressOrder {
        /// The address.
        address: Ipv4Addr,
    },
}

/// Checks. `Err` holds every violation found.
pub fn audit(_inputs: &Inputs, plan: &Plan) -> Result<(), Vec<Violation>> {
    let pairs = plan.addresses.iter().zip(plan.addresses.iter().skip(1));
    let violations: Vec<Violation> = pairs
        .filter(|(a, b)| a.address >= b.address)
        .map(|(_, b)| Violation::AddressOrder { address: b.address })
        .collect();
    if violations.is_empty() { Ok(()) } else { Err(violations) }
}
