//! Direct access to a frame in XDP.

use aya_ebpf::programs::XdpContext;

/// A pointer to a `T` at `offset`, if all of it lies within the frame.
#[inline(always)]
pub fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + offset + size_of::<T>() > end {
        return None;
    }
    Some((start + offset) as *mut T)
}

/// Length of the frame in bytes.
#[inline(always)]
pub fn length(ctx: &XdpContext) -> usize {
    ctx.data_end() - ctx.data()
}
