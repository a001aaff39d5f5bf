//! `EgressAddress`, in both directions.

use aegis_core::egress::Egress;
use aegis_core::model::{Address, AllocationName, Fence, Holding, State};
use aegis_core::slice::FIRST;
use aegis_crds::{AddressFence, AllocationRef, EgressAddress, EgressAddressSpec, HoldingState};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

/// Translates, or says what is wrong: somebody else than the operator wrote it then.
pub fn model(object: &EgressAddress) -> Result<Address, String> {
    let spec = &object.spec;
    let address: Egress =
        spec.address.parse().map_err(|_| "spec.address: neither an address nor an IPv6 /64".to_owned())?;
    if address.object_name() != object.name_any() {
        return Err(format!("spec.address: the object's name is not that of {:?}", spec.address));
    }
    let holdings = spec.holdings.iter().enumerate();
    let holdings: Vec<Holding> = holdings.map(|(index, it)| holding(index, it)).collect::<Result<_, _>>()?;
    if let Some(index) = holdings.windows(2).position(|pair| pair[0].last >= pair[1].first) {
        return Err(format!("spec.holdings[{}]: not above the one before", index + 1));
    }
    Ok(Address {
        address,
        prefix: spec.prefix.clone(),
        allocation: AllocationName {
            account: spec.allocation_ref.namespace.clone(),
            name: spec.allocation_ref.name.clone(),
        },
        epoch: spec.epoch,
        holdings,
        fence: spec.fence.map(|it| Fence { after: it.after_seconds.into(), epoch: it.epoch }),
    })
}

fn holding(index: usize, holding: &aegis_crds::Holding) -> Result<Holding, String> {
    let slice = |slice: u32| u8::try_from(slice).ok().filter(|slice| *slice >= FIRST);
    match (slice(holding.first), slice(holding.last)) {
        (Some(first), Some(last)) if first <= last => Ok(Holding {
            first,
            last,
            node: holding.node.clone(),
            epoch: holding.epoch,
            state: match holding.state {
                HoldingState::Held => State::Held,
                HoldingState::Draining => State::Draining,
                HoldingState::Quarantined => State::Quarantined {
                    until: holding
                        .until
                        .as_ref()
                        .map(|time| time.0.as_second())
                        .ok_or_else(|| format!("spec.holdings[{index}].until: missing"))?,
                },
            },
        }),
        _ => Err(format!("spec.holdings[{index}]: {} to {} are no slices", holding.first, holding.last)),
    }
}

/// The object's spec for an address.
pub fn spec(address: &Address) -> EgressAddressSpec {
    let holdings = address.holdings.iter().map(|holding| aegis_crds::Holding {
        first: holding.first.into(),
        last: holding.last.into(),
        node: holding.node.clone(),
        epoch: holding.epoch,
        state: match holding.state {
            State::Held => HoldingState::Held,
            State::Draining => HoldingState::Draining,
            State::Quarantined { .. } => HoldingState::Quarantined,
        },
        until: match holding.state {
            State::Quarantined { until } => {
                Some(Time(Timestamp::from_second(until).unwrap_or(Timestamp::MAX)))
            }
            State::Held | State::Draining => None,
        },
    });
    EgressAddressSpec {
        address: address.address.to_string(),
        prefix: address.prefix.clone(),
        allocation_ref: AllocationRef {
            namespace: address.allocation.account.clone(),
            name: address.allocation.name.clone(),
        },
        epoch: address.epoch,
        holdings: holdings.collect(),
        fence: address.fence.map(|fence| AddressFence {
            after_seconds: u32::try_from(fence.after).unwrap_or(u32::MAX),
            epoch: fence.epoch,
        }),
    }
}
