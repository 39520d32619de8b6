//! One process: what it does to its part of a file, and what it must find there.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::mapping::Mapping;
use crate::support::difference;
use crate::support::rng::Rng;

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;
const LONGEST: u64 = 192 << 10;
/// What was done last is told when something is wrong.
const REMEMBERED: usize = 40;

/// What a process is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    pub file: PathBuf,
    /// Bytes of the file that nobody else touches, whole pages.
    pub part: Range<u64>,
    /// Nobody else has the file open: it may be cut and lengthened, but not beyond its part.
    pub is_alone: bool,
    /// Whoever has the file open goes past the page cache.
    pub is_direct: bool,
    /// Where to write what the part holds in the end.
    pub expected: PathBuf,
    pub seed: u64,
    pub seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Write,
    Read,
    MapWrite,
    MapRead,
    Punch,
    Zero,
    Allocate,
    Copy,
    Sync,
    Seek,
    Reopen,
    Resize,
}

const VERBS: [Verb; 16] = [
    Verb::Write,
    Verb::Write,
    Verb::Write,
    Verb::Read,
    Verb::Read,
    Verb::MapWrite,
    Verb::MapWrite,
    Verb::MapRead,
    Verb::Punch,
    Verb::Punch,
    Verb::Zero,
    Verb::Allocate,
    Verb::Copy,
    Verb::Sync,
    Verb::Seek,
    Verb::Reopen,
];

pub struct Worker {
    task: Task,
    file: File,
    rng: Rng,
    /// What the part holds, as far as the file goes.
    expected: Vec<u8>,
    done: BTreeMap<Verb, u64>,
    last: VecDeque<(Verb, Range<u64>)>,
}

impl Worker {
    pub fn new(task: Task) -> Worker {
        let file = open(&task);
        let (rng, expected) = (Rng::new(task.seed), vec![0; length(&task.part)]);
        Worker { task, file, rng, expected, done: BTreeMap::new(), last: VecDeque::new() }
    }

    /// Works as long as it is told to; what it did.
    pub fn work(mut self) -> String {
        let until = Instant::now() + Duration::from_secs(self.task.seconds);
        while Instant::now() < until {
            self.step();
        }
        self.file.sync_all().unwrap();
        let all = 0..self.expected.len() as u64;
        self.read(&all);
        std::fs::write(&self.task.expected, &self.expected).unwrap();
        format!("{} times from seed {}: {:?}", self.task.file.display(), self.task.seed, self.done)
    }

    fn step(&mut self) {
        let verb = match self.task.is_alone && self.rng.one_in(24) {
            true => Verb::Resize,
            false => *self.rng.pick(&VERBS),
        };
        let range = match self.expected.len() as u64 {
            0 => 0..0,
            size => self.rng.range(size, LONGEST, &[1, 1, SECTOR, PAGE, 64 << 10]),
        };
        // Pages in memory are not kept the same as what goes past them.
        let needs_pages = matches!(verb, Verb::MapRead | Verb::MapWrite | Verb::Copy);
        if range.is_empty() && verb != Verb::Resize || needs_pages && self.task.is_direct {
            return;
        }
        self.last.push_back((verb, range.clone()));
        if self.last.len() > REMEMBERED {
            self.last.pop_front();
        }
        *self.done.entry(verb).or_default() += 1;
        let result = match verb {
            Verb::Write => self.write(&range),
            Verb::Read => {
                self.read(&range);
                Ok(())
            }
            Verb::MapWrite => self.map_write(&range),
            Verb::MapRead => self.map_read(&range),
            Verb::Punch => {
                self.clear(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, &range)
            }
            Verb::Zero => {
                self.clear(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, &range)
            }
            Verb::Allocate => self.fallocate(0, &range),
            Verb::Copy => self.copy(&range),
            Verb::Sync => self.file.sync_data(),
            Verb::Seek => self.seek(range.start),
            Verb::Reopen => {
                self.file = open(&self.task);
                Ok(())
            }
            Verb::Resize => self.resize(),
        };
        result.unwrap_or_else(|e| panic!("{verb:?} {range:?}: {e}; {:?}", self.last));
    }

    /// Where a byte of the part is in the file.
    fn at(&self, offset: u64) -> u64 {
        self.task.part.start + offset
    }

    fn expected(&mut self, range: &Range<u64>) -> &mut [u8] {
        &mut self.expected[range.start as usize..range.end as usize]
    }

    /// New bytes for a range: now and then zeros.
    fn fill(&mut self, range: &Range<u64>) -> Vec<u8> {
        let zeros = self.rng.one_in(10);
        let mut bytes = vec![0; length(range)];
        if !zeros {
            for word in bytes.chunks_mut(8) {
                let value = self.rng.next().to_le_bytes();
                word.copy_from_slice(&value[..word.len()]);
            }
        }
        self.expected(range).copy_from_slice(&bytes);
        bytes
    }

    fn write(&mut self, range: &Range<u64>) -> io::Result<()> {
        let bytes = self.fill(range);
        self.file.write_all_at(&bytes, self.at(range.start))
    }

    fn read(&mut self, range: &Range<u64>) {
        let mut found = vec![0xee; length(range)];
        self.file.read_exact_at(&mut found, self.at(range.start)).unwrap();
        self.compare(&found, range, "read");
    }

    fn compare(&mut self, found: &[u8], range: &Range<u64>, how: &str) {
        let place = range.start as usize..range.end as usize;
        if let Some(difference) = difference(found, &self.expected[place]) {
            panic!(
                "{} of {} from {:?}: {difference} of {range:?}; {:?}",
                how,
                self.task.file.display(),
                self.task.part,
                self.last
            );
        }
    }

    /// The pages that a range lies in, and where it starts in them.
    fn map(&self, range: &Range<u64>) -> io::Result<(Mapping, usize)> {
        let start = range.start / PAGE * PAGE;
        let mapping = Mapping::new(&self.file, self.at(start)..self.at(range.end))?;
        Ok((mapping, (range.start - start) as usize))
    }

    fn map_write(&mut self, range: &Range<u64>) -> io::Result<()> {
        let (mut mapping, at) = self.map(range)?;
        let bytes = self.fill(range);
        mapping.write(at, &bytes);
        if self.rng.one_in(3) { mapping.sync() } else { Ok(()) }
    }

    fn map_read(&mut self, range: &Range<u64>) -> io::Result<()> {
        let (mapping, at) = self.map(range)?;
        let mut found = vec![0; length(range)];
        mapping.read(at, &mut found);
        self.compare(&found, range, "mapped");
        Ok(())
    }

    fn clear(&mut self, mode: i32, range: &Range<u64>) -> io::Result<()> {
        self.expected(range).fill(0);
        self.fallocate(mode, range)
    }

    fn fallocate(&mut self, mode: i32, range: &Range<u64>) -> io::Result<()> {
        let (offset, length) = (self.at(range.start) as i64, length(range) as i64);
        // SAFETY: fallocate takes no pointers; the file is open.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Copies within the part, by the kernel, to where it does not overlap.
    fn copy(&mut self, range: &Range<u64>) -> io::Result<()> {
        let size = self.expected.len() as u64;
        let count = length(range) as u64;
        let to = self.rng.within(0..size);
        if to + count > size || to < range.end && range.start < to + count {
            return Ok(());
        }
        let (mut from_at, mut to_at) = (self.at(range.start) as i64, self.at(to) as i64);
        let end = to_at + count as i64;
        let fd = self.file.as_raw_fd();
        while to_at < end {
            let left = (end - to_at) as usize;
            // SAFETY: both offsets live through the call, which sets them.
            match unsafe { libc::copy_file_range(fd, &mut from_at, fd, &mut to_at, left, 0) } {
                -1 => return Err(io::Error::last_os_error()),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
        let from = range.start as usize..range.end as usize;
        self.expected.copy_within(from, to as usize);
        Ok(())
    }

    /// Holes hold zeros.
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        let end = self.expected.len() as u64;
        // SAFETY: lseek takes no pointers; the file is open. Nobody uses its position.
        let found =
            unsafe { libc::lseek(self.file.as_raw_fd(), self.at(offset) as i64, libc::SEEK_DATA) };
        let data = match found {
            -1 if io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => end,
            -1 => return Err(io::Error::last_os_error()),
            found => (found as u64 - self.task.part.start).min(end),
        };
        let hole = &self.expected[offset as usize..data as usize];
        if hole.iter().any(|byte| *byte != 0) {
            panic!("a hole from {offset:#x} to {data:#x} holds data; {:?}", self.last);
        }
        Ok(())
    }

    fn resize(&mut self) -> io::Result<()> {
        let most = (self.task.part.end - self.task.part.start) / SECTOR;
        // Mostly large.
        let least = if self.rng.one_in(4) { 0 } else { most / 2 };
        let size = self.rng.within(least..most + 1) * SECTOR;
        self.expected.resize(size as usize, 0);
        self.file.set_len(size)
    }
}

fn open(task: &Task) -> File {
    let flags = if task.is_direct { libc::O_DIRECT } else { 0 };
    File::options().read(true).write(true).custom_flags(flags).open(&task.file).unwrap()
}

fn length(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}
