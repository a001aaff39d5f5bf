//! Flows in `FORWARD` and `REVERSE`: finding, entering and ending them.
//!
//! The place of a removed entry is used for another at once, so that a program may still hold it when it becomes another
//! flow's. Values are therefore copied, and only then it is looked at whether the place is still the same entry's: see
//! `aegis_common`'s table. They also name their key: one that names another, or none any more, counts as not found.

use crate::atomics;
use crate::headers::TCP;
use crate::load;
use crate::maps;
use crate::meter;
use crate::ports;
use crate::table::{self, Forward, Reverse};
use aegis_common::*;
use aya_ebpf::helpers::bpf_get_prandom_u32;

/// A live flow as it was when it was looked at, or that there is none. (Not an `Option`: its unset half would be spilled to
/// the stack uninitialised, which the verifier refuses.)
#[derive(Clone, Copy)]
pub struct Found {
    pub value: ForwardValue,
    place: *mut ForwardValue,
}

/// The live flow with this key in `FORWARD`.
#[inline(always)]
pub fn find(key: &FlowKey) -> Found {
    let none = Found { value: ForwardValue::default(), place: core::ptr::null_mut() };
    let Some(seen) = table::find::<Forward>(key) else { return none };
    let place = seen.value;
    // Field by field, which keeps the copy off the stack; and `life` last: whoever ends a flow begins there.
    // SAFETY: map values stay readable until the program ends.
    let value = unsafe {
        ForwardValue {
            egress: (&raw const (*place).egress).read_volatile(),
            egress_port: (&raw const (*place).egress_port).read_volatile(),
            allocation: (&raw const (*place).allocation).read_volatile(),
            last_seen: (&raw const (*place).last_seen).read_volatile(),
            incarnation: (&raw const (*place).incarnation).read_volatile(),
            seen: (&raw const (*place).seen).read_volatile(),
            peer: (&raw const (*place).peer).read_volatile(),
            binding: (&raw const (*place).binding).read_volatile(),
            meter: (&raw const (*place).meter).read_volatile(),
            buried: (&raw const (*place).buried).read_volatile(),
            life: (&raw const (*place).life).read_volatile(),
        }
    };
    if seen.is_same() && value.is_of(key) { Found { value, place } } else { none }
}

impl Found {
    #[inline(always)]
    pub fn exists(&self) -> bool {
        !self.place.is_null()
    }

    /// Notes a packet of the flow.
    #[inline(always)]
    pub fn touch(&self, key: &FlowKey, flags: u8) {
        // SAFETY: map values stay writable until the program ends.
        let flow = unsafe { &mut *self.place };
        let now = maps::now();
        // Written only when it changes: the line stays shared between CPUs.
        if self.value.last_seen != now {
            flow.last_seen = now;
        }
        if key.protocol == TCP {
            let seen = if flags & (SYN | ACK) == SYN { reopened(&self.value, key) } else { self.value.seen };
            let seen = seen_after(seen, flags);
            if seen != self.value.seen {
                flow.seen = seen;
            }
        }
    }

    /// The word with what was seen in its lower half, for bits that are set while others write.
    #[inline(always)]
    pub fn seen_cell(&self) -> *mut u32 {
        // SAFETY: within the map value; the field is aligned to a word.
        unsafe { (&raw mut (*self.place).seen).cast() }
    }

    /// Takes back that the pod is gone: it has just sent a packet.
    #[inline(always)]
    pub fn unbury(&self, key: &FlowKey) {
        let back = find_back(&reverse_key(key, &self.value));
        if !self.exists() || !back.exists() {
            return;
        }
        // SAFETY: as in `touch`.
        unsafe {
            (*self.place).buried = 0;
            (*back.place).buried = 0;
        }
    }

    /// Lets nothing in for the flow any more: the next pod with the address has not asked for it.
    #[inline(always)]
    pub fn bury(&self, key: &FlowKey) {
        let back = find_back(&reverse_key(key, &self.value));
        if !self.exists() || !back.exists() {
            return;
        }
        // In this order: a packet out that comes between does not see it, but the next one does.
        // SAFETY: as in `touch`.
        unsafe {
            (&raw mut (*back.place).buried).write_volatile(1);
            (&raw mut (*self.place).buried).write_volatile(1);
        }
    }

    /// Ends the flow and gives its port back, unless somebody else does or the key has another flow by now.
    #[inline(always)]
    pub fn end(&self, key: &FlowKey) -> bool {
        end(key, &self.value)
    }
}

/// What a connection saw, which is forgotten when it has ended, by whichever side, and the pod uses its port for a new one.
#[inline(always)]
fn reopened(flow: &ForwardValue, key: &FlowKey) -> u8 {
    let back = find_back(&reverse_key(key, flow));
    if !back.exists() || (flow.seen | back.value.seen) & (SEEN_FIN | SEEN_RST) == 0 {
        return flow.seen;
    }
    // SAFETY: as in `Found::touch`.
    unsafe { (*back.place).seen = 0 };
    flow.seen & HAS_SECONDARY
}

/// The way back of a flow as it was when it was looked at, or that there is none.
#[derive(Clone, Copy)]
pub struct Back {
    pub value: ReverseValue,
    place: *mut ReverseValue,
}

/// The entry with this key in `REVERSE`.
#[inline(always)]
pub fn find_back(key: &FlowKey) -> Back {
    let none = Back { value: ReverseValue::default(), place: core::ptr::null_mut() };
    let Some(seen) = table::find::<Reverse>(key) else { return none };
    let place = seen.value;
    // SAFETY: as in `find`.
    let value = unsafe {
        ReverseValue {
            pod: (&raw const (*place).pod).read_volatile(),
            pod_port: (&raw const (*place).pod_port).read_volatile(),
            peer: (&raw const (*place).peer).read_volatile(),
            last_seen: (&raw const (*place).last_seen).read_volatile(),
            made: (&raw const (*place).made).read_volatile(),
            seen: (&raw const (*place).seen).read_volatile(),
            buried: (&raw const (*place).buried).read_volatile(),
            meter: REST_METER as u16,
            digest: (&raw const (*place).digest).read_volatile(),
        }
    };
    if seen.is_same() && value.digest == key.digest() { Back { value, place } } else { none }
}

impl Back {
    #[inline(always)]
    pub fn exists(&self) -> bool {
        !self.place.is_null()
    }

    /// The flow's meter. (Not copied with the rest, for the sake of the stack.)
    #[inline(always)]
    pub fn meter(&self) -> u16 {
        // SAFETY: map values stay readable until the program ends.
        unsafe { (&raw const (*self.place).meter).read_volatile() }
    }

    /// Notes a packet in of so many bytes that is taken to the pod, and meters it.
    #[inline(always)]
    pub fn receive(&self, seen: u8, bytes: u32) {
        self.touch(seen);
        meter::receives(u32::from(self.meter()), bytes);
    }

    /// Notes a packet in.
    #[inline(always)]
    pub fn touch(&self, seen: u8) {
        let now = maps::now();
        // SAFETY: as in `Found::touch`.
        let back = unsafe { &mut *self.place };
        if self.value.last_seen != now {
            back.last_seen = now;
        }
        if self.value.seen != seen {
            back.seen = seen;
        }
    }

    /// See [`Found::seen_cell`].
    #[inline(always)]
    pub fn seen_cell(&self) -> *mut u32 {
        // SAFETY: as there.
        unsafe { (&raw mut (*self.place).seen).cast() }
    }

    /// See [`Found::bury`].
    #[inline(always)]
    pub fn bury(&self) {
        // SAFETY: as in `Found::touch`.
        unsafe { (&raw mut (*self.place).buried).write_volatile(1) };
    }
}

/// A flow of which one packet is known, before it has a way.
#[inline(always)]
pub fn fresh(key: &FlowKey, flags: u8) -> ForwardValue {
    ForwardValue {
        // SAFETY: no arguments.
        life: ForwardValue::new_life(key, unsafe { bpf_get_prandom_u32() }),
        last_seen: maps::now(),
        seen: if key.protocol == TCP { seen_after(0, flags) } else { 0 },
        ..Default::default()
    }
}

/// The way back of a new flow: its value under `back_key` in `REVERSE`.
#[inline(always)]
pub fn back(back_key: &FlowKey, key: &FlowKey, flow: &ForwardValue) -> ReverseValue {
    ReverseValue {
        digest: back_key.digest(),
        pod: key.local,
        pod_port: key.local_port,
        peer: flow.peer,
        made: flow.last_seen,
        meter: flow.meter,
        ..Default::default()
    }
}

/// A flow, and how its packets leave.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Leaving {
    /// Key of the flow in `FORWARD`.
    pub key: FlowKey,
    pub way: Exit,
}

/// See `ForwardValue`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Exit {
    pub egress: u32,
    pub egress_port: u16,
    pub peer: u16,
    pub allocation: u16,
    pub meter: u16,
    /// Lower half of the flow's life; the upper one is in the key.
    life: u32,
}

impl Leaving {
    #[inline(always)]
    pub fn new(key: FlowKey) -> Leaving {
        Leaving { key, way: Exit { egress: 0, egress_port: 0, peer: 0, allocation: 0, meter: 0, life: 0 } }
    }

    /// Ends the flow: see [`Found::end`]. (Not where it was found, for the sake of the stack.)
    #[inline(always)]
    pub fn end(&self) {
        let life = u64::from(self.key.digest()) << 32 | u64::from(self.way.life);
        finish(&self.key, life, self.way.egress, u32::from(self.way.egress_port));
    }
}

impl Exit {
    /// As the flow does.
    #[inline(always)]
    pub fn like(&mut self, flow: &ForwardValue) {
        self.egress = flow.egress;
        self.egress_port = flow.egress_port;
        self.peer = flow.peer;
        self.allocation = flow.allocation;
        self.meter = flow.meter;
        self.life = flow.life as u32;
    }
}

/// What came of entering a flow.
pub enum Entered {
    /// It is in.
    New,
    /// The key has a flow: another CPU has made it, or is just ending it.
    Known,
    /// It is not, since there is no room for it.
    Refused,
}

/// Enters a flow into `FORWARD`, which decides who makes it.
#[inline(always)]
pub fn enter(key: &FlowKey, flow: &ForwardValue) -> Entered {
    match table::insert_forward(key, flow) {
        table::NEW => {
            maps::count(Counter::NewFlow, 0);
            Entered::New
        }
        table::KNOWN => Entered::Known,
        _ => Entered::Refused,
    }
}

/// Ends this very flow and gives its port back. False if somebody else does so, or the key has another flow by now.
#[inline(always)]
pub fn end(key: &FlowKey, flow: &ForwardValue) -> bool {
    finish(key, flow.life, flow.egress, u32::from(flow.egress_port)) != 0
}

/// A function of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn finish(key: *const FlowKey, life: u64, egress: u32, port: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's key.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    if maps::taking_over() {
        return 0;
    }
    let port = port as u16;
    let Some(seen) = table::find::<Forward>(key) else { return 0 };
    // SAFETY: map values stay writable until the program ends; no other flow has the same life.
    if !atomics::compare_exchange_u64(unsafe { &raw mut (*seen.value).life }, life, 0) {
        return 0;
    }
    // It has ended, and counts no more. (Said first for the sake of the stack: nothing of it is kept then.)
    // SAFETY: as above; nobody writes these fields once the flow is made.
    let (allocation, incarnation, peer, meter) = unsafe {
        let value = &*seen.value;
        (u32::from(value.allocation), value.incarnation, value.peer, u32::from(value.meter))
    };
    if egress != key.local {
        meter::ends(meter);
    }
    let pod = match peer != 0 && egress != key.local {
        true => load::GUEST,
        false => LoadKey::pod(key.local, incarnation, allocation).id,
    };
    load::discharge(pod, allocation);
    // The entry is ours now: nobody else removes it, and while it is there nobody makes another. So the way back goes
    // first, and the port, which keeps others from that, last.
    table::remove_reverse(&FlowKey { local: egress, local_port: port, ..*key });
    table::remove_forward(key);
    ports::release(&block_key(key, egress, port), port);
    1
}

/// The key in `REVERSE` of a flow with this key in `FORWARD`.
#[inline(always)]
pub fn reverse_key(key: &FlowKey, flow: &ForwardValue) -> FlowKey {
    FlowKey { local: flow.egress, local_port: flow.egress_port, ..*key }
}

/// The block that a flow's port belongs to.
#[inline(always)]
pub fn block_key(key: &FlowKey, egress: u32, egress_port: u16) -> BlockKey {
    BlockKey {
        egress,
        remote: key.remote,
        remote_port: key.remote_port,
        protocol: key.protocol,
        block: (egress_port >> 11) as u8,
    }
}
