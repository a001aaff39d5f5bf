//! Attaches the programs to devices.

use crate::carry::{self, Carried, Source};
use crate::ebpf::{
    Dataplane, EbpfError, POD_INGRESS, SOCKET_CONNECT, UPLINK_EGRESS, UPLINK_INGRESS, UPLINK_MARK, chain,
    classifier, sock_addr, xdp,
};
use crate::kernel;
use crate::links::Pin;
use crate::tcx;
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{CgroupAttachMode, TcAttachType, XdpMode};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;
use std::{fs, io};

/// How XDP runs on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack, for drivers that lack it: correct, but slower.
    Generic,
}

/// Name of the pin where XDP runs generically: the kernel does not tell the mode afterwards.
const UPLINK_INGRESS_GENERIC: &str = "uplink_ingress_generic";
/// All names of pins, in the order in which programs are attached. Steering first: a translated packet's reply must find it.
const PINS: [&str; 5] = [UPLINK_INGRESS, UPLINK_INGRESS_GENERIC, UPLINK_MARK, UPLINK_EGRESS, POD_INGRESS];

impl Dataplane {
    /// Attaches the classifier to a device that faces pods (tcx ingress).
    pub fn attach_pod_device(&mut self, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        self.attach_tcx(POD_INGRESS, device, ifindex)
    }

    /// Attaches steering (XDP), the mark of what it translates (tcx ingress) and translation (tcx egress) to an uplink.
    pub fn attach_uplink(&mut self, device: &str, ifindex: u32) -> Result<Mode, EbpfError> {
        let mode = self.attach_xdp(device, ifindex)?;
        self.attach_tcx(UPLINK_MARK, device, ifindex)?;
        self.attach_tcx(UPLINK_EGRESS, device, ifindex)?;
        Ok(mode)
    }

    /// Fails if another program comes before ours on a device that faces pods: it may end the chain.
    pub fn check_pod_device(&mut self, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        self.check_tcx(POD_INGRESS, device, ifindex)
    }

    /// Fails if another program comes before ours on an uplink. (That at its ingress matters only once IPv6 packets are translated.)
    pub fn check_uplink(&mut self, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        self.check_tcx(UPLINK_EGRESS, device, ifindex)
    }

    /// Forgets devices that are gone: the kernel has detached their programs.
    pub fn detach_all_but(&mut self, existing: &BTreeSet<u32>) -> Result<(), EbpfError> {
        let folder = self.links.folder();
        let pins = self.links.pins().map_err(|source| EbpfError::Link { path: folder, source })?;
        pins.into_iter().filter(|pin| !existing.contains(&pin.ifindex)).try_for_each(|pin| unpin(&pin.path))
    }

    /// Links of agents with another schema, of devices that exist: their programs run with maps of their own.
    pub fn inherited(&self, existing: &BTreeSet<u32>) -> Vec<Pin> {
        let pins = self.links.others().into_iter().filter_map(|links| links.pins().ok()).flatten();
        pins.filter(|pin| existing.contains(&pin.ifindex) && PINS.contains(&pin.program.as_str())).collect()
    }

    /// Whether programs of another version run, or its flows are not all here yet.
    pub fn inherits(&mut self, existing: &BTreeSet<u32>) -> bool {
        !self.inherited(existing).is_empty() || self.taking_over().unwrap_or(false)
    }

    /// Puts the own programs into all links of agents with another schema, with all their flows if these can be carried, and
    /// removes what is left of these. `now` is in seconds since boot.
    pub fn take_over(&mut self, existing: &BTreeSet<u32>, now: u32) -> Result<(), EbpfError> {
        match self.source() {
            Some(source) => self.take_over_with_flows(&source, existing, now),
            None => self.take_over_without(existing),
        }?;
        self.source = None;
        for links in self.links.others() {
            links.remove().map_err(|source| EbpfError::Link { path: links.folder(), source })?;
        }
        Ok(())
    }

    fn take_over_with_flows(
        &mut self,
        source: &Source,
        existing: &BTreeSet<u32>,
        now: u32,
    ) -> Result<(), EbpfError> {
        self.set_taking_over(true)?;
        let first = self.carry_flows(source)?;
        let held = Instant::now();
        self.replace_programs(existing)?;
        // A program that has begun before goes on for a moment.
        kernel::settle();
        let rest = self.carry_flows(source).and_then(|all| {
            self.make_blocks(now)?;
            self.make_loads(now)?;
            self.make_rest()?;
            Ok(all)
        });
        // Whatever came of it: new connections can't wait for ever, and what is not here now never will be.
        self.set_taking_over(false)?;
        let held = held.elapsed().as_secs_f64() * 1000.0;
        match rest {
            Ok(carried) => {
                tracing::info!(
                    flows = carried.flows,
                    lost = carried.lost,
                    milliseconds = held,
                    "flows of the version before are carried over"
                );
                if carried.lost > 0 {
                    tracing::warn!(
                        lost = carried.lost,
                        "flows of the version before could not be carried over"
                    );
                }
                self.count_carried(carried)
            }
            Err(error) => {
                tracing::error!(%error, flows = first.flows, "flows that were made last are lost");
                self.count_carried(first)
            }
        }
    }

    fn take_over_without(&mut self, existing: &BTreeSet<u32>) -> Result<(), EbpfError> {
        let lost: u64 = self.links.others().iter().map(carry::flows).sum();
        self.replace_programs(existing)?;
        self.set_taking_over(false)?;
        if lost > 0 {
            tracing::warn!(lost, "nothing is known of the layout of the version before: its flows are lost");
            self.count_carried(Carried { flows: 0, lost })?;
        }
        Ok(())
    }

    /// Lets sockets of all processes be asked for when they connect. The group is the root of the hierarchy, in which all are.
    pub fn attach_sockets(&mut self, group: &Path) -> Result<(), EbpfError> {
        let failed = |reason: String| EbpfError::Attach {
            program: SOCKET_CONNECT,
            device: group.display().to_string(),
            reason,
        };
        let path = self.links.folder().join(SOCKET_CONNECT);
        let program = sock_addr(&mut self.object, SOCKET_CONNECT)?;
        let own = program.info().map_err(|error| failed(chain(&error)))?.id();
        let old = PinnedLink::from_pin(&path).ok().map(FdLink::from);
        if old.and_then(|link| link.info().ok()).is_some_and(|info| info.program_id() == own) {
            return Ok(());
        }
        // Links are always beside others. While there are two, the second finds what the first has bound.
        let file = fs::File::open(group).map_err(|error| failed(error.to_string()))?;
        let id = program.attach(file, CgroupAttachMode::Single).map_err(|error| failed(chain(&error)))?;
        let link = program.take_link(id).map_err(|error| failed(chain(&error)))?;
        let link = FdLink::try_from(link).map_err(|error| failed(error.to_string()))?;
        let beside = self.links.folder().join("socket_connect-new");
        unpin(&beside)?;
        link.pin(&beside).map_err(|error| failed(chain(&error)))?;
        fs::rename(&beside, &path).map_err(|source| EbpfError::Link { path, source })
    }

    fn replace_programs(&mut self, existing: &BTreeSet<u32>) -> Result<(), EbpfError> {
        let mut pins = self.inherited(existing);
        pins.sort_by_key(|pin| PINS.iter().position(|name| *name == pin.program));
        for pin in pins {
            let path = self.links.path(&pin.program, pin.ifindex);
            fs::rename(&pin.path, &path)
                .map_err(|source| EbpfError::Link { path: pin.path.clone(), source })?;
            let link = self.links.pinned(&pin.program, pin.ifindex);
            let failed = |error: &dyn std::error::Error| EbpfError::Link {
                path: path.clone(),
                source: io::Error::other(chain(error)),
            };
            let Some(link) = link else { continue };
            match pin.program.as_str() {
                UPLINK_INGRESS | UPLINK_INGRESS_GENERIC => {
                    let link = XdpLink::try_from(link).map_err(|error| failed(&error))?;
                    xdp(&mut self.object, UPLINK_INGRESS)?.attach_to_link(link).map(drop)
                }
                name => {
                    let name = match name {
                        POD_INGRESS => POD_INGRESS,
                        UPLINK_MARK => UPLINK_MARK,
                        _ => UPLINK_EGRESS,
                    };
                    let link = SchedClassifierLink::try_from(link).map_err(|error| failed(&error))?;
                    classifier(&mut self.object, name)?.attach_to_link(link).map(drop)
                }
            }
            .map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    fn check_tcx(&mut self, program: &'static str, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        let failed = |reason: String| EbpfError::Attach { program, device: device.into(), reason };
        let own = classifier(&mut self.object, program)?.info().map_err(|error| failed(chain(&error)))?.id();
        let order = tcx::programs(ifindex, hook(program)).map_err(|error| failed(error.to_string()))?;
        match order.first() {
            Some(first) if *first == own => Ok(()),
            Some(first) if order.contains(&own) => Err(failed(format!(
                "program {first} has put itself before it and may end the chain: make its owner attach behind \
                 others, or restart this agent"
            ))),
            _ => Err(failed("it is not attached any more: restart this agent".into())),
        }
    }

    fn attach_tcx(&mut self, program: &'static str, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        let path = self.links.path(program, ifindex);
        let old = self.links.pinned(program, ifindex);
        let failed = |error: &dyn std::error::Error| EbpfError::Attach {
            program,
            device: device.into(),
            reason: chain(error),
        };
        let classifier = classifier(&mut self.object, program)?;
        let own = classifier.info().map_err(|error| failed(&error))?.id();
        let there = old.as_ref().and_then(|link| link.info().ok()).map(|info| info.program_id());
        let first = tcx::programs(ifindex, hook(program)).map_err(|error| failed(&error))?.first().copied();
        if there == Some(own) {
            return Ok(());
        }
        if let Some(link) = old.filter(|_| there.is_some() && there == first) {
            let link = SchedClassifierLink::try_from(link).map_err(|error| failed(&error))?;
            // The pin keeps the link; this handle may go.
            return classifier.attach_to_link(link).map(drop).map_err(|error| failed(&error));
        }
        // There is no link, its device is gone and another one has its index, or somebody has come before it. In the last
        // case both run for a moment, which loses some packets at worst: none is ever without one of them.
        let late = tcx::Pinned::open(&path).map_err(|error| failed(&error))?;
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let kind = match hook(program) {
            tcx::Hook::Ingress => TcAttachType::Ingress,
            tcx::Hook::Egress => TcAttachType::Egress,
        };
        let id = classifier.attach_with_options(device, kind, order).map_err(|error| failed(&error))?;
        let link = classifier.take_link(id).map_err(|error| failed(&error))?;
        let link = FdLink::try_from(link).map_err(|error| failed(&error))?;
        let beside = self.links.path(program, ifindex).with_file_name(format!("{program}-{ifindex}-new"));
        unpin(&beside)?;
        link.pin(&beside).map_err(|error| failed(&error))?;
        fs::rename(&beside, &path).map_err(|error| failed(&error))?;
        late.map_or(Ok(()), tcx::Pinned::detach).map_err(|error| failed(&error))
    }

    fn attach_xdp(&mut self, device: &str, ifindex: u32) -> Result<Mode, EbpfError> {
        for (name, mode) in [(UPLINK_INGRESS, Mode::Native), (UPLINK_INGRESS_GENERIC, Mode::Generic)] {
            let link = self.links.pinned(name, ifindex).and_then(|link| XdpLink::try_from(link).ok());
            let Some(link) = link else { continue };
            match xdp(&mut self.object, UPLINK_INGRESS)?.attach_to_link(link) {
                Ok(_) => return Ok(mode),
                // The link's device is gone, and another one has its index.
                Err(_) => unpin(&self.links.path(name, ifindex))?,
            }
        }
        let failed =
            |reason: String| EbpfError::Attach { program: UPLINK_INGRESS, device: device.into(), reason };
        let native = self.links.path(UPLINK_INGRESS, ifindex);
        let generic = self.links.path(UPLINK_INGRESS_GENERIC, ifindex);
        let program = xdp(&mut self.object, UPLINK_INGRESS)?;
        let (id, path, mode) = match program.attach_to_if_index(ifindex, XdpMode::Driver) {
            Ok(id) => (id, native, Mode::Native),
            Err(first) => match program.attach_to_if_index(ifindex, XdpMode::Skb) {
                Ok(id) => (id, generic, Mode::Generic),
                Err(second) => {
                    return Err(failed(format!("native: {}; generic: {}", chain(&first), chain(&second))));
                }
            },
        };
        let link = program.take_link(id).map_err(|error| failed(chain(&error)))?;
        let link = FdLink::try_from(link).map_err(|error| failed(error.to_string()))?;
        link.pin(&path).map_err(|error| failed(chain(&error)))?;
        Ok(mode)
    }
}

fn hook(program: &str) -> tcx::Hook {
    if program == UPLINK_EGRESS { tcx::Hook::Egress } else { tcx::Hook::Ingress }
}

/// Removing what is not there is no failure.
fn unpin(path: &Path) -> Result<(), EbpfError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(EbpfError::Link { path: path.into(), source })
        }
        _ => Ok(()),
    }
}
