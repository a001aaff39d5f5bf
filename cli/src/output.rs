//! How answers are written.

use serde::Serialize;
use std::fmt::Write;

/// Form of an answer.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For programs.
    Yaml,
}

/// What a command says.
pub trait Answer: Serialize {
    /// For people.
    fn table(&self) -> String;
}

/// The text of an answer, with a line feed at its end.
pub fn write(answer: &impl Answer, format: Format) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table => answer.table(),
        Format::Json => serde_json::to_string_pretty(answer)? + "\n",
        Format::Yaml => serde_yaml_ng::to_string(answer)?,
    })
}

/// Columns, as kubectl writes them.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these heads.
    pub fn new<const N: usize>(heads: [&str; N]) -> Table {
        Table::of(heads.map(str::to_owned).to_vec())
    }

    /// With heads that are not known beforehand.
    pub fn of(heads: Vec<String>) -> Table {
        Table { rows: vec![heads] }
    }

    /// Adds a row with as many cells as there are heads.
    pub fn line(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// The text; empty if there is no row.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if self.rows.len() < 2 {
            return text;
        }
        let columns = self.rows[0].len();
        let length = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |it| it.chars().count());
        let width = |column: usize| self.rows.iter().map(|row| length(row, column)).max().unwrap_or_default();
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a String does not fail.
                let _ = write!(line, "{:width$}   ", if cell.is_empty() { "-" } else { cell });
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Sections with an empty line between them; empty ones are left out.
pub fn sections<const N: usize>(sections: [String; N]) -> String {
    let sections: Vec<&str> = sections.iter().map(|it| it.trim_end()).filter(|it| !it.is_empty()).collect();
    sections.join("\n\n") + "\n"
}

/// Notes as lines.
pub fn notes(notes: &[String]) -> String {
    notes.iter().map(|note| format!("note: {note}\n")).collect()
}

/// `1 node`, `2 nodes`.
pub fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
