//! What the commands know of the terminal: whether there is one, how large it is, and colours.

use std::io::IsTerminal;

use anstyle::{Ansi256Color, Color, Reset, Style};
use terminal_size::{Height, Width};

/// What is well.
pub(super) const GREEN: u8 = 35;
/// What is not.
pub(super) const RED: u8 = 167;
/// What is measured.
pub(super) const BLUE: u8 = 32;

/// Columns where there is no terminal.
const COLUMNS: usize = 80;
/// Lines where there is no terminal.
const LINES: usize = 24;

/// Whether stdout is a terminal that colours make sense on, and nobody has forbidden them
/// (<https://no-color.org>).
pub(super) fn has_colours() -> bool {
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|kind| kind == "dumb");
    is_terminal() && !forbidden && !dumb
}

/// Whether stdout is a terminal.
pub(super) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Columns and lines of the terminal.
pub(super) fn size() -> (usize, usize) {
    match terminal_size::terminal_size() {
        Some((Width(columns), Height(lines))) => (columns.into(), lines.into()),
        None => (COLUMNS, LINES),
    }
}

/// `text` in one of the 256 colours of terminals, where there are colours.
pub(super) fn coloured(text: &str, colour: u8, colours: bool) -> String {
    match colours {
        true => format!("{}{text}{}", style(Some(colour), None), Reset.render()),
        false => text.to_owned(),
    }
}

/// `text` in bold, where there are colours.
pub(super) fn bold(text: &str, colours: bool) -> String {
    match colours {
        true => format!("{}{text}{}", Style::new().bold().render(), Reset.render()),
        false => text.to_owned(),
    }
}

/// What switches to colours, of the letters and of what is behind them.
pub(super) fn style(letters: Option<u8>, behind: Option<u8>) -> String {
    let colour = |number: Option<u8>| number.map(|n| Color::Ansi256(Ansi256Color(n)));
    Style::new().fg_color(colour(letters)).bg_color(colour(behind)).render().to_string()
}

/// Text that may come from an image or a file's name, with what a terminal would act on made visible.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The first `columns` characters of a line, and all of its escape sequences, which take no place.
fn clip(line: &str, columns: usize) -> String {
    let mut clipped = String::with_capacity(line.len());
    let (mut taken, mut in_sequence) = (0, false);
    for c in line.chars() {
        if in_sequence || c == '\x1b' {
            clipped.push(c);
            // After the bracket a letter ends it.
            in_sequence = !c.is_ascii_alphabetic();
        } else if taken < columns {
            clipped.push(c);
            taken += 1;
        }
    }
    clipped
}

/// The home position of a screen that is drawn over again.
pub(super) const HOME: &str = "\x1b[H";
/// Clears to the end of the line.
pub(super) const CLEAR_LINE: &str = "\x1b[K";
/// Clears to the end of the screen.
pub(super) const CLEAR_BELOW: &str = "\x1b[J";

/// A screen that is drawn over and over; the terminal is what it was when this is dropped.
pub(super) struct Screen;

impl Screen {
    /// Takes a second screen, where the terminal has one, and hides the cursor.
    pub(super) fn take() -> Screen {
        print!("\x1b[?1049h\x1b[?25l{HOME}{CLEAR_BELOW}");
        Screen
    }

    /// Draws `lines` over what was there, as far as they fit.
    pub(super) fn draw(&self, lines: &[String]) {
        use std::io::Write;
        let (width, height) = size();
        let shown = lines.iter().take(height.saturating_sub(1));
        let shown = shown.map(|line| format!("{}{CLEAR_LINE}\r\n", clip(line, width)));
        let page: String = shown.collect();
        let mut out = std::io::stdout().lock();
        // A terminal that is gone ends us by a signal.
        let _ = write!(out, "{HOME}{page}{CLEAR_BELOW}").and_then(|()| out.flush());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        use std::io::Write;
        print!("\x1b[?25h\x1b[?1049l");
        let _ = std::io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_clipped_to_the_screen_and_its_colours_end_all_the_same() {
        let line = format!("ab{}", coloured("cdef", RED, true));
        assert_eq!(clip(&line, 3), "ab\x1b[38;5;167mc\x1b[0m");
        assert_eq!(clip(&line, 80), line);
        assert_eq!(clip("░█░█", 2), "░█");
        assert_eq!(coloured("a", RED, false), "a");
        assert_eq!(plain("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
