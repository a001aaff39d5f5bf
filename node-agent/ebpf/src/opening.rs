//! Making new flows: from a port of this node, or through a gateway where it has none.

use crate::flow::{self, Entered, Leaving};
use crate::load;
use crate::maps::{self, ALLOCATIONS, OPENING};
use crate::meter;
use crate::ports::{self, Claim};
use crate::six::leave::Outbound;
use crate::six::single::arrive::Inbound;
use crate::snat::Stop;
use crate::table;
use crate::via;
use aegis_common::*;

/// Whose a new flow is: see the fields of `ForwardValue`.
pub struct Opener {
    pub incarnation: u32,
    pub binding: u16,
    /// The node whose pod it is of; 0 = this one.
    pub peer: u16,
}

/// Makes a flow of an allocation for a pod of another node, or finds the one that another CPU has just made.
#[inline(always)]
pub fn make(leaving: &mut Leaving, allocation: u32, by: Opener, flags: u8) -> Result<(), Stop> {
    let whose = u64::from(by.incarnation) << 32 | u64::from(by.binding) << 16 | u64::from(by.peer);
    result(make_flow(leaving, allocation, whose, u32::from(flags) | allocation << 16, false))
}

/// The same of one of two allocations: of the second where the first has nothing that a flow could leave from now, be it a node or a
/// port towards the origin. What waits for the first to grow waits, and what a limit refuses is refused.
#[inline(always)]
pub fn make_of_either(
    leaving: &mut Leaving,
    allocations: [u16; 2],
    by: Opener,
    flags: u8,
) -> Result<(), Stop> {
    let whose = u64::from(by.incarnation) << 32 | u64::from(by.binding) << 16 | u64::from(by.peer);
    let [mut allocation, second] = allocations.map(u32::from);
    let mut first = MADE;
    // A loop, since a function of its own would be one call too deep.
    loop {
        let made = make_flow(leaving, allocation, whose, u32::from(flags) | second << 16, true);
        if first != MADE {
            if made == MADE {
                maps::count(Counter::SecondaryFlow, 0);
                return Ok(());
            }
            // Why the first is not left from is told, unless the second is left from.
            return result(first);
        }
        if allocation == second || made != NO_PORT && made != NOBODY && made != LAPSED {
            return result(made);
        }
        (first, allocation) = (made, second);
    }
}

/// Makes a flow over IPv6 from a single address of an allocation, or finds the one that another CPU has just made. With `another`
/// allocation to turn to, [`for_another`] says whether that is to be done.
#[inline(always)]
pub fn make_single(leaving: &mut Leaving, allocation: u32, by: Opener, flags: u8) -> u32 {
    let whose = u64::from(by.incarnation) << 32 | u64::from(by.binding) << 16;
    make_flow(leaving, allocation, whose, u32::from(flags) | allocation << 16, true)
}

/// Whether an allocation has nothing that a flow could leave from now, so that another one is turned to.
#[inline(always)]
pub fn for_another(made: u32) -> bool {
    made == NO_PORT || made == NOBODY || made == LAPSED
}

/// There is a flow.
pub const MADE: u32 = u32::MAX;
/// With a counter: the packet is dropped without an answer.
pub const SILENT: u32 = 1 << 16;
const NO_PORT: u32 = Counter::RefuseNoPort as u32;
const NOBODY: u32 = Counter::RefuseUnavailable as u32;
const LAPSED: u32 = Counter::RefuseFenced as u32;

/// What [`make_flow`] has given.
#[inline(always)]
pub fn result(made: u32) -> Result<(), Stop> {
    if made == MADE {
        return Ok(());
    }
    let counter = Counter::from_index(made & !SILENT).unwrap_or(Counter::RefuseUnavailable);
    Err(if made & SILENT != 0 { Stop::Drop(counter) } else { Stop::Refuse(counter) })
}

#[inline(always)]
fn drop(counter: Counter) -> u32 {
    SILENT | counter as u32
}

/// Makes a flow: [`MADE`], or the counter of why not. The upper half of `flags` is the allocation that is turned to if no port can be had
/// of this one; the same, if there is no other. `local`: the pod is this node's, as the caller
/// knows when it is compiled: a gateway has no use for others, and no stack.
#[inline(always)]
fn make_flow(leaving: &mut Leaving, allocation: u32, whose: u64, flags: u32, local: bool) -> u32 {
    if maps::taking_over() {
        return drop(Counter::DropTakingOver);
    }
    match admitted(leaving, allocation, whose) {
        load::ADMITTED => (),
        FOUND => return MADE,
        load::LOST => return drop(Counter::DropEnding),
        load::NO_COUNT => return Counter::RefuseTableFull as u32,
        limit => return reason(limit) as u32,
    }
    let remote = leaving.key.remote;
    // Over IPv6 there are no gateways.
    let here = !local
        || is_stand_in(remote)
        || ALLOCATIONS.get(allocation).is_some_and(|allocation| allocation.own(remote).1 != 0);
    let mut outcome = if here {
        open_here(leaving, allocation, whose, flags)
    } else {
        open_through(leaving, allocation, whose, flags)
    };
    if outcome == ports::FENCED && local && !is_stand_in(remote) {
        let through = open_through(leaving, allocation, whose, flags);
        if through != ports::UNAVAILABLE {
            outcome = through;
        }
    }
    // What has been entered counts until it ends.
    if outcome != ports::TAKEN && outcome != ENDED {
        give_up(leaving, allocation, whose, outcome);
    }
    match outcome {
        ports::TAKEN | FOUND => MADE,
        ports::FENCED => LAPSED,
        ports::OVER_SHARE => reason(load::ACCOUNT_FLOWS) as u32,
        ports::UNAVAILABLE => NOBODY,
        ports::NO_ROOM | ENDED => Counter::RefuseTableFull as u32,
        ENDING => drop(Counter::DropEnding),
        // TCP tries again within a second, others when they like; a refusal they would take for the last word.
        ports::WAITING => {
            maps::count_pressure(allocation, PressureValue { waited: 1, refused: 0 });
            drop(Counter::DropWaiting)
        }
        _ => {
            maps::count_pressure(allocation, PressureValue { waited: 0, refused: 1 });
            NO_PORT
        }
    }
}

/// Whom a flow counts for.
#[inline(always)]
fn pod(key: &FlowKey, allocation: u32, whose: u64) -> u64 {
    match whose as u16 {
        0 => LoadKey::pod(key.local, (whose >> 32) as u32, allocation).id,
        _ => load::GUEST,
    }
}

/// Counts a flow that is to be made: an outcome of `load`, or [`FOUND`]. A function of its own for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn admitted(leaving: *mut Leaving, allocation: u32, whose: u64) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return load::LOST };
    let pod = pod(&leaving.key, allocation, whose);
    let outcome = load::admit(pod, allocation);
    // Another CPU may just have made it, and be the one that was admitted.
    if outcome != load::ADMITTED && instead(leaving, Entered::Known) == FOUND {
        return FOUND;
    }
    if outcome != load::ADMITTED {
        load::count_limited(pod, allocation, outcome);
    }
    outcome
}

/// Takes back what was counted of a flow that was not made. See [`admitted`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn give_up(leaving: *const Leaving, allocation: u32, whose: u64, outcome: u32) -> u32 {
    // SAFETY: as above.
    let Some(leaving) = (unsafe { leaving.as_ref() }) else { return 0 };
    let pod = pod(&leaving.key, allocation, whose);
    if outcome == ports::OVER_SHARE {
        load::count_limited(pod, allocation, load::ACCOUNT_FLOWS);
    }
    load::discharge(pod, allocation)
}

/// Why a limit has refused a flow.
#[inline(always)]
fn reason(limit: u32) -> Counter {
    match limit {
        load::POD_FLOWS => Counter::RefusePodFlows,
        load::POD_RATE => Counter::RefusePodRate,
        load::ACCOUNT_FLOWS => Counter::RefuseAccountFlows,
        _ => Counter::RefuseAccountRate,
    }
}

// In place of an outcome of `ports`.
/// Another CPU is ending the flow that has the key.
const ENDING: u32 = 16;
/// Another CPU has made it.
const FOUND: u32 = 17;
/// It was made, found no room for its way back, and has been ended.
const ENDED: u32 = 18;

#[inline(always)]
fn fresh(key: &FlowKey, allocation: u32, whose: u64, flags: u32) -> ForwardValue {
    ForwardValue {
        allocation: allocation as u16,
        incarnation: (whose >> 32) as u32,
        binding: (whose >> 16) as u16,
        peer: whose as u16,
        ..flow::fresh(key, flags as u8)
    }
}

/// What would be too large for the stack.
#[repr(C)]
pub struct Opening {
    pub claim: Claim,
    /// The way back: its key in `REVERSE`, and its value.
    pub back_key: FlowKey,
    pub back: ReverseValue,
    /// What it is metered by.
    pub meter: MeterKey,
    /// Allocation that a guest has asked for: see `guest`.
    pub asked: u32,
    /// A gateway of which it is asked whether it has a port: see `via`.
    pub spent: SpentKey,
    /// What the policy says of a flow over IPv6 that is to leave from a single address: see `six::single`.
    pub single: Asked,
    /// A packet of it, and one that comes in for one.
    pub outbound: Outbound,
    pub inbound: Inbound,
}

/// See [`Opening::single`].
#[repr(C)]
pub struct Asked {
    /// The origin, for which a stand-in is in the keys.
    pub remote: Address6,
    /// Generation of the policy that was asked.
    pub generation: u32,
    /// Allocation to leave from.
    pub allocation: u32,
    /// The one to turn to if it has nothing; the same, if there is no other, or it is this one.
    pub secondary: u32,
    /// Number of the rule.
    pub rule: u32,
    /// 1: `allocation` is the policy's secondary.
    pub is_second: u32,
}

/// Takes a port for a new flow and enters it. A function of its own for the verifier's sake, like `take` in `ports`, and for
/// that of the stack. Gives an outcome of `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_here(leaving: *mut Leaving, allocation: u32, whose: u64, flags: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return ports::UNAVAILABLE };
    let Some(opening) = OPENING.get_ptr_mut(0) else { return ports::NO_ROOM };
    // SAFETY: a per-CPU value that only this function uses; programs on one CPU do not nest here.
    let opening = unsafe { &mut *opening };
    opening.claim = Claim {
        key: leaving.key,
        flow: fresh(&leaving.key, allocation, whose, flags),
        start: mix(leaving.key.remote ^ u32::from(leaving.key.remote_port)) & (BLOCKS_PER_ADDRESS - 1),
        address: 0,
        left: 0,
        outcome: ports::UNAVAILABLE,
        blocks: 0,
        turn: 0,
    };
    let mut tries = 0;
    while tries < ports::TRIES {
        ports::claim_port();
        if opening.claim.outcome != ports::TAKEN || ports::enter(opening) {
            break;
        }
        tries += 1;
    }
    let claim = &opening.claim;
    if claim.outcome != ports::TAKEN {
        return claim.outcome;
    }
    let (key, flow) = (&claim.key, &claim.flow);
    let entered = flow::enter(key, flow);
    if let Entered::New = entered {
        leaving.way.like(flow);
        meter::begins(u32::from(leaving.way.meter));
        return ports::TAKEN;
    }
    undo(key, flow.egress, u32::from(flow.egress_port));
    instead(leaving, entered)
}

/// Gives a port back and removes the way back, in this order's reverse: both are the caller's own. See [`admitted`] for why this is a
/// function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn undo(key: *const FlowKey, egress: u32, port: u32) -> u32 {
    // SAFETY: as above.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let port = port as u16;
    table::remove_reverse(&FlowKey { local: egress, local_port: port, ..*key });
    ports::release(&flow::block_key(key, egress, port), port);
    0
}

/// Makes a new flow through a gateway. See `open_here`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_through(leaving: *mut Leaving, allocation: u32, whose: u64, flags: u32) -> u32 {
    // SAFETY: as above.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return ports::UNAVAILABLE };
    let chosen = via::choose(allocation, &raw const leaving.key);
    if chosen == 0 {
        return ports::UNAVAILABLE;
    }
    let another = flags >> 16 != allocation;
    // With no other way the gateway is to judge: it answers at once, and may have a port by now.
    if chosen & via::SPENT != 0 && another {
        return ports::FULL;
    }
    let peer = chosen as u16;
    let Some(opening) = OPENING.get_ptr_mut(0) else { return ports::NO_ROOM };
    // SAFETY: as above.
    let Opening { claim: Claim { flow, .. }, back_key, back, .. } = unsafe { &mut *opening };
    *back_key = leaving.key;
    *flow = fresh(back_key, allocation, whose, flags);
    flow.egress = back_key.local;
    flow.egress_port = back_key.local_port;
    flow.peer = peer;
    if another {
        flow.seen |= HAS_SECONDARY;
    }
    let entered = flow::enter(back_key, flow);
    let Entered::New = entered else { return instead(leaving, entered) };
    // Only by who has entered the flow, so that nobody else's way back is touched. One that is there has no flow.
    table::remove_reverse(back_key);
    *back = flow::back(back_key, back_key, flow);
    if table::insert_reverse(back_key, back) != table::NEW {
        flow::end(back_key, flow);
        return ENDED;
    }
    leaving.way.like(flow);
    ports::TAKEN
}

/// What a flow that could not be entered gives way to.
#[inline(always)]
fn instead(leaving: &mut Leaving, entered: Entered) -> u32 {
    match entered {
        Entered::Refused => ports::NO_ROOM,
        _ => join(leaving),
    }
}

/// Leaves as the flow does that another CPU has made. See [`admitted`] for why this is a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn join(leaving: *mut Leaving) -> u32 {
    // SAFETY: as above.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return ENDING };
    let found = flow::find(&leaving.key);
    if !found.exists() {
        return ENDING;
    }
    leaving.way.like(&found.value);
    FOUND
}
