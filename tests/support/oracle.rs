//! What each sector of a disk may hold: the invariants of the crate, made executable.
//!
//! Every operation of a client has a number. A write puts into each sector a pattern made of that
//! number and the sector's, so that what is found there says where it came from. The oracle is
//! told when each operation begins and succeeds (an operation that fails never succeeds: each of
//! its sectors may be old or new). Operations on one sector must not overlap in time.

use std::collections::VecDeque;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::SECTOR;
use super::rng::mix;

/// What a client does to a range of sectors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Operation {
    pub kind: Kind,
    /// The sectors concerned.
    pub sectors: Range<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Writes the sectors' [`pattern`].
    Write,
    /// Discards or zeroes.
    Zero,
    Flush,
    /// Cuts the disk to so many sectors or grows it; the sectors concerned are those cut or added.
    Resize(u64),
}

/// What sector `sector` holds after operation `number` wrote it: both numbers, then words that say
/// each for itself which operation they are from ([`number_of`]).
pub fn pattern(number: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for (n, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
        let value = match n {
            0 => number,
            1 => sector,
            _ => number ^ mask(sector, n),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// The number of the operation that wrote word `n` (not the second) of a sector's pattern.
pub fn number_of(word: u64, n: u64, sector: u64) -> u64 {
    if n == 0 { word } else { word ^ mask(sector, n) }
}

fn mask(sector: u64, n: u64) -> u64 {
    mix((sector << 6 | n) + 1)
}

/// The data that operation `number` writes to `sectors`.
pub fn data(number: u64, sectors: Range<u64>) -> Vec<u8> {
    sectors.flat_map(|sector| pattern(number, sector)).collect()
}

/// One thing that a sector may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    /// The operation that made it; 0 for what the disk held at first.
    number: u64,
    zero: bool,
    acknowledged: bool,
}

#[derive(Clone, Copy)]
pub enum After {
    /// While the image is open: the last that was acknowledged, or a later one that was not.
    Running,
    /// After a crash: as of the last flush, or anything later.
    Crash,
}

/// The sectors of a disk.
pub struct Oracle {
    /// What the disk held at first.
    initial: Vec<u8>,
    /// The versions of each sector since the last flush, the flushed one first.
    sectors: Vec<VecDeque<Version>>,
    /// Flushes that have begun: number, and the operations acknowledged by then.
    flushes: Vec<(u64, u64)>,
    /// Operations in the order they were acknowledged in; `acknowledged.0` at most is their rank.
    acknowledged: u64,
    /// Rank of each acknowledged version that a flush may still make durable.
    ranks: std::collections::HashMap<u64, u64>,
    /// Sectors with more than one version.
    unsettled: std::collections::HashSet<usize>,
    /// The sizes of the disk since the last flush, in sectors, with the operations that set them;
    /// the flushed one first.
    sizes: Vec<(u64, u64)>,
}

impl Oracle {
    /// A disk that holds `initial`, durably, and may grow to `most` sectors.
    pub fn new(initial: &[u8], most: u64) -> Self {
        let size = initial.len() as u64 / SECTOR;
        let mut initial = initial.to_vec();
        initial.resize((most * SECTOR) as usize, 0);
        let first = Version { number: 0, zero: false, acknowledged: true };
        Oracle {
            initial,
            sectors: vec![VecDeque::from([first]); most as usize],
            flushes: Vec::new(),
            acknowledged: 0,
            ranks: [(0, 0)].into(),
            unsettled: Default::default(),
            sizes: vec![(0, size)],
        }
    }

    /// Operation `number`, above 0 and never used before, begins.
    pub fn begin(&mut self, number: u64, operation: &Operation) {
        if operation.kind == Kind::Flush {
            self.flushes.push((number, self.acknowledged));
        }
        if let Kind::Resize(size) = operation.kind {
            self.sizes.push((number, size));
        }
        let zero = operation.kind != Kind::Write;
        for sector in operation.sectors.clone() {
            let version = Version { number, zero, acknowledged: false };
            self.sectors[sector as usize].push_back(version);
            self.unsettled.insert(sector as usize);
        }
    }

    /// Operation `number` succeeds.
    pub fn succeed(&mut self, number: u64, operation: &Operation) {
        if operation.kind == Kind::Flush {
            let at = self.flushes.iter().position(|flush| flush.0 == number).expect("began");
            let (_, acknowledged) = self.flushes.remove(at);
            self.forget_before(acknowledged);
            return;
        }
        self.acknowledged += 1;
        self.ranks.insert(number, self.acknowledged);
        for sector in operation.sectors.clone() {
            for version in &mut self.sectors[sector as usize] {
                version.acknowledged |= version.number == number;
            }
        }
        if let Kind::Resize(size) = operation.kind {
            self.settle_cut(number, size, &operation.sectors);
        }
    }

    /// A cut is durable when it has succeeded.
    fn settle_cut(&mut self, number: u64, size: u64, sectors: &Range<u64>) {
        if sectors.is_empty() || size != sectors.start {
            return;
        }
        self.sizes.retain(|&(by, _)| by >= number);
        for sector in sectors.clone() {
            self.sectors[sector as usize].retain(|version| version.number >= number);
        }
    }

    /// What the first `rank` acknowledged operations wrote is durable.
    fn forget_before(&mut self, rank: u64) {
        let durable = |(number, _): &(u64, u64)| self.ranks.get(number).is_some_and(|r| *r <= rank);
        let last = self.sizes.iter().rposition(durable).unwrap_or(0);
        self.sizes.drain(..last);
        let (sectors, ranks) = (&mut self.sectors, &self.ranks);
        self.unsettled.retain(|&sector| {
            let versions = &mut sectors[sector];
            let durable = |v: &Version| v.acknowledged && ranks[&v.number] <= rank;
            let last = versions.iter().rposition(durable).unwrap_or(0);
            versions.drain(..last);
            versions.len() > 1
        });
    }

    /// Whether the disk may have `sectors` sectors after a crash.
    pub fn check_size(&self, sectors: u64) -> Result<(), String> {
        match self.sizes.iter().any(|&(_, size)| size == sectors) {
            true => Ok(()),
            false => Err(format!("the disk has {sectors} sectors; allowed are {:?}", self.sizes)),
        }
    }

    /// Whether every sector of `disk`, which starts with sector `first`, holds what it may. The
    /// error tells of the first one that does not.
    pub fn check(&self, disk: &[u8], first: u64, after: After) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(disk.chunks_exact(SECTOR as usize)) {
            let versions = &self.sectors[sector as usize];
            let oldest = match after {
                After::Crash => 0,
                After::Running => versions.iter().rposition(|v| v.acknowledged).unwrap_or(0),
            };
            let mut allowed = versions.range(oldest..);
            if !allowed.any(|version| self.is(version, sector, bytes)) {
                let allowed: Vec<_> = versions.range(oldest..).collect();
                let found = describe(bytes);
                return Err(format!("sector {sector} holds {found}; allowed are {allowed:?}"));
            }
        }
        Ok(())
    }

    /// Whether `bytes` are that version of a sector.
    fn is(&self, version: &Version, sector: u64, bytes: &[u8]) -> bool {
        match version {
            Version { number: 0, .. } => {
                let at = (sector * SECTOR) as usize;
                bytes == &self.initial[at..at + SECTOR as usize]
            }
            Version { zero: true, .. } => bytes.iter().all(|&b| b == 0),
            Version { number, .. } => {
                bytes[..8] == number.to_le_bytes() && bytes == pattern(*number, sector)
            }
        }
    }
}

/// Where the contents of a sector came from.
pub fn describe(bytes: &[u8]) -> String {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (number, sector) = (word(0), word(8));
    if bytes.iter().all(|&b| b == 0) {
        "zeros".into()
    } else if bytes == pattern(number, sector) {
        format!("what operation {number} wrote to sector {sector}")
    } else {
        format!("{:02x?}...", &bytes[..32])
    }
}
