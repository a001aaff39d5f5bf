//! Random frames through the real programs, with random states of the maps. An eBPF program cannot crash, so what is looked for is
//! foreign packets that are dropped or changed, sources that leak, packets that nobody asked for, checksums that are made wrong,
//! and counters and tables that do not add up.
//!
//! `AEGIS_FUZZ=n` says how many frames (30,000 if it does not), `AEGIS_FUZZ_SEED=n` which; a failure names its seed.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod frames;
mod judge;
mod random;
mod six;
mod state;
#[path = "../support/mod.rs"]
mod support;

use frames::Frames;
use judge::{Judgement, Run};
use random::Random;
use state::State;
use std::collections::BTreeMap;
use support::*;

/// Frames between two changes of the maps.
const PERIOD: usize = 20;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap())
}

/// The node under test, with what the test knows of it.
struct Fuzz {
    world: World,
    state: State,
    frames: Frames,
    random: Random,
    /// Verdicts and what was counted, over all frames.
    seen: BTreeMap<(&'static str, &'static str), u64>,
}

impl Fuzz {
    fn note(&mut self, program: &'static str, counted: &[(&'static str, u64)]) {
        for (label, count) in counted {
            *self.seen.entry((program, label)).or_default() += count;
        }
        if counted.is_empty() {
            *self.seen.entry((program, "passed")).or_default() += 1;
        }
    }

    /// A frame of a pod: to the classifier, and if that lets it pass, as conntrack would have it, to the uplink.
    fn out(&mut self) -> (Vec<u8>, Judgement) {
        let frame = self.frames.out(&mut self.random);
        let mark = self.random.pick(&[0, MARK, OTHER_MARK, MARK | OTHER_MARK]);
        let result = self.world.pod(&frame, mark);
        let counted = self.world.counted();
        self.note("pod_ingress", &counted);
        let run = Run { before: &frame, after: &result.frame, verdict: result.verdict, counted: &counted };
        let judged = judge::pod_ingress(&run, (mark, result.mark), &self.state);
        if judged.is_err() || result.verdict != TCX_NEXT && self.random.chance(90) {
            return (frame, judged);
        }
        // Of a flow from before, or by somebody's mistake, the mark may be another by then.
        let mark = if self.random.chance(90) { result.mark } else { result.mark ^ MARK };
        let result = if mark & MARK == 0 { self.world.out_unmarked(&frame) } else { self.world.out(&frame) };
        let counted = self.world.counted();
        self.note("uplink_egress", &counted);
        let run = Run { before: &frame, after: &result.frame, verdict: result.verdict, counted: &counted };
        let judged = judge::uplink_egress(&run, mark, &self.state, &mut self.world);
        match result.verdict {
            TCX_NEXT if mark & MARK != 0 => self.frames.note(&result.frame, &mut self.random),
            // What comes back from a gateway is for the pod's own address.
            TCX_REDIRECT if counted.contains(&("to_gateway", 1)) => {
                self.frames.note(&frame, &mut self.random)
            }
            _ => (),
        }
        (frame, judged)
    }

    fn back(&mut self) -> (Vec<u8>, Judgement) {
        let frame = self.frames.back(&mut self.random);
        let (verdict, after) = self.world.back(&frame);
        let counted = self.world.counted();
        self.note("uplink_ingress", &counted);
        let run = Run { before: &frame, after: &after, verdict, counted: &counted };
        let judged = judge::uplink_ingress(&run, &self.state, &mut self.world);
        (frame, judged)
    }
}

#[test]
fn xdp_fuzz_whatever_comes() {
    gateway::network();
    let (count, seed) = (number("AEGIS_FUZZ", 30_000), number("AEGIS_FUZZ_SEED", 1));
    let mut fuzz = Fuzz {
        world: World::new(),
        state: State::new(),
        frames: Frames::new(),
        random: Random::new(seed),
        seen: BTreeMap::new(),
    };
    let mut flows = 0;
    for number in 0..count as usize {
        if number % PERIOD == 0 {
            fuzz.state.change(&mut fuzz.world, &mut fuzz.random);
        }
        let (frame, judged) = if fuzz.random.chance(50) { fuzz.out() } else { fuzz.back() };
        if let Err(what) = judged {
            let bytes: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!(
                "{what}: frame {number} of seed {seed}, {bytes}\n{:?}\n{:?}",
                fuzz.state,
                fuzz.world.counted()
            );
        }
        if number % 2000 == 0 {
            flows = flows.max(fuzz.world.consistent());
        }
    }
    flows = flows.max(fuzz.world.consistent());
    println!("{count} frames of seed {seed}, at most {flows} flows: {:#?}", fuzz.seen);
    // It is worth something only if it gets everywhere.
    for (program, label) in [
        ("pod_ingress", "drop_forged"),
        ("pod_ingress", "drop_unknown_pod"),
        ("uplink_egress", "translated"),
        ("uplink_egress", "to_gateway"),
        ("uplink_egress", "refuse_no_flow"),
        ("uplink_egress", "refuse_unavailable"),
        ("uplink_egress", "drop_leak"),
        ("uplink_ingress", "reverse"),
        ("uplink_ingress", "steered"),
        ("uplink_ingress", "guest"),
        ("uplink_ingress", "from_gateway"),
        ("uplink_ingress", "too_big"),
        ("uplink_ingress", "fragment_kept"),
        ("uplink_ingress", "drop_no_flow"),
        ("uplink_ingress", "drop_not_peer"),
        ("uplink_ingress", "drop_malformed_in"),
    ] {
        assert!(
            fuzz.seen.contains_key(&(program, label)),
            "{program} never counted {label}: {:#?}",
            fuzz.seen
        );
    }
}
