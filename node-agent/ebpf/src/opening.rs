//! Making new flows: from a port of this node, or through a gateway where it has none.

use crate::flow::{self, Entered, Leaving};
use crate::maps::{self, ALLOCATIONS, OPENING};
use crate::ports::{self, Claim};
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

/// Makes a flow of an allocation, or finds the one that another CPU has just made.
#[inline(always)]
pub fn make(leaving: &mut Leaving, allocation: u32, by: Opener, flags: u8) -> Result<(), Stop> {
    if maps::taking_over() {
        return Err(Stop::Drop(Counter::DropTakingOver));
    }
    let whose = u64::from(by.incarnation) << 32 | u64::from(by.binding) << 16 | u64::from(by.peer);
    let here = by.peer != 0 || ALLOCATIONS.get(allocation).is_some_and(|allocation| allocation.count != 0);
    let mut outcome = if here {
        open_here(leaving, allocation, whose, u32::from(flags))
    } else {
        open_through(leaving, allocation, whose, u32::from(flags))
    };
    if outcome == ports::FENCED && by.peer == 0 {
        let through = open_through(leaving, allocation, whose, u32::from(flags));
        if through != ports::UNAVAILABLE {
            outcome = through;
        }
    }
    match outcome {
        ports::TAKEN => Ok(()),
        ports::FENCED => Err(Stop::Refuse(Counter::RefuseFenced)),
        ports::UNAVAILABLE => Err(Stop::Refuse(Counter::RefuseUnavailable)),
        ports::NO_ROOM => Err(Stop::Refuse(Counter::RefuseTableFull)),
        // Another CPU is ending the flow that had the key.
        ENDING => Err(Stop::Drop(Counter::DropEnding)),
        // TCP tries again within a second, others when they like; a refusal they would take for the last word.
        ports::WAITING => {
            maps::count_pressure(allocation, PressureValue { waited: 1, refused: 0 });
            Err(Stop::Drop(Counter::DropWaiting))
        }
        _ => {
            maps::count_pressure(allocation, PressureValue { waited: 0, refused: 1 });
            Err(Stop::Refuse(Counter::RefuseNoPort))
        }
    }
}

/// In place of an outcome of `ports`.
const ENDING: u32 = 16;

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
        return ports::TAKEN;
    }
    // Undo, in the reverse order: port and way back are this call's own.
    table::remove_reverse(&flow::reverse_key(key, flow));
    ports::release(&flow::block_key(key, flow.egress, flow.egress_port), flow.egress_port);
    instead(leaving, entered)
}

/// Makes a new flow through a gateway. See `open_here`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_through(leaving: *mut Leaving, allocation: u32, whose: u64, flags: u32) -> u32 {
    // SAFETY: as above.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return ports::UNAVAILABLE };
    let peer = via::choose(allocation, leaving.key.digest()) as u16;
    if peer == 0 {
        return ports::UNAVAILABLE;
    }
    let Some(opening) = OPENING.get_ptr_mut(0) else { return ports::NO_ROOM };
    // SAFETY: as above.
    let Opening { claim: Claim { flow, .. }, back_key, back } = unsafe { &mut *opening };
    *back_key = leaving.key;
    *flow = fresh(back_key, allocation, whose, flags);
    flow.egress = back_key.local;
    flow.egress_port = back_key.local_port;
    flow.peer = peer;
    let entered = flow::enter(back_key, flow);
    let Entered::New = entered else { return instead(leaving, entered) };
    // Only by who has entered the flow, so that nobody else's way back is touched. One that is there has no flow.
    table::remove_reverse(back_key);
    *back = flow::back(back_key, back_key, flow);
    if table::insert_reverse(back_key, back) != table::NEW {
        flow::end(back_key, flow);
        return ports::NO_ROOM;
    }
    leaving.way.like(flow);
    ports::TAKEN
}

/// What a flow that could not be entered gives way to.
#[inline(always)]
fn instead(leaving: &mut Leaving, entered: Entered) -> u32 {
    if let Entered::Refused = entered {
        return ports::NO_ROOM;
    }
    let found = flow::find(&leaving.key);
    if !found.exists() {
        return ENDING;
    }
    leaving.way.like(&found.value);
    ports::TAKEN
}
