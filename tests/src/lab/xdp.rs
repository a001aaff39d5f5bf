//! An XDP program that passes everything, on the ports that face the nodes.
//!
//! A veth accepts what its peer sends by `XDP_TX` only if it has an XDP program itself. Without one every steered
//! packet is lost, and only the driver's error counter shows it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::Context;

use super::process::run;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_PROG_TYPE_XDP: u32 = 6;
/// `r0 = XDP_PASS; exit`, as the kernel's `struct bpf_insn`.
const PASS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// The first fields of the kernel's `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The fields of the kernel's `union bpf_attr` for `BPF_OBJ_PIN`.
#[repr(C)]
#[derive(Default)]
struct PinAttributes {
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// Attaches the program to a device of a network namespace, in the driver. It stays until the device goes; nothing is left
/// pinned.
pub fn attach_pass(network: &Path, device: &str) -> anyhow::Result<()> {
    let network = std::fs::File::open(network)?;
    let device = device.to_owned();
    // A thread of its own, because it leaves the process's network and mount namespaces for good. The pin is only the
    // way to hand the program to `ip`: it lives in a bpffs that goes away with the thread's mount namespace.
    std::thread::spawn(move || -> anyhow::Result<()> {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, setns, unshare};
        setns(&network, CloneFlags::CLONE_NEWNET)?;
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).context("mount a bpffs")?;
        let pin = "/sys/fs/bpf/pass";
        pin_program(&load()?, pin)?;
        run("ip", &["link", "set", "dev", &device, "xdpdrv", "pinned", pin]).map(drop)
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the thread that attaches XDP crashed"))?
}

fn load() -> anyhow::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: PASS.len() as u32,
        instructions: PASS.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..Default::default()
    };
    let descriptor = bpf(BPF_PROG_LOAD, &attributes).context("load the XDP program")?;
    // SAFETY: the kernel just returned this descriptor, nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn pin_program(program: &OwnedFd, path: &str) -> anyhow::Result<()> {
    let path = CString::new(path)?;
    let attributes =
        PinAttributes { path: path.as_ptr() as u64, descriptor: program.as_raw_fd() as u32, flags: 0 };
    bpf(BPF_OBJ_PIN, &attributes).context("pin the XDP program").map(drop)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are a C structure of the size passed; what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
