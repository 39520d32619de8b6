//! The state of a mount in Prometheus' text format, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::fmt::Write;

use super::status::{ImageStatus, MountStatus};
use crate::counters::{self, OperationCounts};

/// Nanoseconds in a second.
const SECOND: f64 = 1e9;

/// The metrics of a mount.
pub fn metrics(status: &MountStatus) -> String {
    let mut page = Page::default();
    page.mount(status);
    page.sizes(status);
    page.clusters(status);
    page.work(status);
    page.requests(status);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn mount(&mut self, status: &MountStatus) {
        self.begin("mount_info", "gauge", "What is mounted where, by which process.");
        let (source, place) = (&status.source, &status.mountpoint);
        let pid = status.pid.to_string();
        self.sample("mount_info", &[("source", source), ("mountpoint", place), ("pid", &pid)], 1);
        self.begin("images_open", "gauge", "Images that are open.");
        self.sample("images_open", &[], status.images.len() as u64);
        self.begin("images_failed", "gauge", "Images that had an error and were not opened since.");
        self.sample("images_failed", &[], status.errors.len() as u64);
        self.begin("cache_bytes", "gauge", "What the caches of all images hold.");
        self.sample("cache_bytes", &[], status.caches.held);
        self.begin("cache_limit_bytes", "gauge", "What they may hold.");
        self.sample("cache_limit_bytes", &[], status.caches.limit);
        self.begin("close_errors_total", "counter", "Closes of images that failed.");
        self.sample("close_errors_total", &[], status.close_errors);
    }

    /// One number of each image that tells it.
    fn each(
        &mut self,
        status: &MountStatus,
        name: &str,
        kind: &str,
        help: &str,
        value: impl Fn(&ImageStatus) -> Option<u64>,
    ) {
        self.begin(name, kind, help);
        for image in &status.images {
            if let Some(value) = value(image) {
                self.sample(name, &[("image", &image.name)], value);
            }
        }
    }

    fn sizes(&mut self, status: &MountStatus) {
        let gauge = "gauge";
        self.each(
            status,
            "image_healthy",
            gauge,
            "1, or 0 where the image had an error.",
            |image| Some(image.image.as_ref().is_some_and(|image| image.health == "ok").into()),
        );
        self.each(status, "image_writable", gauge, "Whether writes are taken.", |image| {
            Some(image.image.as_ref()?.writable.into())
        });
        self.each(status, "image_handles", gauge, "How many times it is open.", |image| {
            Some(image.handles.into())
        });
        self.each(status, "image_virtual_bytes", gauge, "Size of the disk.", |image| {
            Some(image.image.as_ref()?.virtual_size)
        });
        self.each(status, "image_file_bytes", gauge, "Length of the image file.", |image| {
            Some(image.image.as_ref()?.file_length)
        });
        self.each(status, "image_allocated_bytes", gauge, "Space on the host.", |image| {
            Some(image.image.as_ref()?.allocated)
        });
        self.each(status, "image_live_bytes", gauge, "Clusters in use.", |image| {
            image.image.as_ref()?.live
        });
    }

    fn clusters(&mut self, status: &MountStatus) {
        self.begin("image_clusters", "gauge", "Clusters between two uses, by state.");
        for image in &status.images {
            let Some(told) = &image.image else { continue };
            let counts = &told.clusters;
            for (state, count) in [
                ("junk", counts.junk),
                ("released", counts.released),
                ("erased", counts.erased),
                ("available", counts.available),
                ("rooted", counts.rooted),
            ] {
                self.sample("image_clusters", &[("image", &image.name), ("state", state)], count);
            }
        }
        let compacting = "Whether clusters are being moved to make the file short.";
        self.each(status, "image_compacting", "gauge", compacting, |image| {
            Some(image.image.as_ref()?.compaction.running.into())
        });
    }

    fn work(&mut self, status: &MountStatus) {
        self.begin("image_recycled_bytes_total", "counter", "What the recycler has done.");
        for image in &status.images {
            let Some(told) = &image.image else { continue };
            let done = &told.recycled;
            for (what, bytes) in [
                ("punched", done.punched),
                ("freed", done.freed),
                ("cut", done.cut),
                ("moved", done.moved),
            ] {
                let labels = [("image", image.name.as_str()), ("work", what)];
                self.sample("image_recycled_bytes_total", &labels, bytes);
            }
        }
        self.begin(
            "image_cache_lookups_total",
            "counter",
            "Lookups in caches, by what came of them.",
        );
        for image in &status.images {
            let Some(told) = &image.image else { continue };
            for (cache, counts) in [("tables", told.table_cache), ("inflated", told.inflated_cache)]
            {
                for (result, count) in [("hit", counts.hits), ("miss", counts.misses)] {
                    let labels =
                        [("image", image.name.as_str()), ("cache", cache), ("result", result)];
                    self.sample("image_cache_lookups_total", &labels, count);
                }
            }
        }
        self.each(status, "image_flushes_total", "counter", "Completed flushes.", |image| {
            Some(image.image.as_ref()?.flushes)
        });
        let syncs = "Syncs of the image file and of its data file.";
        self.each(status, "image_syncs_total", "counter", syncs, |image| {
            Some(image.image.as_ref()?.syncs)
        });
    }

    fn requests(&mut self, status: &MountStatus) {
        let each = |page: &mut Page, name, value: fn(&OperationCounts) -> u64| {
            for image in &status.images {
                for (kind, counts) in image.io.by_name() {
                    page.sample(name, &[("image", &image.name), ("request", kind)], value(counts));
                }
            }
        };
        self.begin("image_request_bytes_total", "counter", "Bytes of requests that succeeded.");
        each(self, "image_request_bytes_total", |counts| counts.bytes);
        self.begin("image_request_errors_total", "counter", "Requests that failed.");
        each(self, "image_request_errors_total", |counts| counts.errors);
        self.begin("image_request_seconds", "histogram", "How long requests took.");
        for image in &status.images {
            for (kind, counts) in image.io.by_name() {
                self.histogram(&image.name, kind, counts);
            }
        }
    }

    fn histogram(&mut self, image: &str, kind: &str, counts: &OperationCounts) {
        let mut sum = 0;
        for (bucket, count) in counts.buckets.iter().enumerate() {
            sum += count;
            let bound = match counters::bound(bucket) {
                Some(bound) => (bound as f64 / SECOND).to_string(),
                None => "+Inf".to_owned(),
            };
            let labels = [("image", image), ("request", kind), ("le", &bound)];
            self.sample("image_request_seconds_bucket", &labels, sum);
        }
        let labels = [("image", image), ("request", kind)];
        let seconds = counts.nanoseconds as f64 / SECOND;
        self.sample("image_request_seconds_sum", &labels, seconds);
        self.sample("image_request_seconds_count", &labels, counts.count);
    }

    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP qcow2fs_{name} {help}\n# TYPE qcow2fs_{name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<_> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.text, "qcow2fs_{name}{labels} {value}");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
