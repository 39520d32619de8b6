//! The inputs that the fuzzer has found to lead everywhere (`tests/fuzz/corpus`), and those that once
//! showed a defect, each given to its target again.

use std::path::{Path, PathBuf};

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
fn replay(target: &str, run: fn(&[u8])) {
    let files = inputs(target);
    println!("{target}: {} inputs", files.len());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let result = std::panic::catch_unwind(|| run(&bytes));
        assert!(result.is_ok(), "{}", file.display());
    }
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
