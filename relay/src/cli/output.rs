//! Facts on stdout: text, tables, JSON.
//!
//! A reader that has gone (`relay stats | head -1`) is not an error; a full disk is. Colours only on a terminal and without NO_COLOR.

use super::failure::{Failure, one_line};
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::{self, ErrorKind, IsTerminal, Write};

/// Where a command's facts go.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    colours: bool,
}

impl Output {
    /// stdout, as JSON if asked.
    pub fn new(json: bool) -> Self {
        Self { json, colours: io::stdout().is_terminal() && colours_wanted() }
    }

    /// Prints `facts` as JSON if that was asked for, else what `text` makes of them.
    pub fn facts<T: Serialize>(&self, facts: &T, text: impl FnOnce(&Self) -> String) -> Result<(), Failure> {
        let mut bytes = if self.json {
            serde_json::to_vec(facts).map_err(|error| Failure::new(1, error.to_string()))?
        } else {
            text(self).into_bytes()
        };
        if bytes.last().is_some_and(|last| *last != b'\n') {
            bytes.push(b'\n');
        }
        self.bytes(&bytes)
    }

    /// Prints bytes as they are.
    pub fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::new(1, format!("stdout: {error}"))),
            _ => Ok(()),
        }
    }

    /// A word that is good, a warning or bad, in its colour.
    pub fn state(&self, word: &str, mood: Mood) -> Cell {
        let colour = match mood {
            Mood::Good => Color::Green,
            Mood::Warning => Color::Yellow,
            Mood::Bad => Color::Red,
        };
        let cell = text(word);
        if self.colours { cell.fg(colour) } else { cell }
    }
}

/// How a state is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// As it should be.
    Good,
    /// Works, but look at it.
    Warning,
    /// Does not work.
    Bad,
}

/// Whether colours may be used on a terminal (NO_COLOR, no-color.org: present and not empty forbids them).
pub fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A table without lines: columns under a header, wrapped at the terminal's width, unwrapped elsewhere.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.iter().map(|name| text(name)));
    table
}

/// The lines of a table, no white space at their ends, closed by a line break.
pub fn lines(table: &mut Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// A text cell; `-` for nothing.
pub fn text(content: &str) -> Cell {
    Cell::new(if content.is_empty() { "-".into() } else { one_line(content) })
}

/// A number, to the right.
pub fn number(value: impl ToString) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

/// `1 rule`, `2 rules`.
pub fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Milliseconds as `850 ms`, `12 s`, `3 min 20 s`, `5 h 7 min` or `12 d 3 h`.
pub fn duration(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if seconds == 0 => format!("{milliseconds} ms"),
        () if minutes == 0 => format!("{seconds} s"),
        () if hours == 0 => format!("{minutes} min {} s", seconds % 60),
        () if days == 0 => format!("{hours} h {} min", minutes % 60),
        () => format!("{days} d {} h", hours % 24),
    }
}

/// Nanoseconds as `850 ns`, `1.9 µs`, `41.0 µs`, `5.2 ms` or `1.07 s`: at most eight characters.
pub fn span(nanoseconds: u64) -> String {
    match nanoseconds as f64 {
        ns if ns < 1e3 => format!("{ns} ns"),
        ns if ns < 999.95e3 => format!("{:.1} µs", ns / 1e3),
        ns if ns < 999.95e6 => format!("{:.1} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        let cases = [
            (0, "0 ms"),
            (999, "999 ms"),
            (59_999, "59 s"),
            (200_000, "3 min 20 s"),
            (18_420_000, "5 h 7 min"),
            (1_047_600_000, "12 d 3 h"),
        ];
        for (milliseconds, says) in cases {
            assert_eq!(duration(milliseconds), says);
        }
    }

    #[test]
    fn spans_are_short() {
        let cases = [(0, "0 ns"), (999, "999 ns"), (1_920, "1.9 µs"), (999_999, "1.0 ms"), (41_943_040, "41.9 ms"), (1 << 30, "1.07 s")];
        for (nanoseconds, says) in cases {
            assert_eq!(span(nanoseconds), says);
        }
    }

    #[test]
    fn a_table_has_no_lines_and_no_trailing_space() {
        let mut table = table(&["NAME", "COUNT"]);
        table.add_row([text(""), number(7)]);
        assert_eq!(lines(&mut table), "NAME  COUNT\n-         7\n");
    }
}
