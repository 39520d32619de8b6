//! `unsafe` is counted: whoever adds some says why where the crate's documentation lists it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The blocks and implementations in one file that the compiler does not vouch for.
fn count(text: &str) -> usize {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.map(|line| {
        ["unsafe {", "unsafe impl ", "unsafe fn "].map(|form| line.matches(form).count())
    })
    .map(|counts| counts.iter().sum::<usize>())
    .sum()
}

/// Those of each file beneath `directory` that has any, but for tests.
fn count_all(root: &Path, directory: &Path, found: &mut BTreeMap<String, usize>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            count_all(root, &path, found);
            continue;
        }
        let n = count(&fs::read_to_string(&path).unwrap());
        if n > 0 && !path.ends_with("tests.rs") {
            found.insert(path.strip_prefix(root).unwrap().display().to_string(), n);
        }
    }
}

/// The table in the documentation of the crate: file, number, reason.
fn listed(documentation: &str) -> BTreeMap<String, usize> {
    let rows = documentation.lines().filter_map(|line| line.strip_prefix("//! | `src/"));
    let row = |row: &str| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let number = cells.get(1)?.parse().ok()?;
        assert!(cells.get(2).is_some_and(|reason| !reason.is_empty()), "no reason: {row}");
        Some((format!("src/{}", cells[0].trim_end_matches('`')), number))
    };
    rows.filter_map(row).collect()
}

#[test]
fn unsafe_code_is_where_the_documentation_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    count_all(root, &root.join("src"), &mut found);
    println!("{} in {} files", found.values().sum::<usize>(), found.len());
    let listed = listed(&fs::read_to_string(root.join("src/lib.rs")).unwrap());
    assert_eq!(found, listed, "the table in src/lib.rs says otherwise");
}
