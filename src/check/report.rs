//! What a check found: counts, a bounded list of findings, and the verdict.

use serde::Serialize;

/// Findings that are kept as text; the rest is only counted.
const MAX_FINDINGS: usize = 1000;

/// The result of checking an image. The fields and their names are those of `qemu-img check`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The byte after the last host cluster that is in use.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a host cluster.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
    /// Things that are wrong and may lose data.
    pub corruptions: u64,
    /// Host clusters whose refcount is too high: space lost, nothing else.
    pub leaks: u64,
    /// Corruptions that a repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that a repair removed.
    pub leaks_fixed: u64,
    /// Those of the corruptions that are no more than a COPIED flag that is not set where the refcount
    /// is 1. Nothing can come of it but a copy that was not needed: a crash while a snapshot is taken
    /// or deleted may leave it.
    #[serde(skip)]
    pub missing_flags: u64,
    /// What is wrong, a line each, the first ones.
    pub findings: Vec<String>,
    /// Findings past those.
    pub findings_left_out: u64,
}

impl Report {
    /// The exit code that `qemu-img check` gives such an image: 0 sound, 2 corrupt, 3 leaks only.
    pub fn exit_code(&self) -> i32 {
        match (self.corruptions, self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        }
    }

    /// Counts a corruption (`times` over, where one entry is reached by several ways).
    pub(super) fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.note(text);
    }

    /// Counts a leaked cluster.
    pub(super) fn leak(&mut self, text: impl FnOnce() -> String) {
        self.leaks = self.leaks.saturating_add(1);
        self.note(text);
    }

    /// Adds the line that says what comes of all the others, however many they are.
    pub(super) fn conclude(&mut self, text: String) {
        self.findings.push(text);
    }

    /// Adds a line that counts for nothing.
    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(text());
        } else {
            self.findings_left_out += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_findings_is_bounded_and_the_counts_are_not() {
        let mut report = Report::default();
        for i in 0..5000 {
            report.leak(|| format!("leak {i}"));
        }
        assert_eq!((report.leaks, report.findings.len()), (5000, MAX_FINDINGS));
        assert_eq!(report.findings_left_out, 4000);
        assert_eq!(report.exit_code(), 3);
        report.conclude("nothing was changed".into());
        assert_eq!(report.findings.last().unwrap(), "nothing was changed");
        report.corruption(2, || "bad".into());
        assert_eq!((report.corruptions, report.exit_code()), (2, 2));
    }
}
