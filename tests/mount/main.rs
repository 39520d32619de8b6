//! Real mounts: the built program, the kernel's FUSE and loop drivers, and foreign judges.
//!
//! Each test has its own images, mount point and loop devices beneath one temporary directory, and
//! takes them down again, also when it fails. A command that runs too long is killed; a daemon that
//! stops answering is killed too, so that nothing waits for ever. What a test needs and does not
//! find (root, `/dev/fuse`, a tool) makes it fail with that reason: it never passes unseen.
//!
//! `QCOW2FS_TEST_DIR` says where the temporary directories go; without it that is `/dev/shm` when
//! there is room, else the usual temporary directory.

// Here a panic is how a test fails, in its helpers too.
#![allow(clippy::unwrap_used)]

#[macro_use]
mod lab;
mod attach;
mod bitmaps;
mod boot;
mod chains;
mod combinations;
mod compact;
mod confinement;
mod create;
mod data_files;
mod devices;
mod directory;
mod discards;
mod encryption;
mod files;
mod filesystems;
mod health;
mod hosts;
mod info;
mod layers;
mod locks;
mod map;
mod memory;
mod messages;
mod options;
mod overlays;
mod passthrough;
mod plain_files;
mod readme;
mod refusals;
mod resize;
mod snapshots;
mod status;
mod terminal;
