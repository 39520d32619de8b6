//! `qcow2fs info`: what an image is, by its header, whoever uses it.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::mounted::Mounted;
use super::{keys, snapshot, terminal};
use crate::error::{Error, Result};
use crate::format::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, BitmapsExtension, COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS, EXTENSION_DATA_FILE, Header, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
};
use crate::image::{Image, SnapshotInfo};
use crate::storage::image_lock::{self, Access};
use crate::storage::{HostFile, Storage};

/// Show what images are
///
/// It reads headers and snapshot tables, locks nothing and writes nothing, so it works whoever uses
/// the image. The names in the JSON are those of `qemu-img info`; `in-use`, `used-by` and `mounted-at`
/// are added.
///
/// Exit code: 0 done; 1 an image could not be read, or a key is wrong; 2 arguments that make no sense.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs info disk.qcow2
  qcow2fs info --json images/a.qcow2 images/b.qcow2
  qcow2fs info --key-file disk=FILE disk.qcow2")]
pub(super) struct Args {
    /// Print a JSON object for each image
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    trial: keys::Trial,
    /// The images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let mut code = 0;
    for (number, path) in args.images.iter().enumerate() {
        match Facts::read(path, &args.trial) {
            Ok(facts) => {
                if let Err(line) = &facts.key {
                    eprintln!("qcow2fs info: {}: {line}", path.display());
                    code = 1;
                }
                let text = if args.json { format!("{:#}\n", facts.json()) } else { facts.page() };
                let gap = if number > 0 && !args.json { "\n" } else { "" };
                // A closed pipe is nobody's business here.
                let _ = write!(std::io::stdout(), "{gap}{text}");
            }
            Err(e) => {
                eprintln!("qcow2fs info: {}: {e}", path.display());
                code = 1;
            }
        }
    }
    code
}

/// What is known of an image.
struct Facts {
    path: PathBuf,
    header: Header,
    length: u64,
    allocated: u64,
    snapshots: Vec<SnapshotInfo>,
    used: Option<(Access, Option<String>)>,
    /// The raw file in the mount that has it open.
    mounted: Option<PathBuf>,
    /// Why it is not served.
    refusal: Option<String>,
    /// What came of trying its key, where that was done.
    key: Result<Option<&'static str>, String>,
}

impl Facts {
    fn read(path: &Path, trial: &keys::Trial) -> Result<Facts> {
        let file = super::check::open(path, false)?;
        let used = image_lock::used_by(&file)?;
        let storage = HostFile::new(file);
        let host = |e| Error::io("looking at the image", e);
        let mounted = used.as_ref().and_then(|_| Mounted::open_in(path));
        Ok(Facts {
            path: path.to_owned(),
            header: Image::header(&storage)?,
            length: storage.len().map_err(host)?,
            allocated: storage.allocated().map_err(host)?,
            snapshots: snapshot::list(path)?,
            used,
            mounted: mounted.map(|mount| mount.raw_file()),
            refusal: Image::summarize(&storage)?.refusal,
            key: trial.run(path),
        })
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    fn compression(&self) -> &'static str {
        match self.header.compression_type {
            0 => "zlib",
            1 => "zstd",
            _ => "unknown",
        }
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header.crypt_method {
            0 => None,
            1 => Some("aes"),
            _ => Some("luks"),
        }
    }

    fn extension(&self, kind: u32) -> Option<String> {
        self.header.extension(kind).map(Facts::text)
    }

    fn data_file(&self) -> Option<String> {
        self.header.geometry.data_file().then(|| self.extension(EXTENSION_DATA_FILE))?
    }

    /// How many dirty bitmaps it has that are still kept up to date.
    fn bitmaps(&self) -> u32 {
        let data = self.header.extension(EXTENSION_BITMAPS);
        let kept = self.header.autoclear_features & AUTOCLEAR_BITMAPS != 0;
        let parsed =
            data.filter(|_| kept).map(|d| BitmapsExtension::parse(d, &self.header.geometry));
        parsed.and_then(Result::ok).map_or(0, |bitmaps| bitmaps.count)
    }

    fn json(&self) -> Value {
        let (header, g) = (&self.header, &self.header.geometry);
        let mut data = Map::new();
        data.insert("compat".into(), if g.version() == 2 { "0.10" } else { "1.1" }.into());
        data.insert("compression-type".into(), self.compression().into());
        data.insert("refcount-bits".into(), (1u64 << g.refcount_order()).into());
        if g.version() >= 3 {
            let corrupt = header.incompatible_features & INCOMPATIBLE_CORRUPT != 0;
            let lazy = header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS != 0;
            data.insert("corrupt".into(), corrupt.into());
            data.insert("lazy-refcounts".into(), lazy.into());
            data.insert("extended-l2".into(), g.extended_l2().into());
        }
        if let Some(name) = self.data_file() {
            let raw = header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0;
            data.insert("data-file".into(), name.into());
            data.insert("data-file-raw".into(), raw.into());
        }
        let mut all = json!({
            "filename": self.path.to_string_lossy(),
            "format": "qcow2",
            "virtual-size": header.size,
            "cluster-size": g.cluster_size(),
            "actual-size": self.allocated,
            "file-length": self.length,
            "dirty-flag": header.incompatible_features & INCOMPATIBLE_DIRTY != 0,
            "format-specific": { "type": "qcow2", "data": data },
            "in-use": match &self.used {
                None => Value::Null,
                Some((Access::Read, _)) => "read".into(),
                Some((Access::Write, _)) => "written".into(),
            },
        });
        let mut add = |key: &str, value: Option<Value>| {
            if let (Some(all), Some(value)) = (all.as_object_mut(), value) {
                all.insert(key.to_owned(), value);
            }
        };
        add("encrypted", self.encryption().map(|_| true.into()));
        add("key", self.key.as_ref().ok().copied().flatten().map(Value::from));
        let backing = header.backing_file.as_deref().map(Facts::text);
        add("backing-filename", backing.map(Value::from));
        add("backing-filename-format", self.extension(EXTENSION_BACKING_FORMAT).map(Value::from));
        let snapshots: Vec<_> = self.snapshots.iter().map(snapshot::as_json).collect();
        add("snapshots", (!snapshots.is_empty()).then_some(snapshots.into()));
        add("bitmaps", Some(self.bitmaps()).filter(|count| *count > 0).map(Value::from));
        let holder = self.used.as_ref().and_then(|(_, holder)| holder.clone());
        add("used-by", holder.map(Value::from));
        let mounted = self.mounted.as_ref().map(|place| place.to_string_lossy().into());
        add("mounted-at", mounted);
        add("not-served", self.refusal.clone().map(Value::from));
        all
    }

    fn page(&self) -> String {
        use super::size::show_exactly as exactly;
        let (header, g) = (&self.header, &self.header.geometry);
        let colours = terminal::has_colours();
        let mut page = format!("{}\n", terminal::bold(&self.path.display().to_string(), colours));
        let mut line = |name: &str, value: String| {
            page += &format!("  {name:<14}{}\n", terminal::plain(&value));
        };
        line("disk", exactly(header.size));
        line("file", exactly(self.length));
        line("on the host", exactly(self.allocated));
        line("clusters", self.clusters());
        let compat = if g.version() == 2 { "0.10" } else { "1.1" };
        line("format", format!("qcow2 version {}, compat {compat}", g.version()));
        if let Some(name) = &header.backing_file {
            let format = self.extension(EXTENSION_BACKING_FORMAT);
            let format = format.unwrap_or_else(|| "format not recorded".into());
            line("backing file", format!("{} ({format})", Facts::text(name)));
        }
        if let Some(name) = self.data_file() {
            line("data file", name);
        }
        if let Some(kind) = self.encryption() {
            line("encryption", kind.into());
        }
        if let Ok(Some(verdict)) = self.key {
            line("key", verdict.into());
        }
        if !self.snapshots.is_empty() {
            let names: Vec<_> = self.snapshots.iter().map(|s| s.name.as_str()).collect();
            line("snapshots", format!("{}: {}", names.len(), names.join(", ")));
        }
        if self.bitmaps() > 0 {
            line("dirty bitmaps", self.bitmaps().to_string());
        }
        line("state", self.state());
        if let Some((access, holder)) = &self.used {
            let what = if *access == Access::Write { "written" } else { "read" };
            let holder = holder.as_deref().unwrap_or("another process");
            line("in use", format!("{what} by {holder}"));
        }
        if let Some(place) = &self.mounted {
            line("mounted at", place.display().to_string());
        }
        if let Some(why) = &self.refusal {
            line("not served", why.clone());
        }
        page
    }

    fn clusters(&self) -> String {
        let g = &self.header.geometry;
        let mut text = format!(
            "{}, refcounts of {} bits, compressed with {}",
            super::size::show(g.cluster_size()),
            1u64 << g.refcount_order(),
            self.compression()
        );
        if g.extended_l2() {
            text += &format!(", subclusters of {}", super::size::show(g.subcluster_size()));
        }
        if self.header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS != 0 {
            text += ", lazy refcounts";
        }
        text
    }

    fn state(&self) -> String {
        let is = |bit| self.header.incompatible_features & bit != 0;
        match (is(INCOMPATIBLE_CORRUPT), is(INCOMPATIBLE_DIRTY)) {
            (true, _) => "marked as corrupt: run `qcow2fs check --repair all` on it".into(),
            (false, true) => "not closed cleanly: the next opening puts its refcounts right".into(),
            (false, false) => "ok".into(),
        }
    }
}
