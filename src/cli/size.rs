//! Sizes as people write and read them.

use std::time::Duration;

use crate::image::CompactAfter;

/// Bytes of a size like `4096`, `64K`, `1.5G`, `1TiB`: powers of 1024, whatever the unit's ending.
/// Parts of a unit are whole bytes, rounded down.
///
/// # Errors
/// A line that says what a size looks like.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let no_size = || format!("'{text}' is no size: a size is a number with K, M, G, T or P");
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let (number, unit) = text.split_at(text.find(|c| !is_number(c)).unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(no_size()),
    };
    let (whole, part) = match number.split_once('.') {
        // There is no part of a byte.
        Some((whole, part)) if shift > 0 => (whole, Some(part)),
        Some(_) => return Err(no_size()),
        None => (number, None),
    };
    let whole: u64 = whole.parse().map_err(|_| no_size())?;
    let part = part.map_or(Some(0), |digits| part_of(digits, shift)).ok_or_else(no_size)?;
    let bytes = whole.checked_mul(1 << shift).and_then(|bytes| bytes.checked_add(part));
    bytes.ok_or_else(|| format!("'{text}' is too much"))
}

/// The bytes in what `digits` after the point are of a unit of `1 << shift`; `None` where they are no
/// number, or more digits than make a difference.
fn part_of(digits: &str, shift: u32) -> Option<u64> {
    let scale = 10u128.checked_pow(digits.len().try_into().ok()?)?;
    let part = u128::from(digits.parse::<u64>().ok()?);
    u64::try_from((part << shift) / scale).ok()
}

/// From when on compaction is worth while: a size, a whole number of per cent like `5%`, or `off`.
///
/// # Errors
/// A line that says what it looks like.
pub(super) fn parse_compact_after(text: &str) -> Result<CompactAfter, String> {
    if text == "off" {
        return Ok(CompactAfter::Off);
    }
    if let Some(percent) = text.strip_suffix('%') {
        return match percent.parse() {
            Ok(percent @ 0..=100) => Ok(CompactAfter::Percent(percent)),
            _ => Err(format!("'{text}' is no whole number of per cent from 0% to 100%")),
        };
    }
    match parse(text) {
        Ok(bytes) => Ok(CompactAfter::Bytes(bytes)),
        Err(_) => Err(format!("'{text}' is no size like 64M, no percentage like 1%, and not off")),
    }
}

/// Bytes a second, at least one.
///
/// # Errors
/// As [`parse`]; 0, which would be never.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    some(parse(text)?, || format!("'{text}' a second is never"))
}

/// A size as [`parse`] has it, but not 0.
///
/// # Errors
/// As [`parse`]; 0.
pub(super) fn parse_some(text: &str) -> Result<u64, String> {
    some(parse(text)?, || format!("'{text}' is nothing; 1 at least"))
}

/// The size, unless it is 0.
fn some(size: u64, complaint: impl FnOnce() -> String) -> Result<u64, String> {
    if size > 0 { Ok(size) } else { Err(complaint()) }
}

/// A size that may depend on the one there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many more.
    More(u64),
    /// So many less.
    Less(u64),
}

impl NewSize {
    /// What becomes of `before` bytes, unless there is no such size.
    pub(super) fn from(self, before: u64) -> Option<u64> {
        match self {
            NewSize::Exactly(size) => Some(size),
            NewSize::More(more) => before.checked_add(more),
            NewSize::Less(less) => before.checked_sub(less),
        }
    }
}

/// A size, or with a sign before it how much more or less.
///
/// # Errors
/// As [`parse`].
pub(super) fn parse_new_size(text: &str) -> Result<NewSize, String> {
    match text.as_bytes().first() {
        Some(b'+') => parse(&text[1..]).map(NewSize::More),
        Some(b'-') => parse(&text[1..]).map(NewSize::Less),
        _ => parse(text).map(NewSize::Exactly),
    }
}

/// As [`show`], with the bytes where that says less than all.
pub(super) fn show_exactly(bytes: u64) -> String {
    let power = (bytes.max(1).ilog2() / 10) * 10;
    let tenths = (u128::from(bytes) * 10) >> power << power == u128::from(bytes) * 10;
    match power == 0 || tenths {
        true => show(bytes),
        false => format!("{} ({bytes} B)", show(bytes)),
    }
}

/// Seconds, with a fraction or without, at least a twentieth.
///
/// # Errors
/// A line that says what it looks like.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.05..=86400.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("'{text}' is no number of seconds from 0.05 to 86400"))
}

/// A size in the largest unit of which there is at least one, with one digit after the point.
pub(super) fn show(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = (bytes.max(1).ilog2() / 10) as usize;
    match power.checked_sub(1).and_then(|unit| units.get(unit)) {
        None => format!("{bytes} B"),
        Some(unit) => format!("{:.1} {unit}", bytes as f64 / (1u64 << (10 * power)) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64K"), Ok(64 << 10));
        assert_eq!(parse("16MiB"), Ok(16 << 20));
        assert_eq!(parse("1g"), Ok(1 << 30));
        assert_eq!(parse("2TB"), Ok(2 << 40));
        assert_eq!(parse("1P"), Ok(1 << 50));
        for wrong in ["", "M", "-1", "16 M", "16X", "99999999999T", "0x10", "16383.99P9"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_may_have_parts_of_a_unit() {
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("0.1K"), Ok(102));
        assert_eq!(parse("2.00MiB"), Ok(2 << 20));
        assert_eq!(parse("16383.999P"), Ok((16383 << 50) + 1_124_774_006_935_781));
        for wrong in ["1.5", "1.5B", "1.G", ".5G", ".", "1.2.3G", "1.5.G", "16384.0P", "1.+5G"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse("1.00000000000000000000000000000000000000000001G").is_err());
    }

    #[test]
    fn compaction_begins_after_a_size_a_percentage_or_never() {
        assert_eq!(parse_compact_after("off"), Ok(CompactAfter::Off));
        assert_eq!(parse_compact_after("64M"), Ok(CompactAfter::Bytes(64 << 20)));
        assert_eq!(parse_compact_after("0"), Ok(CompactAfter::Bytes(0)));
        assert_eq!(parse_compact_after("5%"), Ok(CompactAfter::Percent(5)));
        for wrong in ["", "%", "101%", "1.5%", "-1%", "on", "Off", "much"] {
            let line = parse_compact_after(wrong).unwrap_err();
            assert!(line.contains(&format!("'{wrong}'")), "{line}");
        }
        assert_eq!(parse_rate("20M"), Ok(20 << 20));
        assert!(parse_rate("0").is_err() && parse_rate("fast").is_err());
        assert_eq!(parse_some("64K"), Ok(64 << 10));
        assert_eq!(parse_some("0"), Err("'0' is nothing; 1 at least".into()));
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        let shown = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB")];
        for (bytes, text) in shown {
            assert_eq!(show(bytes), text);
        }
        assert_eq!(show_exactly(3 << 29), "1.5 GiB");
        assert_eq!(show_exactly(1000), "1000 B");
        assert_eq!(show_exactly((10 << 30) + 512), "10.0 GiB (10737418752 B)");
    }

    #[test]
    fn a_new_size_may_be_more_or_less_than_the_old_one() {
        for (text, after) in [("3K", 3072), ("+1K", 2048), ("-512", 512)] {
            assert_eq!(parse_new_size(text).unwrap().from(1024), Some(after), "{text}");
        }
        assert_eq!(parse_new_size("-2K").unwrap().from(1024), None);
        assert_eq!(parse_new_size("+1K").unwrap().from(u64::MAX), None);
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        assert!(["0", "-1", "nan", "inf", "", "1e9"].iter().all(|s| parse_seconds(s).is_err()));
        for wrong in ["", "+", "-", "+-1", "--1", "G"] {
            assert!(parse_new_size(wrong).is_err(), "{wrong}");
        }
    }
}
