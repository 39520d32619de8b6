//! The image header: versions 2 and 3 with their extensions.
//!
//! A header is parsed once and never written back whole: every change is a [`Patch`] of the few
//! bytes concerned, inside one 512-byte sector, so unknown fields and extensions stay as they are
//! and a change is old or new, never half. Only a new image gets one written whole.

use super::{Geometry, HostOffset};
use crate::error::{Error, ErrorKind, Result, legible};

/// The first four bytes of each image, big-endian.
pub const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Bytes of the header of a new image of version 3: with the compression type, padded.
const NEW_V3_LENGTH: usize = 112;
/// The name of a backing file is at most this long.
pub const MAX_BACKING_NAME: u32 = 1023;

/// An L1 table is at most this many bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// A refcount table is at most this many bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// A LUKS header is at most this many bytes, key slots included.
const MAX_LUKS_BYTES: u64 = 1 << 30;
/// What the header's `crypt_method` says of LUKS.
const CRYPT_LUKS: u32 = 2;

/// Refcounts may be too low: rebuild them before allocating.
pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
/// Something is wrong: read-only until repaired.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Guest data is in another file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Compressed clusters are not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// L2 entries are 16 bytes, with subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// Every incompatible feature that this program knows.
pub const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;
/// Refcounts may be left behind while the dirty bit is set.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;
/// The bitmaps extension is consistent with the data.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// The external data file is a correct raw image by itself.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// Header extension: the backing file's format.
pub const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: names of feature bits.
pub const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: where the bitmap directory is.
pub const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Header extension: where the LUKS header is.
pub const EXTENSION_LUKS: u32 = 0x0537_be77;
/// Header extension: the name of the external data file.
pub const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// One header extension, as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is, one of the `EXTENSION_` numbers or an unknown one.
    pub kind: u32,
    /// Where in the file its bytes start.
    pub offset: HostOffset,
    /// Its bytes, without the padding.
    pub data: Vec<u8>,
}

/// A change of the header: these bytes at this offset of the file, all within one sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Where the bytes go.
    pub offset: HostOffset,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The header of an image, every field checked against the format's limits.
///
/// What lies at the offsets it names is not checked here.
#[derive(Clone, Debug)]
pub struct Header {
    /// Cluster size, refcount width and the like.
    pub geometry: Geometry,
    /// The virtual size in bytes.
    pub size: u64,
    /// The name of the backing file, as raw bytes.
    pub backing_file: Option<Vec<u8>>,
    /// 0 none, 1 AES-CBC, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// The number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: HostOffset,
    /// `INCOMPATIBLE_` bits; 0 in version 2.
    pub incompatible_features: u64,
    /// `COMPATIBLE_` bits; 0 in version 2.
    pub compatible_features: u64,
    /// `AUTOCLEAR_` bits; 0 in version 2.
    pub autoclear_features: u64,
    /// Bytes of the header proper; 72 in version 2.
    pub header_length: u32,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
    /// The extensions in their order, unknown ones included.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// The bytes from the start of the file that [`Header::parse`] wants to see: the longest first
    /// cluster there is.
    pub const READ_LENGTH: usize = 2 << 20;

    /// The header in `bytes`, the start of the image file ([`Header::READ_LENGTH`] bytes, fewer
    /// where the file is shorter).
    ///
    /// # Errors
    /// [`ErrorKind::NotQcow2`] without the magic number or with an unknown version,
    /// [`ErrorKind::Corrupt`] with a field that the format does not allow, [`ErrorKind::TooBig`]
    /// with a table past the limits.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let fixed = bytes.get(..V2_LENGTH).ok_or_else(|| not_qcow2("shorter than a header"))?;
        if be32(fixed, 0) != MAGIC {
            return Err(not_qcow2("no qcow2 magic number at its start"));
        }
        let version = be32(fixed, 4);
        if !(2..=3).contains(&version) {
            return Err(not_qcow2(&format!("qcow2 version {version}; 2 and 3 are known")));
        }
        let cluster_bits = be32(fixed, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "header: cluster_bits is {cluster_bits}, allowed are 9 to 21"
            )));
        }
        let cluster_size = 1usize << cluster_bits;
        let bytes = &bytes[..bytes.len().min(cluster_size)];

        let mut header = Header {
            geometry: Geometry::new(version, cluster_bits, 4, false),
            size: be64(fixed, 24),
            backing_file: None,
            crypt_method: be32(fixed, 32),
            l1_size: be32(fixed, 36),
            l1_table_offset: HostOffset(be64(fixed, 40)),
            refcount_table_offset: HostOffset(be64(fixed, 48)),
            refcount_table_clusters: be32(fixed, 56),
            snapshot_count: be32(fixed, 60),
            snapshots_offset: HostOffset(be64(fixed, 64)),
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            header_length: V2_LENGTH as u32,
            compression_type: 0,
            extensions: Vec::new(),
        };
        if version >= 3 {
            header.parse_version_3(bytes)?;
        }
        header.parse_backing_name(bytes)?;
        header.parse_extensions(bytes)?;
        header.check_tables()?;
        Ok(header)
    }

    fn parse_version_3(&mut self, bytes: &[u8]) -> Result<()> {
        let fixed = bytes
            .get(..V3_LENGTH)
            .ok_or_else(|| Error::corrupt("header: the file ends inside the version 3 header"))?;
        self.incompatible_features = be64(fixed, 72);
        self.compatible_features = be64(fixed, 80);
        self.autoclear_features = be64(fixed, 88);
        let refcount_order = be32(fixed, 96);
        if refcount_order > 6 {
            return Err(Error::corrupt(format!(
                "header: refcount_order is {refcount_order}, allowed are 0 to 6"
            )));
        }
        self.header_length = be32(fixed, 100);
        let length = self.header_length as usize;
        if length < V3_LENGTH || !length.is_multiple_of(8) || length > bytes.len() {
            return Err(Error::corrupt(format!(
                "header: header_length is {length}, allowed are multiples of 8 from 104 to the \
                 end of the first cluster"
            )));
        }
        if length > V3_LENGTH {
            self.compression_type = bytes[V3_LENGTH];
        }
        let flagged = self.incompatible_features & INCOMPATIBLE_COMPRESSION != 0;
        if flagged != (self.compression_type != 0) {
            return Err(Error::corrupt(format!(
                "header: compression_type is {} but its feature bit is {}",
                self.compression_type,
                if flagged { "set" } else { "not set" }
            )));
        }
        let extended_l2 = self.incompatible_features & INCOMPATIBLE_EXTENDED_L2 != 0;
        if extended_l2 && self.geometry.cluster_bits() < 14 {
            return Err(Error::corrupt(format!(
                "header: extended L2 entries need cluster_bits of 14 at least, not {}",
                self.geometry.cluster_bits()
            )));
        }
        let data_file = self.incompatible_features & INCOMPATIBLE_DATA_FILE != 0;
        self.geometry = Geometry::new(3, self.geometry.cluster_bits(), refcount_order, extended_l2)
            .with_data_file(data_file);
        Ok(())
    }

    fn parse_backing_name(&mut self, bytes: &[u8]) -> Result<()> {
        let offset = be64(bytes, 8);
        let length = be32(bytes, 16);
        if offset == 0 {
            return Ok(());
        }
        if length > MAX_BACKING_NAME {
            return Err(Error::corrupt(format!(
                "header: the backing file's name is {length} bytes long, allowed are 1023"
            )));
        }
        let name = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(length as usize)?))
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "header: the backing file's name at {offset:#x} leaves the first cluster"
                ))
            })?;
        self.backing_file = Some(name.to_vec());
        Ok(())
    }

    fn parse_extensions(&mut self, bytes: &[u8]) -> Result<()> {
        // The area ends where the backing file's name starts.
        let end = match be64(bytes, 8) {
            0 => bytes.len(),
            name => bytes.len().min(usize::try_from(name).unwrap_or(usize::MAX)),
        };
        let mut at = self.header_length as usize;
        while at + 8 <= end {
            let kind = be32(bytes, at);
            let length = be32(bytes, at + 4) as usize;
            if kind == 0 {
                break;
            }
            let data = bytes[..end].get(at + 8..).and_then(|rest| rest.get(..length));
            let data = data.ok_or_else(|| {
                Error::corrupt(format!(
                    "header extension {kind:#010x} at {at:#x} is {length} bytes long and leaves \
                     the header"
                ))
            })?;
            let offset = HostOffset(at as u64 + 8);
            self.extensions.push(Extension { kind, offset, data: data.to_vec() });
            at += 8 + length.next_multiple_of(8);
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<()> {
        let g = &self.geometry;
        for (name, offset) in [
            ("the L1 table", self.l1_table_offset),
            ("the refcount table", self.refcount_table_offset),
            ("the snapshot table", self.snapshots_offset),
        ] {
            if !g.is_aligned(offset.0) {
                return Err(Error::corrupt(format!(
                    "header: {name} at {offset} does not start a cluster"
                )));
            }
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!(
                    "header: the L1 table has {} entries, at most 4194304 are served",
                    self.l1_size
                ),
            ));
        }
        if u64::from(self.refcount_table_clusters) > MAX_REFCOUNT_TABLE_BYTES >> g.cluster_bits() {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!(
                    "header: the refcount table has {} clusters, at most 8 MiB are served",
                    self.refcount_table_clusters
                ),
            ));
        }
        if self.refcount_table_clusters == 0 || self.refcount_table_offset.0 == 0 {
            return Err(Error::corrupt("header: there is no refcount table"));
        }
        let needed = g.l1_entries_for(self.size);
        if u64::from(self.l1_size) < needed {
            return Err(Error::corrupt(format!(
                "header: a virtual size of {} bytes needs {needed} L1 entries, there are {}",
                self.size, self.l1_size
            )));
        }
        if self.l1_size > 0 && self.l1_table_offset.0 == 0 {
            return Err(Error::corrupt("header: the L1 table would lie over the header"));
        }
        Ok(())
    }

    /// The first bytes of a new image: the header with its extensions (their offsets are found
    /// here) and the backing file's name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where all that does not fit into the first cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = self.encode_fixed();
        for extension in &self.extensions {
            encode_extension(&mut bytes, extension.kind, &extension.data);
        }
        encode_extension(&mut bytes, 0, &[]);
        if let Some(name) = &self.backing_file {
            let offset = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend(name);
        }
        if bytes.len() as u64 > self.geometry.cluster_size() {
            return Err(Error::invalid(format!(
                "the names of other files do not fit into the first cluster of {} bytes: choose a \
                 larger cluster size",
                self.geometry.cluster_size()
            )));
        }
        Ok(bytes)
    }

    /// The fields at fixed places, those of the backing file's name left out.
    fn encode_fixed(&self) -> Vec<u8> {
        let version = self.geometry.version();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(version.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend(self.geometry.cluster_bits().to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_table_offset.0.to_be_bytes());
        bytes.extend(self.refcount_table_offset.0.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshot_count.to_be_bytes());
        bytes.extend(self.snapshots_offset.0.to_be_bytes());
        if version >= 3 {
            bytes.extend(self.incompatible_features.to_be_bytes());
            bytes.extend(self.compatible_features.to_be_bytes());
            bytes.extend(self.autoclear_features.to_be_bytes());
            bytes.extend(self.geometry.refcount_order().to_be_bytes());
            bytes.extend((NEW_V3_LENGTH as u32).to_be_bytes());
            bytes.push(self.compression_type);
            bytes.resize(NEW_V3_LENGTH, 0);
        }
        bytes
    }

    /// The data of the first extension of `kind`.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// Where the LUKS header is, and how many bytes it has with its key slots; `None` without one.
    ///
    /// # Errors
    /// `Corrupt`: it starts no cluster, is longer than any, or is not said to be anywhere in an image
    /// that is encrypted with it.
    pub fn luks(&self) -> Result<Option<(HostOffset, u64)>> {
        let is_luks = self.crypt_method == CRYPT_LUKS;
        let Some(data) = self.extension(EXTENSION_LUKS).filter(|data| data.len() == 16) else {
            return match is_luks || self.extension(EXTENSION_LUKS).is_some() {
                // Whoever took its clusters for leaked would erase the keys.
                true => Err(Error::corrupt("header: nothing says where the LUKS header is")),
                false => Ok(None),
            };
        };
        let (offset, length) = (HostOffset(be64(data, 0)), be64(data, 8));
        let is_aligned = self.geometry.is_aligned(offset.0);
        if !is_aligned || length > MAX_LUKS_BYTES || is_luks && length == 0 {
            return Err(Error::corrupt("header: the LUKS extension makes no sense"));
        }
        Ok(Some((offset, length)))
    }

    /// The name of incompatible feature `bit` from the image's own feature name table.
    pub fn incompatible_feature_name(&self, bit: u32) -> Option<String> {
        let table = self.extension(EXTENSION_FEATURE_NAMES)?;
        let entry = table.chunks_exact(48).find(|e| e[0] == 0 && u32::from(e[1]) == bit)?;
        let name = &entry[2..];
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        Some(legible(&name[..end]))
    }

    /// The virtual size becomes `size`.
    #[must_use]
    pub fn patch_size(size: u64) -> Patch {
        Patch { offset: HostOffset(24), bytes: size.to_be_bytes().to_vec() }
    }

    /// The active L1 table is `entries` long and starts at `offset`.
    #[must_use]
    pub fn patch_l1(entries: u32, offset: HostOffset) -> Patch {
        let bytes = [&entries.to_be_bytes()[..], &offset.0.to_be_bytes()].concat();
        Patch { offset: HostOffset(36), bytes }
    }

    /// The refcount table starts at `offset` and has `clusters` clusters.
    #[must_use]
    pub fn patch_refcount_table(offset: HostOffset, clusters: u32) -> Patch {
        let bytes = [&offset.0.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
        Patch { offset: HostOffset(48), bytes }
    }

    /// The number of snapshots becomes `count`, and their table is at `offset`.
    #[must_use]
    pub fn patch_snapshots(count: u32, offset: HostOffset) -> Patch {
        let mut bytes = count.to_be_bytes().to_vec();
        bytes.extend(offset.0.to_be_bytes());
        Patch { offset: HostOffset(60), bytes }
    }

    /// The disk is `size` bytes long and its L1 table of `entries` entries starts at `offset`: one
    /// write, with the `crypt_method` that stands between them.
    #[must_use]
    pub fn patch_disk(size: u64, crypt_method: u32, entries: u32, offset: HostOffset) -> Patch {
        let mut bytes = size.to_be_bytes().to_vec();
        bytes.extend(crypt_method.to_be_bytes());
        bytes.extend(entries.to_be_bytes());
        bytes.extend(offset.0.to_be_bytes());
        Patch { offset: HostOffset(24), bytes }
    }

    /// The bitmap directory, whose length stays, starts at `offset`; `extension` is the bitmaps
    /// extension.
    #[must_use]
    pub fn patch_bitmap_directory(extension: &Extension, offset: HostOffset) -> Patch {
        // A word at a multiple of 8: extensions are padded to that.
        let at = HostOffset(extension.offset.0 + 16);
        Patch { offset: at, bytes: offset.0.to_be_bytes().to_vec() }
    }

    /// The feature words become `incompatible`, `compatible` and `autoclear`. Version 3 only.
    #[must_use]
    pub fn patch_features(incompatible: u64, compatible: u64, autoclear: u64) -> Patch {
        let bytes = [incompatible, compatible, autoclear].map(u64::to_be_bytes).concat();
        Patch { offset: HostOffset(72), bytes }
    }
}

/// The data of the extension that names the features which this program knows, so that another one
/// can say what it does not know: 48 bytes each, in the words that QEMU uses.
pub fn feature_names() -> Vec<u8> {
    let features: [(u8, u64, &str); 8] = [
        (0, INCOMPATIBLE_DIRTY, "dirty bit"),
        (0, INCOMPATIBLE_CORRUPT, "corrupt bit"),
        (0, INCOMPATIBLE_DATA_FILE, "external data file"),
        (0, INCOMPATIBLE_COMPRESSION, "compression type"),
        (0, INCOMPATIBLE_EXTENDED_L2, "extended L2 entries"),
        (1, COMPATIBLE_LAZY_REFCOUNTS, "lazy refcounts"),
        (2, AUTOCLEAR_BITMAPS, "bitmaps"),
        (2, AUTOCLEAR_DATA_FILE_RAW, "raw external data"),
    ];
    let mut bytes = Vec::new();
    for (kind, flag, name) in features {
        let end = bytes.len() + 48;
        bytes.extend([kind, flag.trailing_zeros() as u8]);
        bytes.extend(name.as_bytes());
        bytes.resize(end, 0);
    }
    bytes
}

fn encode_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn not_qcow2(why: &str) -> Error {
    Error::new(ErrorKind::NotQcow2, format!("not a qcow2 image: {why}"))
}

/// The big-endian u32 at `at`; 0 past the end.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

/// The big-endian u64 at `at`; 0 past the end.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 3 header of a 1 GiB disk with 64 KiB clusters.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0u8; 65536];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        bytes[36..40].copy_from_slice(&2u32.to_be_bytes());
        bytes[40..48].copy_from_slice(&0x30000u64.to_be_bytes());
        bytes[48..56].copy_from_slice(&0x10000u64.to_be_bytes());
        bytes[56..60].copy_from_slice(&1u32.to_be_bytes());
        bytes[96..100].copy_from_slice(&4u32.to_be_bytes());
        bytes[100..104].copy_from_slice(&112u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_plain_header_parses() {
        let header = Header::parse(&sample()).unwrap();
        assert_eq!(header.size, 1 << 30);
        assert_eq!(header.geometry.cluster_size(), 65536);
        assert_eq!(header.l1_size, 2);
        assert!(header.extensions.is_empty());
    }

    #[test]
    fn an_encoded_header_parses_to_itself() {
        let mut header = Header::parse(&sample()).unwrap();
        header.incompatible_features = INCOMPATIBLE_COMPRESSION;
        header.compression_type = 1;
        header.backing_file = Some(b"base.raw".to_vec());
        for (kind, data) in [
            (EXTENSION_BACKING_FORMAT, b"raw".to_vec()),
            (EXTENSION_FEATURE_NAMES, feature_names()),
        ] {
            header.extensions.push(Extension { kind, offset: HostOffset(0), data });
        }
        let bytes = header.encode().unwrap();
        let mut parsed = Header::parse(&bytes).unwrap();
        assert_eq!(parsed.extensions[0].offset, HostOffset(120));
        for extension in &mut parsed.extensions {
            extension.offset = HostOffset(0);
        }
        assert_eq!(format!("{parsed:?}"), format!("{header:?}"));
        let lazy = parsed.extension(EXTENSION_FEATURE_NAMES).map(|names| &names[48 * 4..][..11]);
        assert_eq!(lazy, Some(&b"\0\x04extended "[..]));
    }

    #[test]
    fn what_does_not_fit_into_the_first_cluster_is_refused() {
        let mut header = Header::parse(&sample()).unwrap();
        header.backing_file = Some(vec![b'x'; 1023]);
        header.geometry = Geometry::new(3, 9, 4, false);
        assert_eq!(header.encode().unwrap_err().kind(), ErrorKind::Invalid);
        header.geometry = Geometry::new(3, 11, 4, false);
        assert!(header.encode().is_ok());
    }

    #[test]
    fn patches_change_what_parse_reads() {
        let mut bytes = sample();
        for patch in [
            Header::patch_size(1 << 29),
            Header::patch_l1(5, HostOffset(0x50000)),
            Header::patch_refcount_table(HostOffset(0x70000), 3),
            Header::patch_features(1, 1, 4),
        ] {
            let at = patch.offset.0 as usize;
            assert!(at + patch.bytes.len() <= 512, "within one sector");
            bytes[at..at + patch.bytes.len()].copy_from_slice(&patch.bytes);
        }
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.size, 1 << 29);
        assert_eq!((header.l1_size, header.l1_table_offset.0), (5, 0x50000));
        assert_eq!(header.refcount_table_offset.0, 0x70000);
        assert_eq!(header.refcount_table_clusters, 3);
        assert_eq!(header.incompatible_features, INCOMPATIBLE_DIRTY);
        assert_eq!((header.compatible_features, header.autoclear_features), (1, 4));
    }

    #[test]
    fn every_truncation_is_an_error_or_the_same_header() {
        let bytes = sample();
        for length in 0..256 {
            assert_eq!(Header::parse(&bytes[..length]).is_ok(), length >= 112, "{length} bytes");
        }
    }

    #[test]
    fn an_extension_that_leaves_the_cluster_is_corruption() {
        let mut bytes = sample();
        bytes[112..116].copy_from_slice(&0x1234u32.to_be_bytes());
        bytes[116..120].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Header::parse(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
        bytes[116..120].copy_from_slice(&3u32.to_be_bytes());
        bytes[120..123].copy_from_slice(b"abc");
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.extension(0x1234), Some(&b"abc"[..]));
        assert_eq!(header.extensions[0].offset, HostOffset(120));
    }

    #[test]
    fn a_short_l1_table_is_corruption() {
        let mut bytes = sample();
        bytes[36..40].copy_from_slice(&1u32.to_be_bytes());
        assert_eq!(Header::parse(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
