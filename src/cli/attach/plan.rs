//! Attaching as commands: their arguments, and all of them in a form to read or to paste.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::attachment::DIRECTORY;
use super::{Args, Target};

/// The arguments of `qcow2fs mount` for a mount of the image alone.
///
/// # Errors
/// A line for a person.
pub(super) fn image_arguments(args: &Args) -> Result<Vec<String>, String> {
    let mut arguments = Vec::new();
    if args.read_only {
        arguments.push("--read-only".to_owned());
    }
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| format!("{} is no text", path.display()))
    };
    for directory in &args.allow {
        arguments.extend(["--allow".to_owned(), text(directory)?]);
    }
    if let Some(directory) = &args.keys.keys {
        arguments.extend(["--keys".to_owned(), text(directory)?]);
    }
    for (name, file) in &args.keys.key_file {
        arguments.extend(["--key-file".to_owned(), format!("{}={}", text(name)?, text(file)?)]);
    }
    Ok(arguments)
}

/// The arguments of mount(8) for what is on the device.
pub(super) fn device_arguments(args: &Args) -> Vec<String> {
    let mut arguments = Vec::new();
    if let Some(kind) = &args.kind {
        arguments.extend(["-t".to_owned(), kind.clone()]);
    }
    let read_only = args.read_only.then_some("ro");
    let options: Vec<&str> = args.options.as_deref().into_iter().chain(read_only).collect();
    if !options.is_empty() {
        arguments.extend(["-o".to_owned(), options.join(",")]);
    }
    arguments
}

/// What root would run: `losetup` prints the device that the next command needs.
pub(super) fn commands(args: &Args, target: &Target) -> Vec<String> {
    let mut commands = Vec::new();
    let raw = match target {
        Target::Raw { raw, .. } => raw.clone(),
        Target::Image(image) => {
            let place = Path::new(DIRECTORY).join("1/raw");
            commands.push(format!("mkdir -p {}", quoted(&place)));
            let mut words = vec!["qcow2fs".to_owned(), "mount".to_owned()];
            words.extend(image_arguments(args).unwrap_or_default());
            let words = words.iter().map(|word| quoted(Path::new(word)).into_owned());
            let words: Vec<String> = words.collect();
            commands.push(format!("{} {} {}", words.join(" "), quoted(image), quoted(&place)));
            let raw = Path::new(image.file_name().unwrap_or_default()).with_extension("raw");
            place.join(raw)
        }
    };
    let read_only = if args.read_only { " --read-only" } else { "" };
    commands.push(format!(
        "device=$(losetup --find --show --direct-io=on --partscan{read_only} {})",
        quoted(&raw)
    ));
    let partition = args.partition.map(|number| format!("p{number}")).unwrap_or_default();
    if let Some(mountpoint) = &args.mountpoint {
        let mountpoint = std::path::absolute(mountpoint);
        let mountpoint = mountpoint.unwrap_or_else(|_| PathBuf::from("/mnt"));
        let mut words = vec!["mount".to_owned()];
        words.extend(device_arguments(args));
        let words: Vec<_> = words.iter().map(|word| quoted(Path::new(word)).into_owned()).collect();
        commands.push(format!(
            "{} \"${{device}}{partition}\" {}",
            words.join(" "),
            quoted(&mountpoint)
        ));
    }
    commands
}

/// Prints them, one a line.
pub(super) fn print(commands: &[String]) {
    commands.iter().for_each(|command| println!("{command}"));
}

/// As a shell takes it for one word.
fn quoted(path: &Path) -> Cow<'_, str> {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,=%@".contains(c);
    match text.chars().all(is_plain) && !text.is_empty() {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &[&str]) -> Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let line = std::iter::once("attach").chain(line.iter().copied());
        <Line as clap::Parser>::try_parse_from(line).unwrap().args
    }

    #[test]
    fn an_image_is_mounted_alone_first() {
        let line = [
            "a b.qcow2",
            "/m",
            "-p",
            "2",
            "-r",
            "-o",
            "noatime",
            "-t",
            "xfs",
            "--allow",
            "/base",
            "--keys",
            "/keys",
            "--key-file",
            "a=/k",
        ];
        let commands = commands(&args(&line), &Target::Image("/i/a b.qcow2".into()));
        let wanted = [
            "mkdir -p /run/qcow2fs/attached/1/raw",
            "qcow2fs mount --read-only --allow /base --keys /keys --key-file a=/k '/i/a b.qcow2' \
             /run/qcow2fs/attached/1/raw",
            "device=$(losetup --find --show --direct-io=on --partscan --read-only \
             '/run/qcow2fs/attached/1/raw/a b.raw')",
            "mount -t xfs -o noatime,ro \"${device}p2\" /m",
        ];
        assert_eq!(commands, wanted);
    }

    #[test]
    fn a_file_of_a_mount_needs_only_the_device() {
        let target = Target::Raw { raw: "/mnt/it's.raw".into(), image: "/i/it's.qcow2".into() };
        let commands = commands(&args(&["x"]), &target);
        let wanted =
            ["device=$(losetup --find --show --direct-io=on --partscan '/mnt/it'\\''s.raw')"];
        assert_eq!(commands, wanted);
    }
}
