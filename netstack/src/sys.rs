//! Memory for the ring buffers, straight from the kernel, and hints to the processor. The only unsafe code of this crate.
//!
//! A flow may buffer half a megabyte each way, yet most never touch more than a page. Anonymous mappings give exactly
//! that: address space at once, memory when it is written, and memory back on request. It knows nothing of flows.
#![expect(
    unsafe_code,
    reason = "mmap, madvise, the slices they give and prefetching have no safe form"
)]

use std::ptr::NonNull;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

/// One TCP socket in a set of its own, with the mapping its two rings live in.
///
/// The rings are `'static` slices of the mapping, so neither the set nor the socket may outlive it. Access goes through
/// closures that are generic over the rings' lifetime: nothing borrowed from the rings can be carried out of them.
pub(crate) struct MappedSocket {
    // Declared, and so dropped, before the mapping under it.
    set: SocketSet<'static>,
    handle: SocketHandle,
    mapping: Mapping,
}

impl MappedSocket {
    /// A closed socket with two rings of `ring` bytes, or `None` when the kernel gives no address space.
    pub(crate) fn new(ring: usize) -> Option<Self> {
        let stride = ring.next_multiple_of(PAGE);
        let mapping = Mapping::new(stride * 2)?;
        let start = mapping.start.as_ptr();
        // SAFETY: the mapping is `2 * stride` readable and writable bytes, so the two slices are in bounds, initialised
        // (zero) and do not overlap. Nothing else makes references into it, and `set` is dropped before it is unmapped.
        let (rx, tx) = unsafe {
            (
                std::slice::from_raw_parts_mut(start, ring),
                std::slice::from_raw_parts_mut(start.add(stride), ring),
            )
        };
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(tcp::Socket::new(
            tcp::SocketBuffer::new(rx),
            tcp::SocketBuffer::new(tx),
        ));
        Some(Self {
            set,
            handle,
            mapping,
        })
    }

    /// The socket, to look at.
    pub(crate) fn socket(&self) -> &tcp::Socket<'_> {
        self.set.get::<tcp::Socket<'static>>(self.handle)
    }

    /// Runs `f` on the socket.
    pub(crate) fn with_socket<R>(
        &mut self,
        f: impl for<'s> FnOnce(&mut tcp::Socket<'s>) -> R,
    ) -> R {
        f(self.set.get_mut::<tcp::Socket<'static>>(self.handle))
    }

    /// Runs `f` on the set of one.
    pub(crate) fn with_set<R>(&mut self, f: impl for<'s> FnOnce(&mut SocketSet<'s>) -> R) -> R {
        f(&mut self.set)
    }

    /// Gives the rings' memory back to the kernel; the bytes in them are lost. A no-op while either queue holds bytes.
    /// The caller has made sure that no out-of-order bytes wait beyond the receive queue's end.
    pub(crate) fn discard(&mut self) {
        let socket = self.socket();
        if socket.recv_queue() == 0 && socket.send_queue() == 0 {
            self.mapping.discard();
        }
    }
}

/// Where the sockets of flows lie, by the flows' indices: known without looking at the flow.
#[derive(Default)]
pub(crate) struct Places(Vec<Place>);

/// Addresses; 0 for none.
#[derive(Clone, Copy, Default)]
struct Place {
    socket: usize,
    /// Rings rewind when they run empty, so that a flow of small messages stays at their starts.
    rings: [usize; 2],
}

impl Places {
    /// Remembers where the socket of flow `index` lies.
    pub(crate) fn note(&mut self, index: u32, socket: &MappedSocket) {
        let index = index as usize;
        if self.0.len() <= index {
            self.0.resize(index + 1, Place::default());
        }
        let start = socket.mapping.start.addr().get();
        self.0[index] = Place {
            socket: std::ptr::from_ref(socket.socket()).addr(),
            rings: [start, start + socket.mapping.len / 2],
        };
    }

    /// Asks the processor for the socket of flow `index`, and for the first bytes of its rings.
    pub(crate) fn fetch(&self, index: u32) {
        let Some(place) = self.0.get(index as usize) else {
            return;
        };
        fetch_bytes(place.socket, size_of::<tcp::Socket<'_>>());
        for ring in place.rings {
            fetch_bytes(ring, 2 * CACHE_LINE);
        }
    }
}

/// Asks the processor for a value that is about to be used.
pub(crate) fn fetch<T>(value: &T) {
    fetch_bytes(std::ptr::from_ref(value).addr(), size_of::<T>());
}

const CACHE_LINE: usize = 64;

fn fetch_bytes(start: usize, len: usize) {
    let first = start / CACHE_LINE * CACHE_LINE;
    for line in (first..start + len).step_by(CACHE_LINE) {
        // SAFETY: a hint; an address that is not mapped, or not any more, is ignored by the processor.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(line));
        }
        // Elsewhere there is no stable intrinsic.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// Large enough for every page size in use; a ring that is shorter wastes address space, not memory.
const PAGE: usize = 16 * 1024;

#[cfg(unix)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value alone; any thread may use and unmap it.
#[cfg(unix)]
unsafe impl Send for Mapping {}

#[cfg(unix)]
impl Mapping {
    fn new(len: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: advice about this mapping alone. A huge page would make a flow's first byte cost two megabytes.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(start, len, libc::MADV_NOHUGEPAGE)
        };
        Some(Self {
            start: NonNull::new(start.cast())?,
            len,
        })
    }

    /// MADV_DONTNEED and not MADV_FREE: a flow that has gone idle shall also look small, at once, to whoever counts
    /// resident memory, and the pages would be touched again only after an idle second.
    fn discard(&mut self) {
        // SAFETY: the range is this value's own mapping. Its bytes turn to zero under the rings that refer to them,
        // which is sound as no reference is live during the call and an empty ring's bytes are written before read.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and every slice of it has been dropped before.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Where there is no mmap the allocator's zeroed pages do; they are not given back while in use.
#[cfg(not(unix))]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory owned by this value alone.
#[cfg(not(unix))]
unsafe impl Send for Mapping {}

#[cfg(not(unix))]
impl Mapping {
    fn new(len: usize) -> Option<Self> {
        let memory = Box::into_raw(vec![0u8; len].into_boxed_slice());
        Some(Self {
            start: NonNull::new(memory.cast())?,
            len,
        })
    }

    fn discard(&mut self) {}
}

#[cfg(not(unix))]
impl Drop for Mapping {
    fn drop(&mut self) {
        let memory = std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.len);
        // SAFETY: made by `Box::into_raw` of a slice of this length in `new`, and freed only here.
        drop(unsafe { Box::from_raw(memory) });
    }
}
