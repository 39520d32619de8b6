//! New images: nothing allocated, everything that the format needs in place.
//!
//! The file is laid out as header, refcount table, refcount blocks, L1 table. Nothing here is safe
//! against a crash by itself: the file gets its name when it is complete and durable (see
//! [`crate::catalog::create_image`]).

use super::{BackingFile, Image};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE, EXTENSION_FEATURE_NAMES, Extension, Geometry, Header, HostCluster,
    HostOffset, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2,
    MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, feature_names, refcount,
};
use crate::storage::{Storage, reserve_metadata};

/// What a new image is to be like. The default is what `qemu-img create` makes by default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, a multiple of 512.
    pub virtual_size: u64,
    /// Bytes in a cluster: a power of 2 from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// The width of a refcount: a power of 2 from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Whether clusters of 16 KiB at least are divided into 32 subclusters. Version 3 only.
    pub extended_l2: bool,
    /// Whether QEMU may leave refcounts behind while it has the image open. Version 3 only.
    pub lazy_refcounts: bool,
    /// What clusters are compressed with, by who compresses them.
    pub compression: CompressionType,
    /// What is read where the image has nothing of its own.
    pub backing: Option<BackingFile>,
    /// Where the data is, if not in the image. Version 3 only.
    pub data_file: Option<NewDataFile>,
}

/// What clusters of an image are compressed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, which everybody knows.
    #[default]
    Deflate,
    /// zstd. Version 3 only.
    Zstd,
}

/// The external data file of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDataFile {
    /// Its name as the image is to record it.
    pub name: Vec<u8>,
    /// Whether it reads as the disk by itself at any time. Not with a backing file.
    pub raw: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            virtual_size: 0,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: CompressionType::Deflate,
            backing: None,
            data_file: None,
        }
    }
}

impl CreateOptions {
    /// Whether an image can be made with these options.
    ///
    /// # Errors
    /// As [`Image::create`], without the host's.
    pub fn check(&self) -> Result<()> {
        self.plan().map(drop)
    }

    fn plan(&self) -> Result<Plan> {
        let geometry = Geometry::of_new_image(
            self.version,
            self.cluster_size,
            self.refcount_bits,
            self.extended_l2,
        )?;
        let geometry = geometry.with_data_file(self.data_file.is_some());
        self.check_features()?;
        self.check_names()?;
        let layout = Layout::new(&geometry, self.l1_entries(&geometry)?)?;
        let header = self.header(&geometry, &layout);
        // The names of features are a help, no need.
        let with_names = || {
            let mut header = header.clone();
            header.extensions.push(extension(EXTENSION_FEATURE_NAMES, feature_names()));
            header.encode()
        };
        let bytes = match self.version {
            2 => header.encode(),
            _ => with_names().or_else(|_| header.encode()),
        };
        Ok(Plan { geometry, layout, header: bytes? })
    }

    fn check_features(&self) -> Result<()> {
        let needs_version_3 = [
            (self.lazy_refcounts, "lazy refcounts"),
            (self.compression != CompressionType::Deflate, "a compression other than deflate"),
            (self.data_file.is_some(), "an external data file"),
        ];
        match needs_version_3.iter().find(|(asked, _)| *asked && self.version < 3) {
            Some((_, feature)) => Err(Error::invalid(format!("{feature} needs version 3"))),
            None => Ok(()),
        }
    }

    fn check_names(&self) -> Result<()> {
        let names = [
            ("backing", self.backing.as_ref().map(|backing| &backing.name)),
            ("data", self.data_file.as_ref().map(|data| &data.name)),
        ];
        for (what, name) in names {
            let Some(name) = name else { continue };
            if name.is_empty() || name.contains(&0) || name.len() > MAX_BACKING_NAME as usize {
                return Err(Error::invalid(format!(
                    "the {what} file needs a name of 1 to {MAX_BACKING_NAME} bytes"
                )));
            }
        }
        if self.backing.is_some() && self.data_file.as_ref().is_some_and(|data| data.raw) {
            return Err(Error::invalid(
                "a raw data file reads as the whole disk: there can be no backing file under it",
            ));
        }
        Ok(())
    }

    fn l1_entries(&self, geometry: &Geometry) -> Result<u64> {
        if !self.virtual_size.is_multiple_of(512) {
            let size = self.virtual_size;
            return Err(Error::invalid(format!("a size of {size} bytes is no multiple of 512")));
        }
        if geometry.l1_entries_for(self.virtual_size) > MAX_L1_BYTES / 8 {
            let most = (MAX_L1_BYTES / 8)
                .saturating_mul(geometry.l2_entries())
                .saturating_mul(geometry.cluster_size());
            return Err(Error::new(
                ErrorKind::TooBig,
                format!(
                    "a size of {} bytes is too much for clusters of {} bytes, which are enough for \
                     {most}: choose a larger cluster size",
                    self.virtual_size, self.cluster_size
                ),
            ));
        }
        Ok(geometry.l1_entries_with_room(self.virtual_size).min(MAX_L1_BYTES / 8))
    }

    fn header(&self, geometry: &Geometry, layout: &Layout) -> Header {
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let is_zstd = self.compression == CompressionType::Zstd;
        let is_raw = self.data_file.as_ref().is_some_and(|data| data.raw);
        let format = self.backing.as_ref().and_then(|backing| backing.format.clone());
        let format = format.map(|f| extension(EXTENSION_BACKING_FORMAT, f.into_bytes()));
        let data = self.data_file.as_ref();
        let data = data.map(|data| extension(EXTENSION_DATA_FILE, data.name.clone()));
        Header {
            geometry: *geometry,
            size: self.virtual_size,
            backing_file: self.backing.as_ref().map(|backing| backing.name.clone()),
            crypt_method: 0,
            l1_size: layout.l1_entries as u32,
            l1_table_offset: layout.offset(geometry, layout.l1_start()),
            refcount_table_offset: layout.offset(geometry, 1),
            refcount_table_clusters: layout.table_clusters as u32,
            snapshot_count: 0,
            snapshots_offset: HostOffset(0),
            incompatible_features: flag(self.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
                | flag(is_zstd, INCOMPATIBLE_COMPRESSION)
                | flag(self.extended_l2, INCOMPATIBLE_EXTENDED_L2),
            compatible_features: flag(self.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS),
            autoclear_features: flag(is_raw, AUTOCLEAR_DATA_FILE_RAW),
            header_length: 0,
            compression_type: u8::from(is_zstd),
            extensions: format.into_iter().chain(data).collect(),
        }
    }
}

impl Image {
    /// Makes an empty image of `storage`, a file with nothing in it, and syncs it. What belongs
    /// beside it (the data file) is not touched.
    ///
    /// # Errors
    /// `Invalid` for options that do not go together, `TooBig` for a virtual size that the cluster
    /// size is not enough for, and those of the host.
    pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
        let Plan { geometry, layout, header } = options.plan()?;
        let length = layout.clusters(&geometry) << geometry.cluster_bits();
        let host = |what: &str, e| Error::io(format!("writing a new image: {what}"), e);
        storage.set_len(length).map_err(|e| host("its length", e))?;
        reserve_metadata(storage, 0..length).map_err(|e| host("room for its tables", e))?;
        let write = |what: &str, bytes: &[u8], cluster: u64| {
            let offset = layout.offset(&geometry, cluster);
            storage.write_at(bytes, offset.0).map_err(|e| host(what, e))
        };
        write("the refcount table", &layout.refcount_table(&geometry), 1)?;
        for block in 0..layout.blocks {
            let bytes = layout.refcount_block(&geometry, block);
            write("a refcount block", &bytes, layout.block(block))?;
        }
        write("the header", &header, 0)?;
        storage.sync().map_err(|e| host("syncing it", e))
    }
}

struct Plan {
    geometry: Geometry,
    layout: Layout,
    /// The start of the first cluster.
    header: Vec<u8>,
}

/// Where things are in a new image, in clusters: the header, the refcount table, its blocks, the L1
/// table.
struct Layout {
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
}

impl Layout {
    /// # Errors
    /// `TooBig` for an L1 table that takes more clusters than the largest refcount table counts.
    fn new(geometry: &Geometry, l1_entries: u64) -> Result<Layout> {
        let mut layout = Layout { table_clusters: 1, blocks: 1, l1_entries };
        // Blocks and table count themselves too: both only get more, until they are enough.
        loop {
            let blocks = layout.clusters(geometry).div_ceil(geometry.refcounts_per_block());
            let table_clusters = geometry.clusters_for(blocks * 8).0;
            if (blocks, table_clusters) == (layout.blocks, layout.table_clusters) {
                break;
            }
            (layout.blocks, layout.table_clusters) = (blocks, table_clusters);
        }
        if geometry.cluster_size() * layout.table_clusters > MAX_REFCOUNT_TABLE_BYTES {
            let text = "the image needs a larger refcount table than there can be: choose a larger \
                        cluster size";
            return Err(Error::new(ErrorKind::TooBig, text));
        }
        Ok(layout)
    }

    fn block(&self, index: u64) -> u64 {
        1 + self.table_clusters + index
    }

    fn l1_start(&self) -> u64 {
        self.block(self.blocks)
    }

    /// Clusters in all.
    fn clusters(&self, geometry: &Geometry) -> u64 {
        self.l1_start() + geometry.clusters_for(self.l1_entries * 8).0
    }

    fn offset(&self, geometry: &Geometry, cluster: u64) -> HostOffset {
        geometry.host_offset(HostCluster(cluster))
    }

    fn refcount_table(&self, geometry: &Geometry) -> Vec<u8> {
        let offset = |index| self.offset(geometry, self.block(index)).0;
        (0..self.blocks).flat_map(|index| offset(index).to_be_bytes()).collect()
    }

    /// Block `index`: every cluster that there is counts 1.
    fn refcount_block(&self, geometry: &Geometry, index: u64) -> Vec<u8> {
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let per_block = geometry.refcounts_per_block();
        let used = (self.clusters(geometry) - index * per_block).min(per_block);
        for entry in 0..used as usize {
            refcount::set(&mut bytes, entry, geometry.refcount_order(), 1);
        }
        bytes
    }
}

fn extension(kind: u32, data: Vec<u8>) -> Extension {
    Extension { kind, offset: HostOffset(0), data }
}
