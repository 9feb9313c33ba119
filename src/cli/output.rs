//! Level 7. What the commands print, and where.
//!
//! Without `--json` the report goes to stdout. With it, stdout gets one JSON object, and the report goes to stderr, where
//! notes and progress always go.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::ProgressBar;

use super::Stop;

/// Where a command prints.
#[derive(Debug)]
pub(super) struct Output {
    json: bool,
    /// The progress bar on the screen, which has to make room for lines.
    bar: Mutex<Option<ProgressBar>>,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Output { json, bar: Mutex::default() }
    }

    /// A line of the report.
    pub(super) fn line(&self, text: impl Display) -> Result<(), Stop> {
        if self.json {
            self.note(text);
            return Ok(());
        }
        self.beside_bar(|| write_line(text))
    }

    /// Something the user should know that is not part of the report, to stderr.
    pub(super) fn note(&self, text: impl Display) {
        // Whoever closed stderr does not want to know.
        let _ = self.beside_bar(|| writeln!(io::stderr(), "{text}"));
    }

    /// The result as one JSON object on one line, if that was asked for.
    pub(super) fn json(&self, object: &serde_json::Value) -> Result<(), Stop> {
        if self.json { write_line(object) } else { Ok(()) }
    }

    /// Whether someone watches stderr, so that a progress bar makes sense.
    pub(super) fn is_watched(&self) -> bool {
        io::stderr().is_terminal()
    }

    /// Shows `bar`, which [`Output::finish_bar`] takes away.
    pub(super) fn show_bar(&self, bar: ProgressBar) {
        *self.lock() = Some(bar);
    }

    /// Takes the progress bar away, if there is one.
    pub(super) fn finish_bar(&self) {
        if let Some(bar) = self.lock().take() {
            bar.finish_and_clear();
        }
    }

    fn beside_bar<R>(&self, write: impl FnOnce() -> R) -> R {
        match &*self.lock() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().expect("nothing panics while it holds the progress bar")
    }
}

/// The report, for what writes lines; each has to come as a whole.
impl Write for &Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.beside_bar(|| if self.json { io::stderr().write(bytes) } else { io::stdout().write(bytes) })
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.json { io::stderr().flush() } else { io::stdout().flush() }
    }
}

/// To stdout, and flushed, because what comes next may take minutes.
fn write_line(text: impl Display) -> Result<(), Stop> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(Stop::Output)
}

/// How the cells of a table's column are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table of text, its columns as wide as their widest cell.
#[derive(Debug)]
pub(super) struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<'a>(head: impl IntoIterator<Item = (&'a str, Align)>) -> Self {
        let (names, align) = head.into_iter().map(|(name, align)| (name.to_owned(), align)).unzip();
        Table { align, rows: vec![names] }
    }

    /// Adds a row of as many cells as the head has.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.align.len(), "a row has a cell for every column");
        self.rows.push(cells);
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.align.len()).map(width).collect();
        for (i, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = (row.iter().zip(&widths).zip(&self.align))
                .map(|((cell, &width), align)| match align {
                    Align::Left => format!("{cell:<width$}"),
                    Align::Right => format!("{cell:>width$}"),
                })
                .collect();
            let end = if i + 1 < self.rows.len() { "\n" } else { "" };
            write!(f, "{}{end}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A small number with two digits.
pub(super) fn scientific(number: f64) -> String {
    if number == 0.0 { "0".to_owned() } else { format!("{number:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let mut table = Table::new([("name", Align::Left), ("n", Align::Right), ("note", Align::Left)]);
        table.row(["a".into(), "12".into(), String::new()]);
        assert_eq!(table.to_string(), "name   n  note\na     12");
    }

    #[test]
    fn digits_are_grouped_by_three() {
        for (number, want) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(thousands(number), want);
        }
    }
}
