//! qcow2fs: a directory of qcow2 images, mounted as a directory of flat raw files.
//!
//! Write to a raw file, loop-mount it, `fstrim`: the image file on the host gets small again while
//! it is in use.
//!
//! # The house
//! Dependencies point down this list, but for one: what counts the references of an image for a check
//! does so for the engine too, where it rebuilds refcounts or looks for leaks, and a repair of all asks
//! [`alloc`] to rebuild them.
//!
//! | room | what it owns |
//! |---|---|
//! | [`cli`] | one file a command: arguments in, exit code out |
//! | [`fs`] | FUSE requests to catalog and image verbs, and the replies |
//! | [`catalog`] | names, inodes, which image is open how often |
//! | [`image`] | one open image: read, write, discard, zero, flush, resize, snapshots, compaction, close |
//! | [`recycler`] | the states of host clusters, and the thread that turns junk into free space |
//! | [`alloc`] | refcounts: allocate, free, grow, shrink, rebuild |
//! | [`tables`] | the L1 and L2 tables: lookup, change, write back |
//! | [`locks`] | which guest clusters are in use by whom |
//! | [`counters`] | what is counted for `status`, at next to no cost |
//! | [`check`] | the independent verifier: reads an image, trusts nothing |
//! | [`confine`] | what the process gives up once it serves a mount |
//! | [`crypt`] | keys and ciphers of encrypted images |
//! | [`memory`] | what all caches may hold together |
//! | [`rules`] | the rules of order that keep an image sound, by name |
//! | [`storage`] | the host file, and its doubles in tests |
//! | [`mod@format`] | bytes to values and back, pure |
//!
//! # Invariants
//! Held at every instant, whatever is lost: take any crash point, keep any subset of the writes
//! since the last sync, tear any of them at 512 bytes, reopen:
//!
//! 1. every reference has its refcount on disk (leaks are allowed);
//! 2. what was written before the last completed flush reads back; every later sector reads old or
//!    new, never another sector's data, never a freed cluster's old content;
//! 3. a discarded range reads zeros (old or zeros until flushed);
//! 4. a cluster is linked on disk again only after the table write that dropped its last reference
//!    is durable, and after it durably reads as zeros;
//! 5. nothing is written outside the image and its data file, and no metadata cluster is
//!    overwritten with data.
//!
//! # What is promised, and what holds it
//! | promise | test |
//! |---|---|
//! | invariants 1 to 5 after every crash, of data, snapshots, sizes, bitmaps, compaction, laying out in order and recovery | `tests/crash.rs`, which is to look at 55,000 crash files and fails where it does not come to half of them |
//! | the same where the host fails now and then and the image is used on | `tests/crash.rs`: `every_crash_after_faults_leaves_a_sound_image_with_what_was_acknowledged` |
//! | the same with other programs' eyes | `tests/crash.rs`: QEMU checks and reads one file in 500 |
//! | each rule of order ([`rules`]) is needed, and its loss would be noticed | `tests/omissions.rs` |
//! | a failure of the host reaches the caller as what it is, and leaves the image sound | `tests/faults.rs`, `tests/snapshots/faults.rs` |
//! | after a failed sync nothing is written and no flush succeeds | `tests/faults.rs`: `a_failed_sync_ends_all_writing` |
//! | on a full host data is written in place, discards make room, and writing goes on | `tests/faults.rs`, `tests/mount/hosts.rs` |
//! | a bitmap is complete or marked as inconsistent | `tests/bitmaps.rs`, `tests/crash.rs` |
//! | a raw data file reads by itself as the disk does | `tests/crash.rs`, `tests/regressions.rs` |
//! | a repair that is cut short leaves what it found, or less damage | `tests/check/crash.rs`, `tests/omissions.rs` |
//! | what `fsync` or a synchronous write has acknowledged through the mount survives SIGKILL, and mounting again takes no time | `tests/kill`, `tests/compact_kill.rs`, `tests/mount` |
//! | a mount that is detached, taken by force, cut off or stands still loses nothing that was acknowledged, and nobody hangs | `tests/kill/gone.rs` |
//! | processes that do everything to files at once find what they wrote | `tests/fsx`, `tests/model.rs`, `tests/concurrency.rs` |
//! | the threads of one image get through in every order of their steps | `src/image/models.rs` |
//! | a VM and a mount never write one image at once | `tests/mount/locks.rs` |
//! | a disk that the kernel itself writes is its data file, and nobody else writes that | `tests/mount/passthrough.rs` |
//! | an image that is not well is told of by `status`, by the log once, and by the exit code | `tests/mount/health.rs` |
//! | loop devices are written though memory is short | `tests/mount/memory.rs` |
//!
//! # When memory is short
//! The kernel gets memory back by writing pages, and those of a file system on a loop device on the
//! mount are written by this process: if it needed memory itself and waited for them, nothing would
//! ever move again. So the daemon asks to be an I/O flusher (`PR_SET_IO_FLUSHER` of prctl(2), as
//! other servers of block devices do): while its threads allocate, the kernel starts no I/O and does
//! not slow them down for others' dirty pages. The kernel grants that with `CAP_SYS_RESOURCE` only.
//! `status` says where it was refused: then nothing is promised for loop devices while the daemon
//! itself is short of memory, in a cgroup with a limit of its own or because all is used up. Without
//! loop devices on the mount it makes no difference.
//!
//! What the daemon takes is bounded: for each request that is being served its data and a cluster
//! or two, for each open image its L1 and refcount tables, and what waits for a flush, which crowded
//! tables start by themselves, and for all of them together what caches may hold ([`memory`]). None of it
//! is locked into memory but keys; put a daemon that serves loop devices into no cgroup with a tight
//! limit, and its swap, if any, on no device that it serves.
//!
//! # Locks
//! In this order, each optional: catalog, [`image`]'s lock of snapshot changes, that of compaction,
//! the flush lock, guest clusters ([`locks`]), [`tables`], [`alloc`]'s refcounts, [`recycler`]'s
//! cluster map, the recycler's wake flag. No data I/O happens under tables, refcounts or the map.
//! Nobody who holds guest clusters starts a flush.
//!
//! # Attacks
//! Images come from strangers. What is tried, what happens, and which test tries it:
//!
//! | attack | response | test |
//! |---|---|---|
//! | any byte of the metadata is changed | an error, or what the image then says; no panic, no hang, no write outside | `tests/hostile/mutation.rs`, `tests/check/hostile.rs` |
//! | a table, or what it points to, lies past the end of the file | not opened, or `EIO`; read-only, marked as corrupt where it is open for writing | `tests/hostile/bombs.rs`, `tests/mount/health.rs` |
//! | tables of tens of MiB, in holes or all over the file; one L2 table for all L1 entries; a million snapshots; bitmaps without end | opened in at most 64 MiB, or refused | `tests/hostile/bombs.rs` |
//! | an entry that keeps another cluster's place in an external data file | `EIO`; read-only, marked as corrupt | `tests/subclusters.rs` |
//! | runs of zeros or data beyond number, or all over tables of gigabytes in holes, in one file or in each of a chain, for who looks for data or holes | each file is looked at once, 32 MiB of tables in all; what follows counts as data, until somebody asks anew | `tests/hostile/bombs.rs`, `tests/regressions.rs` |
//! | a snapshot whose disk is larger than its L1 table can map | not opened, not applied | `tests/hostile/bombs.rs` |
//! | a cluster that inflates to gigabytes, a zstd window of gigabytes | inflated no further than a cluster, windows of 16 MiB at most | `tests/hostile/bombs.rs` |
//! | refcount blocks of megabytes in holes by the thousand, one block for all entries of the refcount table | what is a hole is neither read nor looked through, and others get to the refcounts meanwhile; not counted twice | `tests/hostile/bombs.rs` |
//! | refcount blocks by the thousand at the end of the file, each of which has to move | in one walk, in steps of a bounded size | `tests/hostile/bombs.rs` |
//! | the dirty bit with references so far apart that each needs a refcount block of its own | not opened for writing where the blocks would take more than the file | `tests/hostile/bombs.rs` |
//! | data over metadata, metadata over metadata | looked up before every write, of the header, all L1 and L2 tables, refcount table and blocks, snapshot table, bitmaps; read-only, marked as corrupt where it is open for writing | `tests/mount/health.rs`, `tests/hostile/mutation.rs` |
//! | a cluster that is referenced but free, or more often than it is counted | found by the search after the open, or when it is used: `EIO`; read-only, marked as corrupt; until that search is over nothing is freed, nothing in the file handed out, and what is dropped counts as a reference | `tests/regressions.rs` |
//! | a COPIED flag on data or an L2 table that is counted as free | looked at before the first change that goes by it: `EIO`; read-only, marked as corrupt | `tests/hostile/ownership.rs` |
//! | the same where it is counted more than once | copied, not written in place; read-only, marked as corrupt, once more than one reference is found | `tests/hostile/ownership.rs` |
//! | what calls the search for damage off: an entry that makes no sense, void bitmaps, a snapshot that is changed at once | what cannot be counted is damage, void bitmaps are not counted, snapshots wait: read-only, marked as corrupt | `tests/hostile/ownership.rs`, `tests/regressions.rs` |
//! | an L2 table that a snapshot shares, counted as if it did not | counted before the snapshot goes; nothing that an L1 table leads to is freed; read-only, marked as corrupt | `tests/hostile/ownership.rs` |
//! | a snapshot whose L1 entries all lead to one L2 table | not deleted or applied: read-only, marked as corrupt | `tests/hostile/ownership.rs` |
//! | a LUKS header that is an L2 table of a snapshot too, or lies over the header | read-only, marked as corrupt | `tests/regressions.rs` |
//! | fields of sound structures changed by what they are, histories with crashes, names and offsets of requests | fuzzed with coverage guidance, `tests/fuzz`; what it found is replayed | `tests/hostile/replay.rs` |
//! | a backing or data file elsewhere, by a protocol, through a link, a device, a FIFO, a chain in a circle | refused ([`catalog`]) | `tests/mount/chains.rs`, `tests/mount/data_files.rs`, `tests/mount/refusals.rs` |
//! | the same, to a file that only another user may open, in an image of one's own or in one that others may write | refused, unless its directory was allowed ([`catalog`]) | `src/catalog/tests.rs` |
//! | names, or the image directory itself, that are swapped while they are opened | what is looked at is what is opened, and the directory is opened once ([`catalog`]) | `tests/hostile/names.rs` |
//! | a FIFO or a device where a command is given an image | looked at, and not opened ([`storage::regular`]) | `src/storage/regular.rs` |
//! | another user's FUSE server that calls itself qcow2fs, with symbolic links for raw files | commands believe mounts of root and of their own user, and open regular files of that mount only | `src/cli/mountpoint.rs`, `tests/mount/resize.rs` |
//! | names with line ends and escape sequences, and refusals by the thousand, for the log | a line each, with what a terminal would act on made visible; at most 60 a minute of one kind | `src/cli/logging.rs` |
//! | a LUKS header that asks for hours of work, or whose sizes and places make no sense | half a minute at most, on threads that give way and keep no other image waiting; refused | `tests/encryption.rs`, `tests/mount/encryption.rs` |
//! | hundreds of images, each of which fills its caches | those that hold most give way, and those that lie idle before those that work ([`memory`]) | `tests/mount/status.rs` |
//! | an image that is slow to open, to close or to read, by the hundred | one user's requests do not keep those of another waiting, nor what waits for one image the requests for others ([`fs`]) | `src/fs/pool.rs`, `src/fs/crew.rs`, `tests/mount/hosts.rs` |
//! | a format that is guessed | never: no format recorded, not opened | `tests/mount/chains.rs` |
//! | directories and images that get each other's names, owners and access control lists that change under the kernel | what was meant is found, and who may is looked at again | `src/catalog/tests.rs` |
//! | two names of one file | one image | `tests/mount/directory.rs` |
//! | a defect that runs the attacker's code | no files elsewhere, not even their modes and owners; no network, no other program, process or socket, no privileges ([`confine`]) | `src/confine/tests.rs`, `tests/mount/confinement.rs` |
//! | another user of the machine | sees nothing without `allow_other`; with it, owner and mode of the images decide, and those of the image directory about `.qcow2fs/status` and `metrics` | `tests/mount/options.rs` |
//!
//! # Unsafe code
//! Nothing but system calls that no crate wraps as they are needed, and the memory of keys. Each place
//! says why it is sound; `tests/hostile/unsafe_code.rs` counts them:
//!
//! | file | places | for |
//! |---|---|---|
//! | `src/catalog/host.rs` | 5 | `openat2`, and free space of what is only a place |
//! | `src/catalog/node.rs` | 1 | how a descriptor is open: `F_GETFL` |
//! | `src/catalog/overlay.rs` | 2 | `flock`, and who runs this |
//! | `src/cli/attach/loop_device.rs` | 3 | `ioctl` of loop devices |
//! | `src/cli/attach/mod.rs` | 1 | who runs this |
//! | `src/cli/daemon.rs` | 6 | `fork`, `setsid`, descriptors, limits, `PR_SET_IO_FLUSHER` |
//! | `src/cli/detach.rs` | 1 | who runs this |
//! | `src/cli/helper.rs` | 6 | `fork`, `_exit`, descriptors |
//! | `src/cli/logging.rs` | 2 | `openlog`, `syslog` |
//! | `src/cli/map/extents.rs` | 1 | `lseek` to data and holes |
//! | `src/cli/mod.rs` | 1 | `SIGPIPE` as other programs have it |
//! | `src/cli/mount.rs` | 1 | who runs this |
//! | `src/cli/signals.rs` | 2 | signal masks and `sigwait` |
//! | `src/cli/umount.rs` | 4 | `pidfd_open`, `poll`, `ioctl` of loop devices |
//! | `src/cli/unmounting.rs` | 2 | `umount2`, `poll` |
//! | `src/confine/mod.rs` | 1 | `PR_SET_NO_NEW_PRIVS` |
//! | `src/confine/system_calls.rs` | 1 | `seccomp` |
//! | `src/crypt/memory.rs` | 11 | pages that are locked, left out of dumps, and seen as bytes |
//! | `src/fs/passthrough.rs` | 1 | `SIGIO`, which is ignored |
//! | `src/storage/host_file.rs` | 3 | `fallocate`, `lseek` to data and holes, leases |
//! | `src/storage/image_lock.rs` | 3 | locks of open file descriptions |

pub mod alloc;
pub mod catalog;
pub mod check;
pub mod cli;
pub mod confine;
pub mod counters;
pub mod crypt;
mod error;
pub mod format;
pub mod fs;
pub mod image;
pub mod locks;
pub mod memory;
pub mod recycler;
pub mod rules;
pub mod storage;
mod sync;
pub mod tables;

pub use error::{Error, ErrorKind, Result};
