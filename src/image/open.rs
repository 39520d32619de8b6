//! Opening an image: what is served, what is refused, and what has to be put in order first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::bitmaps::Bitmaps;
use super::compact::Compaction;
use super::data_file::DataFile;
use super::encryption::{Encryption, fitting};
use super::flush_lock::FlushLock;
use super::health::Health;
use super::inflate::{Compression, InflateCache};
use super::leaks::LeakSearch;
use super::ownership::Trusted;
use super::snapshots::{Snapshots, Table};
use super::{Backing, Image, Options, Writer};
use crate::alloc::Refcounts;
use crate::crypt::DataCipher;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE, Header, HostCluster, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_KNOWN,
};
use crate::locks::GuestLocks;
use crate::recycler::thread::Agenda;
use crate::recycler::{Recycler, thread};
use crate::rules::Rule;
use crate::storage::Storage;
use crate::tables::{MetadataMap, Tables};

/// What can be told of an image from its header alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// The backing file that the image needs.
    pub backing: Option<BackingFile>,
    /// The name of the external data file that the image needs, as raw bytes: relative to the
    /// image, or absolute, or something else altogether.
    pub data_file: Option<Vec<u8>>,
    /// How it is encrypted; then it needs a cipher ([`Image::unlock`]).
    pub encryption: Option<Encryption>,
    /// Why the image cannot be opened, in one line; `None` when it can.
    pub refusal: Option<String>,
}

/// A backing file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// Its name, as raw bytes: relative to the image, or absolute, or something else altogether.
    pub name: Vec<u8>,
    /// Its format, where the image says: `raw` and `qcow2` can be served.
    pub format: Option<String>,
}

/// The files that belong to an image beside its own, opened by the caller.
#[derive(Clone, Default)]
pub struct Beside {
    /// What is read where the image has nothing of its own ([`Summary::backing`]).
    pub backing: Option<Arc<dyn Backing>>,
    /// Where the guest's data is, if not in the image file ([`Summary::data_file`]). For a writable
    /// image it must be open for writing; nobody else may use it meanwhile.
    pub data: Option<Arc<dyn Storage>>,
    /// What the data is encrypted with ([`Image::unlock`]).
    pub cipher: Option<Arc<DataCipher>>,
}

/// The feature words as they stand in the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
}

/// What is read as a whole when an image is opened may take so many bytes of memory: its L1 table, its
/// refcount table and its snapshot table. Each has a limit of its own; where all of them are near it, the
/// image is no real one. The map of its metadata takes up to 27 MiB more.
const MAX_WHOLE_TABLES: u64 = 36 << 20;

/// What of that the L1 table and the refcount table leave.
///
/// # Errors
/// `TooBig` where they leave nothing.
fn memory_beside_tables(header: &Header, writable: bool) -> Result<u64> {
    let l1 = u64::from(header.l1_size) * 8;
    let refcounts = u64::from(header.refcount_table_clusters) << header.geometry.cluster_bits();
    let taken = l1 + if writable { refcounts } else { 0 };
    MAX_WHOLE_TABLES.checked_sub(taken).ok_or_else(|| {
        let text = format!(
            "the L1 table and the refcount table together are {taken} bytes long, at most \
             {MAX_WHOLE_TABLES} are served: copy the image with `qemu-img convert`"
        );
        Error::new(ErrorKind::TooBig, text)
    })
}

impl Image {
    /// Reads the header only.
    ///
    /// # Errors
    /// A file that is not qcow2, or a header that makes no sense.
    pub fn summarize(storage: &dyn Storage) -> Result<Summary> {
        let header = read_header(storage)?;
        Ok(Summary {
            virtual_size: header.size,
            cluster_size: header.geometry.cluster_size(),
            backing: backing_file(&header),
            data_file: header.geometry.data_file().then(|| data_file_name(&header).to_vec()),
            encryption: Encryption::of(&header),
            refusal: refusal(&header),
        })
    }

    /// The header, checked by itself only.
    ///
    /// # Errors
    /// As [`Image::summarize`].
    pub fn header(storage: &dyn Storage) -> Result<Header> {
        read_header(storage)
    }

    /// Opens an image. A writable image gets its recycler thread; one that is marked dirty gets its
    /// refcounts rebuilt first. One that is corrupt is opened read-only ([`Image::is_writable`]).
    ///
    /// # Errors
    /// As [`Image::summarize`]; `Unsupported` with a feature that is not served (the line names
    /// it); `Corrupt` with a dirty image whose refcounts cannot be rebuilt; host errors.
    pub fn open(storage: Arc<dyn Storage>, options: &Options) -> Result<Arc<Image>> {
        Image::open_with(storage, options, Beside::default())
    }

    /// Opens an image that has a backing file ([`Summary::backing`]), which the caller has opened.
    ///
    /// # Errors
    /// As [`Image::open`]; `Unsupported` where the image has a backing file and none is given.
    pub fn open_over(
        storage: Arc<dyn Storage>,
        options: &Options,
        backing: Option<Arc<dyn Backing>>,
    ) -> Result<Arc<Image>> {
        Image::open_with(storage, options, Beside { backing, ..Beside::default() })
    }

    /// Opens an image that needs other files.
    ///
    /// # Errors
    /// As [`Image::open`]; `Unsupported` where the image needs a file that is not given, or does
    /// not need one that is; `NoKey` where it needs a cipher.
    pub fn open_with(
        storage: Arc<dyn Storage>,
        options: &Options,
        beside: Beside,
    ) -> Result<Arc<Image>> {
        let Beside { backing, data, cipher } = beside;
        let mut header = read_header(&*storage)?;
        if let Some(reason) = refusal(&header) {
            return Err(Error::new(ErrorKind::Unsupported, reason));
        }
        if header.backing_file.is_some() != backing.is_some() {
            let reason = not_served("a backing file", FLATTEN);
            return Err(Error::new(ErrorKind::Unsupported, reason));
        }
        if header.geometry.data_file() != data.is_some() {
            let reason = not_served("an external data file", CONVERT);
            return Err(Error::new(ErrorKind::Unsupported, reason));
        }
        let cipher = fitting(&header, cipher)?;
        let marked_raw = header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0;
        let is_raw = marked_raw && data.is_some() && cipher.is_none();
        let data = DataFile {
            is_external: data.is_some(),
            is_raw,
            may_be_passed: is_raw && header.extension(EXTENSION_BITMAPS).is_none(),
            storage: data.unwrap_or_else(|| storage.clone()),
            cipher,
        };
        let compression = match header.compression_type {
            0 => Compression::Deflate,
            _ => Compression::Zstd,
        };
        let health = Health::new(&options.label);
        let opened_corrupt = header.incompatible_features & INCOMPATIBLE_CORRUPT != 0;
        if opened_corrupt {
            health.latch_corrupt("it is marked as corrupt: run `qcow2fs check --repair all` on it");
        }
        let writable = options.writable && health.is_good();
        if writable && header.incompatible_features & INCOMPATIBLE_DIRTY != 0 {
            log::info!("{} was not closed cleanly: rebuilding its refcounts", health.label());
            header = crate::alloc::rebuild::rebuild_dirty(&*storage, &header)?;
        }
        let memory = memory_beside_tables(&header, writable)?;
        let length = storage.len().map_err(|e| Error::io("reading the image's length", e))?;
        let metadata = Arc::new(MetadataMap::new(header.geometry.clusters_for(length).0));
        metadata.insert(HostCluster(0));
        let mut sound = Ok(());
        if let Some((offset, length)) = header.luks()? {
            let clusters = header.geometry.host_clusters(offset, length);
            for cluster in clusters {
                if !metadata.insert(HostCluster(cluster)) {
                    sound = Err(Error::corrupt("the LUKS header and the header overlap"));
                }
            }
        }
        let tables = Tables::open(
            storage.clone(),
            header.geometry,
            metadata.clone(),
            header.l1_table_offset,
            header.l1_size,
            options.metadata_cache,
            &options.caches,
        )?;
        sound = sound.and(tables.register_metadata());
        let snapshots = Table::read(&*storage, &header, memory);
        let mut writer = None;
        if writable {
            sound = sound.and_then(|()| match &snapshots {
                Ok(table) => table.register_metadata(&*storage, &header, &metadata),
                Err(damage) => Err(damage.duplicate()),
            });
            let (file, caches) = (storage.clone(), &options.caches);
            let refcounts = Refcounts::open(file, &header, metadata.clone(), caches)?;
            let refcounts = Arc::new(refcounts);
            sound = sound.and_then(|()| refcounts.register_metadata());
            let mut bitmaps = None;
            sound = sound.and_then(|()| {
                bitmaps = Bitmaps::open(&*storage, &header, &metadata)?;
                Ok(())
            });
            writer = Some(Writer {
                recycler: Recycler::new(
                    header.geometry,
                    storage.clone(),
                    refcounts.clone(),
                    // Only L2 tables come from the pool where there is a data file.
                    match data.is_external {
                        true => options.keep_erased.min(header.geometry.cluster_size()),
                        false => options.keep_erased,
                    },
                ),
                refcounts,
                flush: FlushLock::default(),
                compaction: Mutex::new(Compaction::new(
                    options.compact_after,
                    options.settle_after,
                )),
                compaction_status: Mutex::default(),
                trusted: Trusted::default(),
                compressed_dropped: AtomicU64::new(0),
                features: Mutex::new(Features {
                    incompatible: header.incompatible_features,
                    compatible: header.compatible_features,
                    autoclear: header.autoclear_features,
                }),
                bitmaps,
                clear_past_end: AtomicBool::new(false),
                runtime_asserts: options.runtime_asserts,
                may_have_leaked: AtomicBool::new(false),
                prepared: AtomicBool::new(false),
                thread: Mutex::new(None),
                agenda: Mutex::new(Agenda::new(options.flush_after, options.recycle_rate)),
                leak_search: LeakSearch::default(),
            });
        }
        let image = Arc::new(Image {
            storage,
            data,
            geometry: header.geometry,
            size: AtomicU64::new(header.size),
            locks: GuestLocks::default(),
            tables,
            requests: AtomicU64::new(0),
            health,
            opened_corrupt,
            backing,
            compression,
            inflated: InflateCache::new(header.geometry.cluster_size(), &options.caches),
            snapshots: Snapshots::new(snapshots),
            writer,
        });
        match sound {
            Ok(()) => image.start_threads(&header, options)?,
            Err(e) if e.kind() == ErrorKind::Corrupt => image.found_corrupt(&e),
            Err(e) => return Err(e),
        }
        Ok(image)
    }

    fn start_threads(self: &Arc<Self>, header: &Header, options: &Options) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        self.note_leaks_at_open(writer)?;
        if options.return_leaks {
            self.search_leaks(header)?;
        }
        if !options.threads {
            return self.finish_search(writer);
        }
        let thread = thread::spawn(self, Agenda::new(options.flush_after, options.recycle_rate))
            .map_err(|e| Error::io("starting the recycler", e))?;
        *writer.thread.lock() = Some(thread);
        Ok(())
    }

    /// Before the first write: autoclear bits that this program does not maintain go.
    pub(super) fn prepare_to_write(&self, writer: &Writer) -> Result<()> {
        if writer.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut features = writer.features.lock();
        if self.data.is_raw {
            self.lengthen_data_file(self.virtual_size())?;
        }
        let bitmaps = if writer.bitmaps.is_some() { AUTOCLEAR_BITMAPS } else { 0 };
        let raw = if self.data.is_raw { AUTOCLEAR_DATA_FILE_RAW } else { 0 };
        let maintained = bitmaps | raw;
        if features.autoclear & !maintained != 0 {
            let cleared = Features { autoclear: features.autoclear & maintained, ..*features };
            let patch = cleared.patch();
            self.storage
                .write_at(&patch.bytes, patch.offset.0)
                .map_err(|e| Error::io("clearing autoclear feature bits in the header", e))?;
            self.sync_for(writer, Rule::AutoclearFirst)?;
            *features = cleared;
        }
        writer.prepared.store(true, Ordering::Release);
        Ok(())
    }
}

const FLATTEN: &str = "`qemu-img rebase -b ''` makes the image independent of it";
const CONVERT: &str = "`qemu-img convert -O qcow2` makes an image without it";

pub(super) fn read_header(storage: &dyn Storage) -> Result<Header> {
    let io = |e| Error::io("reading the header", e);
    let len = storage.len().map_err(io)?;
    // Most headers are short; the rest of a large first cluster is read only where it matters.
    let short = len.min(4096) as usize;
    let mut bytes = vec![0; short];
    storage.read_at(&mut bytes, 0).map_err(io)?;
    match Header::parse(&bytes) {
        Ok(header) => Ok(header),
        Err(e) if e.kind() == ErrorKind::NotQcow2 => Err(e),
        Err(_) => {
            let mut bytes = vec![0; len.min(Header::READ_LENGTH as u64) as usize];
            storage.read_at(&mut bytes, 0).map_err(io)?;
            Header::parse(&bytes)
        }
    }
}

/// Why an image is not served: one line that names the feature and what to do.
fn refusal(header: &Header) -> Option<String> {
    let incompatible = header.incompatible_features;
    let unknown = incompatible & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = header.incompatible_feature_name(bit).unwrap_or_else(|| "no name given".into());
        return Some(format!("incompatible feature bit {bit} ({name}) is not known: {CONVERT}"));
    }
    if header.compression_type > 1 {
        let kind = header.compression_type;
        return Some(format!("compression type {kind} is not known: {CONVERT}"));
    }
    if header.geometry.data_file()
        && let Some(reason) = data_file_refusal(header)
    {
        return Some(reason);
    }
    if header.crypt_method > 2 {
        let kind = header.crypt_method;
        return Some(format!("encryption method {kind} is not known: {CONVERT}"));
    }
    None
}

/// Why an image with an external data file is not served. QEMU makes none of these.
fn data_file_refusal(header: &Header) -> Option<String> {
    let what = if header.snapshot_count > 0 {
        "has internal snapshots, which it cannot have: `qemu-img convert -O qcow2` makes a sound one"
    } else if header.backing_file.is_some()
        && header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0
    {
        "is marked as raw but has a backing file: `qemu-img check -r all` takes the mark away"
    } else if data_file_name(header).is_empty() {
        "does not record that file's name: `qemu-img amend --image-opts -o data_file=NAME \
         file.filename=IMAGE,data-file.filename=NAME` does"
    } else {
        return None;
    };
    Some(format!("the image, which has an external data file, {what}"))
}

/// The name of the external data file, empty where none is recorded.
fn data_file_name(header: &Header) -> &[u8] {
    header.extension(EXTENSION_DATA_FILE).unwrap_or_default()
}

fn backing_file(header: &Header) -> Option<BackingFile> {
    let name = header.backing_file.clone()?;
    let format = header.extension(EXTENSION_BACKING_FORMAT);
    Some(BackingFile { name, format: format.map(|f| String::from_utf8_lossy(f).into_owned()) })
}

fn not_served(feature: &str, remedy: &str) -> String {
    format!("{feature}: not served yet; {remedy}")
}
