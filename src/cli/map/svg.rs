//! The picture as SVG: the blocks, a legend, and the summary.

use std::fmt::Write;

use super::View;
use super::extents::Kind;
use super::picture::Picture;
use crate::cli::size;

/// Blocks in a row.
const COLUMNS: usize = 96;
/// Blocks in a picture that fits.
pub(super) const ROOM: usize = COLUMNS * 24;
/// Pixels from one block to the next, and the gap between them.
const STEP: usize = 9;
const GAP: usize = 1;
const MARGIN: usize = 24;
/// Pixels above the blocks, for the title.
const HEAD: usize = 66;
/// Pixels that a line of text takes.
const LINE: usize = 20;
/// Entries of the legend in a line.
const LEGEND_COLUMNS: usize = 5;
/// What changes where people look at light letters on dark pages. Viewers that know nothing of this
/// show the attributes.
const DARK: &str = "<style>@media (prefers-color-scheme: dark) {\
    .page { fill: #0d1117; stroke: #30363d } .text { fill: #e6edf3 } .less { fill: #9aa5b1 } \
    .hole { fill: #222931 } .free { fill: #6e7781 } }</style>";

/// Letters, and those that say less.
const TEXT: &str = "class=\"text\" fill=\"#1c2733\"";
const LESS: &str = "class=\"less\" fill=\"#4a5560\"";

/// Draws the picture of the image `name`.
pub(super) fn draw(name: &str, view: &View, picture: &Picture) -> String {
    let width = 2 * MARGIN + COLUMNS * STEP - GAP;
    let rows = picture.blocks().len().div_ceil(COLUMNS).max(1);
    let legend_top = HEAD + rows * STEP + 16;
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(|k| view.bytes[*k as usize] > 0).collect();
    let text_top = legend_top + kinds.len().div_ceil(LEGEND_COLUMNS) * (LINE + 2) + 14;
    let summary = view.summary();
    let title = format!("What lies where in {}", escape(name));
    let height = text_top + summary.len() * LINE + MARGIN - 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" \
         font-size=\"13\" role=\"img\">\n<title>{title}</title>\n{DARK}\n"
    );
    page(&mut svg, width, height);
    head(&mut svg, name, view, picture);
    blocks(&mut svg, picture);
    legend(&mut svg, &kinds, view, legend_top, width);
    for (number, line) in summary.iter().enumerate() {
        text(&mut svg, (MARGIN, text_top + 12 + number * LINE), LESS, line);
    }
    svg + "</svg>\n"
}

/// What all lies on, with a fine line around it.
fn page(svg: &mut String, width: usize, height: usize) {
    let (width, height) = (width - 1, height - 1);
    let _ = writeln!(
        svg,
        "<rect class=\"page\" x=\"0.5\" y=\"0.5\" width=\"{width}\" height=\"{height}\" rx=\"6\" \
         fill=\"#ffffff\" stroke=\"#d0d7de\"/>"
    );
}

fn head(svg: &mut String, name: &str, view: &View, picture: &Picture) {
    let bold = format!("font-size=\"17\" font-weight=\"600\" {TEXT}");
    text(svg, (MARGIN, 32), &bold, name);
    let line = format!(
        "disk {} · file {} · on the host {} · one block is {}",
        size::show(view.survey.virtual_size),
        size::show(view.survey.file_length),
        size::show(view.on_host()),
        size::show(picture.block())
    );
    text(svg, (MARGIN, 52), LESS, &line);
}

/// Each block is filled from the left with what is in it, as much of each as there is.
fn blocks(svg: &mut String, picture: &Picture) {
    let size = STEP - GAP;
    // Blocks of one kind are one path, which is shorter than as many rectangles.
    let mut paths: [String; Kind::COUNT] = Default::default();
    for (index, block) in picture.blocks().iter().enumerate() {
        let (column, row) = (index % COLUMNS, index / COLUMNS);
        let (x, y) = (MARGIN + column * STEP, HEAD + row * STEP);
        let all: u64 = block.iter().sum();
        let mut left = 0.0;
        for kind in Kind::ALL {
            let bytes = block[kind as usize];
            if bytes == 0 {
                continue;
            }
            let wide = size as f64 * bytes as f64 / all as f64;
            let path = &mut paths[kind as usize];
            // Writing to a string does not fail.
            let _ = write!(
                path,
                "M{} {y}h{}v{size}h-{}z",
                round(x as f64 + left),
                round(wide),
                round(wide)
            );
            left += wide;
        }
    }
    for kind in Kind::ALL {
        let path = &paths[kind as usize];
        if !path.is_empty() {
            let _ = writeln!(svg, "<path {} d=\"{path}\"/>", colour(kind));
        }
    }
}

fn legend(svg: &mut String, kinds: &[Kind], view: &View, top: usize, width: usize) {
    let step = (width - 2 * MARGIN) / LEGEND_COLUMNS;
    for (number, kind) in kinds.iter().enumerate() {
        let x = MARGIN + number % LEGEND_COLUMNS * step;
        let y = top + number / LEGEND_COLUMNS * (LINE + 2);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" rx=\"2\" {}/>",
            colour(*kind)
        );
        let line = format!("{} {}", kind.name(), size::show(view.bytes[*kind as usize]));
        text(svg, (x + 18, y + 11), TEXT, &line);
    }
}

fn text(svg: &mut String, (x, y): (usize, usize), attributes: &str, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {attributes}>{}</text>", escape(text));
}

/// At most two digits after the point, and none that say nothing.
fn round(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            // XML 1.0 has no other control characters, however they are written.
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Its attributes.
fn colour(kind: Kind) -> &'static str {
    match kind {
        Kind::Metadata => "fill=\"#e3a52c\"",
        Kind::Data => "fill=\"#2f7fd1\"",
        Kind::Shared => "fill=\"#8a5fb8\"",
        Kind::Compressed => "fill=\"#1f9e8f\"",
        Kind::Unwritten => "fill=\"#a9cdf0\"",
        Kind::Junk => "fill=\"#d8504a\"",
        Kind::Ready => "fill=\"#d9bfae\"",
        Kind::Free => "class=\"free\" fill=\"#a8b1ba\"",
        Kind::Hole => "class=\"hole\" fill=\"#edf0f3\"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_picture() {
        assert_eq!(escape("a<b>&\"\n\u{1b}ü"), "a&lt;b&gt;&amp;\"\u{fffd}\u{fffd}ü");
        assert_eq!([round(8.0), round(2.666), round(10.5)], ["8", "2.67", "10.5"]);
    }
}
