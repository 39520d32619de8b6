//! The inputs of the fuzz targets (`tests/fuzz/corpus`), those among them that once showed a defect,
//! each given to its target again; then changes of them, by chance and without the fuzzer's guidance.

use std::path::{Path, PathBuf};

use crate::support::for_seeds;
use crate::support::rng::Rng;

#[path = "../fuzz/bodies/mod.rs"]
mod bodies;

fn inputs(target: &str) -> Vec<PathBuf> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&corpus).expect("a corpus for each target");
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", corpus.display());
    files
}

/// Says which input it was when it fails.
fn replay(target: &'static str, run: fn(&[u8])) {
    let files = inputs(target);
    println!("{target}: {} inputs", files.len());
    let mut corpus = Vec::new();
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let result = std::panic::catch_unwind(|| run(&bytes));
        assert!(result.is_ok(), "{}", file.display());
        corpus.push(bytes);
    }
    for_seeds(target, 1, |seed| run(&changed(&corpus, &mut Rng::new(seed))));
}

/// One of `corpus` with a few changes.
fn changed(corpus: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = rng.pick(corpus).clone();
    for _ in 0..rng.within(1..9) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = rng.within(0..bytes.len() as u64) as usize;
        match rng.within(0..6) {
            0 => bytes[at] ^= 1 << rng.within(0..8),
            1 => bytes[at] = rng.next() as u8,
            2 => {
                let word = *rng.pick(&[0, 1, u64::MAX, 1 << 63, 1 << 62, 512, rng.clone().next()]);
                let width = 8.min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&word.to_be_bytes()[..width]);
            }
            3 => {
                let other = rng.pick(corpus);
                let from = rng.within(0..other.len() as u64 + 1) as usize;
                let length = rng.within(0..64).min((other.len() - from) as u64) as usize;
                let end = (at + length).min(bytes.len());
                bytes.splice(at..end, other[from..from + length].iter().copied());
            }
            4 => drop(bytes.drain(at..(at + rng.within(1..16) as usize).min(bytes.len()))),
            _ => {
                let random: Vec<u8> = (0..rng.within(1..24)).map(|_| rng.next() as u8).collect();
                bytes.splice(at..at, random);
            }
        }
    }
    bytes
}

#[test]
fn bytes_of_images_do_no_harm() {
    replay("image", bodies::image::run);
}

#[test]
fn images_with_changed_structures_do_no_harm() {
    replay("structure", bodies::structure::run);
}

#[test]
fn histories_are_as_their_model() {
    replay("history", bodies::history::run);
}

#[test]
fn losses_of_power_lose_nothing_that_was_flushed() {
    replay("crash", bodies::crash::run);
}

#[test]
fn compressed_data_inflates_or_fails() {
    replay("compressed", bodies::compressed::run);
}

#[test]
fn names_and_offsets_lead_nowhere_else() {
    replay("names", bodies::names::run);
}
