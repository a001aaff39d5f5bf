//! The smallest possible init: keeps a sandbox's namespaces alive and reaps what is orphaned into it.

/// Sleeps until SIGTERM or SIGINT, reaping children meanwhile.
pub fn run() -> anyhow::Result<()> {
    // SAFETY: plain signal-set manipulation and waiting on this process's own set; no handler is installed, so
    // nothing runs asynchronously. The process has one thread here.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        loop {
            let mut signal = 0;
            if libc::sigwait(&set, &mut signal) != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
            if signal != libc::SIGCHLD {
                return Ok(());
            }
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}
