//! Draft.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "support/crash/mod.rs"]
mod crash_search;
mod support;

use std::time::{Duration, Instant};

use crash_search::Campaign;
use crash_search::history::{Plan, SNAPSHOTS, WRITES};
use crash_search::search::Tally;
use qcow2fs::rules::{self, Rule};
use support::SECTOR;
use support::qemu::{DataFile, Shape};
use support::rng::Rng;

fn tiny(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 64 << 10);
    shape.extended_l2 = false;
    shape.cluster_bits = *rng.pick(&[9, 9, 10, 12]);
    shape.size = rng.within(40..300) * SECTOR;
    shape
}

#[test]
fn each() {
    let only = std::env::var("ONLY").unwrap_or_default();
    for rule in Rule::ALL {
        let name = format!("{rule:?}");
        if !only.is_empty() && !only.split(',').any(|o| o == name) {
            continue;
        }
        for (kind, mix) in
            [("writes", WRITES), ("snapshots", SNAPSHOTS), ("data", WRITES), ("sub", WRITES)]
        {
            let campaign = Campaign {
                test: "x",
                plan: Plan { mix, actions: (20, 100), threads: false },
                backed: 4,
                seconds: 1,
                states: 1,
            };
            let shape = |rng: &mut Rng| {
                let mut s = tiny(rng);
                match kind {
                    "snapshots" => {
                        s.data_file = DataFile::None;
                        s.refcount_bits = s.refcount_bits.max(2);
                    }
                    "data" => {
                        s.version = 3;
                        s.data_file = *rng.pick(&[DataFile::Raw, DataFile::Plain]);
                    }
                    "sub" => {
                        s.version = 3;
                        s.extended_l2 = true;
                        s.cluster_bits = 14;
                        s.data_file = DataFile::None;
                        s.size = rng.within(1..200) * SECTOR;
                    }
                    _ => s.data_file = DataFile::None,
                }
                s
            };
            let started = Instant::now();
            let mut tally = Tally::default();
            let mut found = None;
            let mut seed = 0;
            rules::leave_out(Some(rule));
            while started.elapsed() < Duration::from_secs(4) && found.is_none() {
                seed += 1;
                let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    campaign.examine(seed, &shape, &mut tally)
                }));
                match r {
                    Ok(Ok(())) => {}
                    Ok(Err(t)) => found = Some(t.complaint),
                    Err(_) => found = Some("panic".into()),
                }
            }
            println!(
                "{name:28} {kind:10} {} seeds {seed} states {} missed {} {:.1?} {}",
                if found.is_some() { "FOUND" } else { "-----" },
                tally.states,
                rules::missed(),
                started.elapsed(),
                found
                    .unwrap_or_default()
                    .lines()
                    .take(3)
                    .collect::<Vec<_>>()
                    .join(" | ")
                    .chars()
                    .take(120)
                    .collect::<String>()
            );
            rules::leave_out(None);
        }
    }
}
