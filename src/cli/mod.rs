//! The command line: arguments in, exit code out. One file a command.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Parser, Subcommand};

mod attach;
mod busy;
pub mod check;
mod compact;
mod create;
mod daemon;
mod detach;
mod helper;
mod info;
mod keys;
mod live;
mod logging;
mod manager;
mod map;
mod mount;
mod mounted;
mod mountpoint;
mod options;
mod progress;
mod resize;
mod shown;
mod signals;
mod size;
mod snapshot;
mod status;
mod terminal;
mod umount;
mod unmounting;
mod watch;

/// Mounts a directory of qcow2 images as a directory of flat raw files.
///
/// Sizes are written as 4096, 64K, 1.5G or 1TiB: powers of 1024. Colours are used on a terminal
/// only, and not where NO_COLOR is set. Exit code, unless a command's help says more: 0 done, 1 failed,
/// 2 arguments that make no sense (`check`: 1).
#[derive(Parser)]
#[command(name = "qcow2fs", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mount(mount::Args),
    #[command(visible_alias = "unmount")]
    Umount(umount::Args),
    Status(status::Args),
    Watch(watch::Args),
    Check(check::Args),
    Create(create::Args),
    Info(info::Args),
    Map(map::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
    Compact(compact::Args),
    Attach(attach::Args),
    Detach(detach::Args),
}

/// The definition of the command line, from which its documents are made.
pub fn command() -> clap::Command {
    use clap::CommandFactory;
    Cli::command()
}

/// Runs the command that the arguments name; returns the exit code: 0 done, 1 failed, 2 for
/// arguments that make no sense.
pub fn run() -> i32 {
    let arguments = match as_command(std::env::args_os().collect()) {
        Some(arguments) => arguments,
        // `mount -f` only wants to know whether the helper is there.
        None => return 0,
    };
    let command = arguments.get(1).cloned().unwrap_or_default();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(e) => {
            match complaint(&e) {
                Some(line) => eprintln!("qcow2fs: {line}"),
                // Help goes to stdout, or to stderr; nothing is to be done when that fails.
                None => drop(e.print()),
            }
            return code_of(&e, &command);
        }
    };
    if !matches!(cli.command, Command::Mount(_)) {
        // Who prints into a pipe that nobody reads any more ends, as other tools do.
        // SAFETY: the default action takes no handler that could be unsound.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    match cli.command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Compact(args) => compact::run(&args),
        Command::Attach(args) => attach::run(&args),
        Command::Detach(args) => detach::run(&args),
    }
}

/// The exit code for arguments of `command` that make no sense. That of a check that was not done must not
/// be one of its verdicts.
fn code_of(error: &clap::Error, command: &OsStr) -> i32 {
    match error.exit_code() {
        2 if command == "check" => 1,
        code => code,
    }
}

/// What is wrong with the arguments, in one line; `None` where help was asked for, or is the answer.
fn complaint(error: &clap::Error) -> Option<String> {
    use clap::error::ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion,
    };
    let help = [DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion];
    if help.contains(&error.kind()) {
        return None;
    }
    let text = error.to_string();
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:"));
    let lines = lines
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let mut whole = String::new();
    for line in lines {
        whole += match whole.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) => "; ",
        };
        whole += line.strip_prefix("error: ").unwrap_or(line);
    }
    Some(whole + "; --help tells more")
}

/// The arguments as a command's: what mount(8) calls without one is `mount`. `None` for a call that
/// is only pretended.
fn as_command(mut arguments: Vec<OsString>) -> Option<Vec<OsString>> {
    let program = arguments.first().map(Path::new).and_then(Path::file_name);
    let is_helper = program.is_some_and(|name| name.as_encoded_bytes().starts_with(b"mount."));
    if is_helper {
        return helper_arguments(arguments);
    }
    // `qcow2fs SOURCE MOUNTPOINT ...`, as mount.fuse3 calls it.
    let is_command = |name: &OsStr| {
        name.to_str().is_some_and(|name| {
            use clap::CommandFactory;
            name == "help" || Cli::command().find_subcommand(name).is_some()
        })
    };
    if let Some(first) = arguments.get(1)
        && arguments.len() > 2
        && !first.as_encoded_bytes().starts_with(b"-")
        && !is_command(first)
    {
        arguments.insert(1, "mount".into());
    }
    Some(arguments)
}

/// What mount(8) passes to a helper, `SOURCE DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`, as
/// arguments of `mount`.
fn helper_arguments(arguments: Vec<OsString>) -> Option<Vec<OsString>> {
    let mut kept: Vec<OsString> = vec!["qcow2fs".into(), "mount".into()];
    let mut rest = arguments.into_iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_encoded_bytes() {
            b"-N" | b"-t" => drop(rest.next()),
            b"-o" => kept.extend([Some(argument), rest.next()].into_iter().flatten()),
            [b'-', flags @ ..] if flags.iter().all(|flag| b"sfnv".contains(flag)) => {
                if flags.contains(&b'f') {
                    return None;
                }
                if flags.contains(&b'v') {
                    kept.push("-v".into());
                }
            }
            _ => kept.push(argument),
        }
    }
    Some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Option<String> {
        let arguments = line.split(' ').map(OsString::from).collect();
        Some(as_command(arguments)?.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn the_ways_in_which_mount_calls_us_are_the_mount_command() {
        let mounts = [
            ("qcow2fs /a /b -o ro", "qcow2fs mount /a /b -o ro"),
            ("qcow2fs mount /a /b", "qcow2fs mount /a /b"),
            ("/sbin/mount.qcow2fs /a /b -n -o rw,nofail", "qcow2fs mount /a /b -o rw,nofail"),
            ("mount.fuse.qcow2fs /a /b -sv -t x -N 7", "qcow2fs mount /a /b -v"),
        ];
        for (line, meant) in mounts {
            assert_eq!(arguments(line).unwrap(), meant);
        }
        assert_eq!(arguments("mount.qcow2fs /a /b -f"), None);
        for other in ["qcow2fs status /a", "qcow2fs --help", "qcow2fs mnt", "qcow2fs help mount"] {
            assert_eq!(arguments(other).unwrap(), other);
        }
    }

    #[test]
    fn what_is_wrong_with_arguments_is_said_in_a_line() {
        let said = |line: &str| {
            let parsed = Cli::try_parse_from(line.split(' ')).map(drop);
            complaint(&parsed.unwrap_err())
        };
        let missing = "the following required arguments were not provided: <IMAGE>...; --help tells \
                       more";
        assert_eq!(said("qcow2fs info").unwrap(), missing);
        let unknown = said("qcow2fs inof x").unwrap();
        assert!(unknown.starts_with("unrecognized subcommand 'inof'; tip: "), "{unknown}");
        assert!(!unknown.contains('\n'), "{unknown}");
        assert_eq!(said("qcow2fs --help"), None);
        assert_eq!(said("qcow2fs snapshot"), None);
    }

    #[test]
    fn the_definition_of_the_arguments_makes_sense() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    /// The lines of a command's help that begin with `qcow2fs`, its own and those of commands below.
    fn examples(command: &clap::Command) -> Vec<String> {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let lines = help.lines().map(str::trim).filter(|line| line.starts_with("qcow2fs "));
        lines.map(str::to_owned).collect()
    }

    #[test]
    fn each_command_has_examples_that_mean_something_and_says_its_exit_codes() {
        use clap::CommandFactory;
        for command in Cli::command().get_subcommands() {
            let (name, examples) = (command.get_name(), examples(command));
            let is_one = |line: &String| line.split(' ').nth(1) == Some(name);
            assert!(examples.iter().any(is_one), "{name} has no examples");
            for line in examples {
                // What follows a comment sign is for people.
                let words = line.split(" #").next().unwrap_or_default().split_whitespace();
                if let Err(e) = Cli::try_parse_from(words) {
                    panic!("{line}: {e}");
                }
            }
            let about = command.get_long_about().map(ToString::to_string).unwrap_or_default();
            assert!(about.contains("Exit code"), "{name} does not say its exit codes: {about}");
        }
    }
}
