//! Writes the manual pages and the completions that are made from the definition of the command line:
//! `cargo run --example documents -- DIRECTORY` makes `DIRECTORY/man1/` and `DIRECTORY/completions/`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

/// What the packages call each shell's file.
const SHELLS: [(Shell, &str); 3] =
    [(Shell::Bash, "qcow2fs.bash"), (Shell::Zsh, "_qcow2fs"), (Shell::Fish, "qcow2fs.fish")];

fn main() -> io::Result<()> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from);
    let directory = directory.ok_or_else(|| io::Error::other("usage: documents DIRECTORY"))?;
    write(&directory)
}

/// Writes everything beneath `directory`.
pub fn write(directory: &Path) -> io::Result<()> {
    let pages = directory.join("man1");
    fs::create_dir_all(&pages)?;
    let all = commands();
    for command in &all {
        fs::write(pages.join(format!("{}.1", title(command))), page(command, &all)?)?;
    }
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    for (shell, name) in SHELLS {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut qcow2fs::cli::command(), "qcow2fs", &mut script);
        fs::write(completions.join(name), script)?;
    }
    Ok(())
}

/// The program itself and each command that is shown, the commands of commands too.
pub fn commands() -> Vec<Command> {
    let mut program = qcow2fs::cli::command().disable_help_subcommand(true);
    program.build();
    let mut all = Vec::new();
    collect(program, &mut all);
    all
}

fn collect(command: Command, all: &mut Vec<Command>) {
    let beneath: Vec<Command> = command.get_subcommands().cloned().collect();
    all.push(command);
    beneath.into_iter().filter(|command| !command.is_hide_set()).for_each(|command| {
        collect(command, all);
    });
}

/// The page's name: `qcow2fs-snapshot-list`.
pub fn title(command: &Command) -> String {
    command.get_bin_name().unwrap_or(command.get_name()).replace(' ', "-")
}

fn page(command: &Command, all: &[Command]) -> io::Result<Vec<u8>> {
    let name = title(command);
    // Examples are shown as they stand, not filled to paragraphs.
    let examples = command.get_after_help().map(ToString::to_string);
    let man = Man::new(command.clone().display_name(&name).after_help(None::<&str>))
        .section("1")
        .source(format!("qcow2fs {}", env!("CARGO_PKG_VERSION")))
        .manual("qcow2fs");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    let usage = command.clone().render_usage().to_string();
    literally("SYNOPSIS", usage.trim_start_matches("Usage: ")).to_writer(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.get_subcommands().any(|command| !command.is_hide_set()) {
        man.render_subcommands_section(&mut text)?;
    }
    if let Some(examples) = examples {
        literally("EXAMPLES", examples.trim_start_matches("Examples:\n")).to_writer(&mut text)?;
    }
    see_also(&name, all).to_writer(&mut text)?;
    Ok(text)
}

fn literally(heading: &str, lines: &str) -> Roff {
    let mut section = Roff::new();
    section.control("SH", [heading]).control("nf", []);
    for line in lines.lines() {
        section.text([roman(line)]);
    }
    section.control("fi", []);
    section
}

fn see_also(name: &str, all: &[Command]) -> Roff {
    let mut pages = vec!["qcow2fs(1)".to_owned(), "qcow2fs(5)".to_owned()];
    if name == "qcow2fs" {
        pages.remove(0);
        pages.extend(all.iter().skip(1).map(|command| format!("{}(1)", title(command))));
    }
    let mut section = Roff::new();
    section.control("SH", ["SEE ALSO"]).text([roman(pages.join(", "))]);
    section
}
