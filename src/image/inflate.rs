//! Compressed clusters: inflating them, and a small cache of inflated ones.
//!
//! A read of a whole cluster inflates straight into the reader's buffer; a read of a part inflates
//! the cluster once and keeps it, so a sequential read in small pieces inflates each cluster once.
//! Threads inflate different clusters at the same time; of two that want the same one, the second
//! waits for the first.
//!
//! Entries are keyed by where the compressed data is. Whoever drops the last use of such data from
//! a table calls [`InflateCache::forget`] while the guest cluster is still held exclusively.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::counters::{CacheCounts, Counter};
use crate::format::HostOffset;
use crate::memory::{Cache, Memory, Share};
use crate::sync::Mutex;

/// Memory for inflated clusters, in bytes; four clusters at least.
const CACHE_BYTES: u64 = 8 << 20;
/// log2 of the largest zstd window that is accepted: 16 MiB, which every level that QEMU or the
/// zstd tool uses for clusters of at most 2 MiB stays below.
const MAX_WINDOW_LOG: u32 = 24;

/// How an image's clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// Raw deflate, no zlib header.
    Deflate,
    /// zstd frames.
    Zstd,
}

/// One inflated cluster; empty until the first reader has inflated it.
type Slot = Arc<Mutex<Box<[u8]>>>;

/// Recently inflated clusters.
#[derive(Debug)]
pub(super) struct InflateCache {
    capacity: usize,
    entries: Arc<Mutex<Entries>>,
    memory: Arc<Memory>,
    hits: Counter,
    misses: Counter,
}

#[derive(Debug)]
struct Entries {
    /// Newest last. So few that a scan is faster than a map.
    all: VecDeque<(HostOffset, Slot)>,
    cluster_size: u64,
    /// A cluster for each entry.
    share: Arc<Share>,
}

impl Entries {
    fn retain(&mut self, keep: impl Fn(HostOffset) -> bool) {
        let before = self.all.len();
        self.all.retain(|(at, _)| keep(*at));
        self.share.give_back((before - self.all.len()) as u64 * self.cluster_size);
    }

    fn drop_oldest(&mut self) {
        if self.all.pop_front().is_some() {
            self.share.give_back(self.cluster_size);
        }
    }
}

impl Cache for Mutex<Entries> {
    fn shrink(&self, bytes: u64) {
        if let Some(mut entries) = self.try_lock() {
            let count = bytes.div_ceil(entries.cluster_size);
            // The newest is about to be used.
            let most = entries.all.len().saturating_sub(1) as u64;
            (0..count.min(most)).for_each(|_| entries.drop_oldest());
        }
    }
}

impl InflateCache {
    pub(super) fn new(cluster_size: u64, memory: &Arc<Memory>) -> Self {
        let share = Share::of(memory);
        let entries = Entries { all: VecDeque::new(), cluster_size, share: Arc::clone(&share) };
        let entries = Arc::new(Mutex::new(entries));
        memory.add(&share, &entries);
        let capacity = (CACHE_BYTES / cluster_size).clamp(4, 256) as usize;
        InflateCache {
            capacity,
            entries,
            memory: Arc::clone(memory),
            hits: Counter::default(),
            misses: Counter::default(),
        }
    }

    /// Calls `use_it` with the cluster at `offset`, which `inflate` makes where it is not here.
    pub(super) fn with<E>(
        &self,
        offset: HostOffset,
        inflate: impl FnOnce() -> Result<Box<[u8]>, E>,
        use_it: impl FnOnce(&[u8]),
    ) -> Result<(), E> {
        let slot = self.slot(offset);
        let mut cluster = slot.lock();
        if cluster.is_empty() {
            self.misses.add(1);
            *cluster = inflate()?;
        } else {
            self.hits.add(1);
        }
        use_it(&cluster);
        Ok(())
    }

    /// How often a cluster was there, and how often it had to be inflated.
    pub(super) fn counts(&self) -> CacheCounts {
        CacheCounts::new(self.hits.get(), self.misses.get())
    }

    fn slot(&self, offset: HostOffset) -> Slot {
        let mut entries = self.entries.lock();
        let found = entries.all.iter().position(|(at, _)| *at == offset);
        if let Some(entry) = found.and_then(|i| entries.all.remove(i)) {
            let slot = entry.1.clone();
            entries.all.push_back(entry);
            return slot;
        }
        if entries.all.len() >= self.capacity {
            entries.drop_oldest();
        }
        let slot = Slot::default();
        entries.all.push_back((offset, slot.clone()));
        entries.share.grow(entries.cluster_size);
        drop(entries);
        self.memory.make_room();
        slot
    }

    /// Nothing is what it was.
    pub(super) fn forget_all(&self) {
        self.entries.lock().retain(|_| false);
    }

    /// The data at `offset` is no longer what it was.
    pub(super) fn forget(&self, offset: HostOffset) {
        self.entries.lock().retain(|at| at != offset);
    }
}

/// Fills `cluster` from `compressed`, which may go on past the compressed data.
///
/// # Errors
/// As [`inflate`].
pub(super) fn inflate_cluster(
    compression: Compression,
    compressed: &[u8],
    cluster: &mut [u8],
) -> io::Result<()> {
    thread_local!(static WHOLE: RefCell<libdeflater::Decompressor> =
        RefCell::new(libdeflater::Decompressor::new()));
    if compression == Compression::Deflate {
        let filled = WHOLE.with_borrow_mut(|state| state.deflate_decompress(compressed, cluster));
        if filled == Ok(cluster.len()) {
            return Ok(());
        }
        // Data that goes on past the cluster, or is damaged: the slower way decides, and says why.
    }
    inflate(compression, compressed, cluster).map(|_| ())
}

/// Fills `cluster` from `compressed`, which may go on past the compressed data; how many bytes of it
/// belong to that (all, where the data does not say where it ends).
///
/// # Errors
/// `InvalidData`: it does not inflate, or not to a whole cluster.
pub(super) fn inflate(
    compression: Compression,
    compressed: &[u8],
    cluster: &mut [u8],
) -> io::Result<usize> {
    let (filled, used) = match compression {
        Compression::Deflate => inflate_deflate(compressed, cluster)?,
        Compression::Zstd => inflate_zstd(compressed, cluster)?,
    };
    if filled < cluster.len() {
        return Err(invalid(format!("it ends after {filled} bytes of {}", cluster.len())));
    }
    Ok(used)
}

/// Bytes made, bytes used.
fn inflate_deflate(compressed: &[u8], cluster: &mut [u8]) -> io::Result<(usize, usize)> {
    thread_local!(static STATE: RefCell<flate2::Decompress> =
        RefCell::new(flate2::Decompress::new(false)));
    STATE.with_borrow_mut(|state| {
        state.reset(false);
        let status = state
            .decompress(compressed, cluster, flate2::FlushDecompress::Finish)
            .map_err(|e| invalid(e.to_string()))?;
        let used = match status {
            flate2::Status::StreamEnd => state.total_in() as usize,
            _ => compressed.len(),
        };
        Ok((state.total_out() as usize, used))
    })
}

/// Bytes made, bytes used.
fn inflate_zstd(compressed: &[u8], cluster: &mut [u8]) -> io::Result<(usize, usize)> {
    thread_local!(static STATE: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) });
    STATE.with_borrow_mut(|state| {
        let decoder = match state {
            Some(decoder) => {
                decoder.reinit()?;
                decoder
            }
            None => {
                let mut decoder = Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
                state.insert(decoder)
            }
        };
        run_zstd(decoder, compressed, cluster)
    })
}

fn run_zstd(
    decoder: &mut Decoder<'_>,
    compressed: &[u8],
    cluster: &mut [u8],
) -> io::Result<(usize, usize)> {
    let mut input = InBuffer::around(compressed);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        let hint = decoder.run(&mut input, &mut output).map_err(|e| invalid(e.to_string()))?;
        // A frame that ends, or a step that did nothing: input or room is used up.
        if hint == 0 {
            return Ok((output.pos(), input.pos()));
        }
        if (input.pos(), output.pos()) == before {
            return Ok((output.pos(), compressed.len()));
        }
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn content() -> Vec<u8> {
        (0..65536u32).map(|i| (i / 7 % 251) as u8).collect()
    }

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut encoder =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn both_kinds_inflate_with_trailing_bytes_behind_them() {
        let data = content();
        let mut zstd = zstd::encode_all(&data[..], 3).unwrap();
        let mut deflate = deflated(&data);
        zstd.extend([0xaa; 300]);
        deflate.extend([0xaa; 300]);
        for (kind, bytes) in [(Compression::Zstd, zstd), (Compression::Deflate, deflate)] {
            let mut cluster = vec![1; data.len()];
            let used = inflate(kind, &bytes, &mut cluster).unwrap();
            assert!(cluster == data, "{kind:?}");
            cluster.fill(1);
            inflate_cluster(kind, &bytes, &mut cluster).unwrap();
            assert!(cluster == data, "{kind:?}");
            assert_eq!(used, bytes.len() - 300, "{kind:?}");
        }
    }

    #[test]
    fn what_is_too_short_or_damaged_is_an_error_and_what_is_too_long_stays_in_its_cluster() {
        let data = content();
        let zstd = zstd::encode_all(&data[..], 3).unwrap();
        let deflate = deflated(&data);
        for (kind, bytes) in [(Compression::Zstd, zstd), (Compression::Deflate, deflate)] {
            let mut longer = vec![0; data.len() + 1];
            assert!(inflate(kind, &bytes, &mut longer).is_err(), "{kind:?} too short");
            assert!(inflate(kind, &bytes[..bytes.len() / 2], &mut longer).is_err());
            assert!(inflate(kind, &[0xff; 64], &mut longer).is_err(), "{kind:?} garbage");
            let mut shorter = vec![0; data.len() / 2];
            inflate_cluster(kind, &bytes, &mut shorter).unwrap();
            assert!(shorter == data[..data.len() / 2], "{kind:?}");
        }
    }

    #[test]
    fn a_zstd_window_of_gigabytes_is_refused() {
        // Frame header: magic, no single segment, window descriptor for 2 GiB.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00];
        assert!(inflate(Compression::Zstd, &frame, &mut [0; 4096]).is_err());
    }

    #[test]
    fn the_cache_inflates_once_until_it_is_told_to_forget() {
        let cache = InflateCache::new(2 << 20, &Arc::default());
        let mut inflated = 0;
        let mut get = |at: u64| {
            let make = || {
                inflated += 1;
                Ok::<_, ()>(vec![at as u8; 4].into_boxed_slice())
            };
            cache.with(HostOffset(at), make, |c| assert_eq!(c, [at as u8; 4])).unwrap();
            inflated
        };
        assert_eq!((get(1), get(1)), (1, 1));
        cache.forget(HostOffset(1));
        assert_eq!(get(1), 2);
        for at in 2..6 {
            get(at);
        }
        assert_eq!(get(5), 6, "still here");
        assert_eq!(get(1), 7, "pushed out by the four after it");
    }
}
