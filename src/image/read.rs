//! Reading.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::{Image, inflate};
use crate::error::{Error, Result};
use crate::format::HostOffset;
use crate::tables::Run;

/// One read is inflated by at most so many threads.
const MOST_INFLATERS: usize = 8;
/// Starting a thread takes about as long as inflating a tenth of a 64 KiB cluster.
const CLUSTERS_WORTH_A_THREAD: usize = 2;
/// A whole compressed cluster that is to be read.
struct CompressedCluster<'a> {
    offset: HostOffset,
    length: u64,
    into: &'a mut [u8],
}

/// What a range of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the buffer has been filled with.
    Data,
    /// Nothing but zeros, and the buffer is as it was.
    Zeros,
}

impl Image {
    /// Fills `buf` from guest offset `offset`. What lies past the end reads as zeros.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where the tables make no sense.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if self.read_unless_zeros(offset, buf)? == Content::Zeros {
            buf.fill(0);
        }
        Ok(())
    }

    /// As [`Image::read`], for who has zeros ready: where the tables say at once that all of the range
    /// reads as zeros, `buf` is not touched.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_unless_zeros(&self, offset: u64, buf: &mut [u8]) -> Result<Content> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let range = self.within_disk(offset..offset.saturating_add(buf.len() as u64));
        let (buf, past_end) = buf.split_at_mut((range.end - range.start) as usize);
        past_end.fill(0);
        // Where nothing is ever written, as in a backing file, no mapping needs to be pinned.
        let _guard =
            self.writer.is_some().then(|| self.locks.shared(self.geometry.guest_clusters(&range)));
        let mut at = range.start;
        let mut rest = buf;
        let mut compressed = Vec::new();
        while at < range.end {
            let (run, end) = self.note(self.run_at(at, range.end))?;
            let (piece, after) = rest.split_at_mut((end - at) as usize);
            rest = after;
            match run {
                Run::Compressed { offset, length } if piece.len() as u64 == self.cluster_size() => {
                    compressed.push(CompressedCluster { offset, length, into: piece });
                }
                Run::Data { first, .. } => {
                    self.read_data(piece, self.location(first, at))?;
                }
                Run::Compressed { offset, length } => {
                    self.read_compressed(offset, length, self.geometry.within(at), piece)?;
                }
                Run::Backing => self.read_backing(at, piece)?,
                Run::Unallocated | Run::Zero if (at..end) == range => return Ok(Content::Zeros),
                Run::Unallocated | Run::Zero => piece.fill(0),
            }
            at = end;
        }
        self.inflate_all(compressed)?;
        Ok(Content::Data)
    }

    /// Fills `buf` from the compressed cluster at `offset`, from its byte `within` on.
    pub(super) fn read_compressed(
        &self,
        offset: HostOffset,
        length: u64,
        within: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        if buf.len() as u64 == self.cluster_size() {
            return self.inflate(offset, length, buf);
        }
        let inflate = || {
            let mut cluster = vec![0; self.cluster_size() as usize].into_boxed_slice();
            self.inflate(offset, length, &mut cluster).map(|()| cluster)
        };
        let within = within as usize;
        self.inflated.with(offset, inflate, |cluster| {
            buf.copy_from_slice(&cluster[within..within + buf.len()])
        })
    }

    /// Inflates clusters, several at a time where they are many: a large read is one request, and a
    /// request has one thread.
    fn inflate_all(&self, mut clusters: Vec<CompressedCluster<'_>>) -> Result<()> {
        let inflate_each = |clusters: &mut [CompressedCluster<'_>]| {
            clusters.iter_mut().try_for_each(|c| self.inflate(c.offset, c.length, c.into))
        };
        if clusters.len() < 2 * CLUSTERS_WORTH_A_THREAD {
            return inflate_each(&mut clusters);
        }
        // Asking is slow: it reads the limits of the control group.
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        let threads =
            *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        let threads = threads.min(MOST_INFLATERS).min(clusters.len() / CLUSTERS_WORTH_A_THREAD);
        if threads < 2 {
            return inflate_each(&mut clusters);
        }
        let share = clusters.len().div_ceil(threads);
        let (own, others) = clusters.split_at_mut(share);
        std::thread::scope(|scope| {
            let mut left = Vec::new();
            let mut helpers = Vec::new();
            for share in others.chunks_mut(share) {
                let inflate_each = &inflate_each;
                let share = Arc::new(Mutex::new(Some(share)));
                let taken = share.clone();
                let helper = std::thread::Builder::new().name("inflate".into());
                let work = move || taken.lock().take().map_or(Ok(()), inflate_each);
                match helper.spawn_scoped(scope, work) {
                    Ok(handle) => helpers.push(handle),
                    // No more threads to be had: it is done here.
                    Err(_) => left.extend(share.lock().take()),
                }
            }
            let mut result = inflate_each(own);
            for share in left {
                result = result.and_then(|()| inflate_each(share));
            }
            for helper in helpers {
                let helped = helper.join().unwrap_or_else(|_| {
                    Err(Error::io("inflating", std::io::Error::from_raw_os_error(libc::EIO)))
                });
                result = result.and(helped);
            }
            result
        })
    }

    /// Reads and inflates a whole cluster into `cluster`.
    fn inflate(&self, offset: HostOffset, length: u64, cluster: &mut [u8]) -> Result<()> {
        thread_local!(static COMPRESSED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        COMPRESSED.with_borrow_mut(|compressed| {
            compressed.resize(length as usize, 0);
            self.storage
                .read_at(compressed, offset.0)
                .map_err(|e| Error::io(format!("reading compressed data at {offset}"), e))?;
            inflate::inflate_cluster(self.compression, compressed, cluster)
                .map_err(|e| Error::io(format!("inflating the compressed cluster at {offset}"), e))
        })
    }
}
