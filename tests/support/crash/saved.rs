//! A recording in a file: what follows from no seed is kept to be looked at again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2fs::storage::testing::{Change, Entry, MemoryStorage, RecordingStorage};
use serde::{Deserialize, Serialize};

use super::history::{Files, Recorded, Step};

#[derive(Serialize, Deserialize)]
struct Saved {
    /// The image file and the external data file, as they were at first.
    initial: Vec<Vec<u8>>,
    log: Vec<(usize, SavedEntry)>,
    steps: Vec<(u64, Step)>,
}

#[derive(Serialize, Deserialize)]
enum SavedEntry {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Zero(u64, u64),
    Allocate(u64, u64),
    SetLen(u64),
    Sync(usize),
    Mark(u64),
}

impl From<Entry> for SavedEntry {
    fn from(entry: Entry) -> Self {
        match entry {
            Entry::Change(Change::Write { offset, data }) => {
                SavedEntry::Write(offset, data.to_vec())
            }
            Entry::Change(Change::Punch(range)) => SavedEntry::Punch(range.start, range.end),
            Entry::Change(Change::Zero(range)) => SavedEntry::Zero(range.start, range.end),
            Entry::Change(Change::Allocate(range)) => SavedEntry::Allocate(range.start, range.end),
            Entry::Change(Change::SetLen(len)) => SavedEntry::SetLen(len),
            Entry::Sync { covers } => SavedEntry::Sync(covers),
            Entry::Mark(mark) => SavedEntry::Mark(mark),
        }
    }
}

impl From<SavedEntry> for Entry {
    fn from(entry: SavedEntry) -> Self {
        Entry::Change(match entry {
            SavedEntry::Write(offset, data) => Change::Write { offset, data: data.into() },
            SavedEntry::Punch(start, end) => Change::Punch(start..end),
            SavedEntry::Zero(start, end) => Change::Zero(start..end),
            SavedEntry::Allocate(start, end) => Change::Allocate(start..end),
            SavedEntry::SetLen(len) => Change::SetLen(len),
            SavedEntry::Sync(covers) => return Entry::Sync { covers },
            SavedEntry::Mark(mark) => return Entry::Mark(mark),
        })
    }
}

/// Saves a recording; where.
pub fn save(recorded: &Recorded, directory: &Path, seed: u64) -> PathBuf {
    let files = std::iter::once(&recorded.image).chain(&recorded.data);
    let saved = Saved {
        initial: files.map(|file| file.initial().contents()).collect(),
        log: recorded.image.log().into_iter().map(|(file, e)| (file, e.into())).collect(),
        steps: recorded.steps.iter().map(|(number, step)| (*number, step.clone())).collect(),
    };
    let path = directory.join(format!("crash-{seed}.json"));
    std::fs::write(&path, serde_json::to_vec(&saved).unwrap()).unwrap();
    path
}

/// The recording that was saved at `path`.
pub fn load(path: &str) -> Recorded {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let saved: Saved = serde_json::from_slice(&bytes).unwrap();
    let mut initial = saved.initial.into_iter().map(MemoryStorage::new);
    let files = Files { image: initial.next().unwrap(), data: initial.next() };
    let image = Arc::new(RecordingStorage::new(files.image));
    let data = files.data.map(|data| Arc::new(image.beside(1, data)));
    for (file, entry) in saved.log {
        let file = if file == 0 { &image } else { data.as_ref().unwrap() };
        file.append(entry.into()).unwrap();
    }
    Recorded { image, data, steps: saved.steps.into_iter().collect(), struck: 0 }
}
