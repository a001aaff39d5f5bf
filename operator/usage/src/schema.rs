//! Tables, the same in both databases.

use crate::level::Level;
use crate::sql::{Error, FIGURES, Sql, int, transaction};

/// Raised with every change of a table.
const VERSION: i64 = 1;

/// What the databases call the same thing.
pub(crate) struct Words {
    /// Type of a column that numbers its rows.
    pub identity: &'static str,
    /// Type of text that is compared byte by byte.
    pub text: &'static str,
    /// Type of bytes.
    pub bytes: &'static str,
    /// After the columns of a level's table.
    pub level: &'static str,
    /// After the columns of a table that is found by its key.
    pub keyed: &'static str,
}

/// Makes the tables that are missing.
///
/// # Errors
/// [`Error::Schema`] if a newer collector made them.
pub(crate) fn create(sql: &mut dyn Sql, words: &Words) -> Result<(), Error> {
    sql.script(&format!(
        "CREATE TABLE IF NOT EXISTS meta (name {} PRIMARY KEY, value BIGINT NOT NULL)",
        words.text
    ))?;
    let found = sql.rows("SELECT value FROM meta WHERE name = 'schema'", &[])?;
    if let Some(row) = found.first() {
        let found = int(row, 0)?;
        return if found == VERSION { Ok(()) } else { Err(Error::Schema { found, known: VERSION }) };
    }
    transaction(sql, |sql| {
        sql.script(&tables(words))?;
        sql.run("INSERT INTO meta (name, value) VALUES ('schema', $1)", &[VERSION.into()]).map(|_| ())
    })
}

fn tables(words: &Words) -> String {
    let Words { identity, text, bytes, level, keyed } = words;
    let figures: Vec<String> = FIGURES.iter().map(|(name, _)| format!("{name} BIGINT NOT NULL")).collect();
    let mut script = format!(
        "-- What is counted apart. `digest` is of all that follows.
        CREATE TABLE series (
            id {identity}, digest {bytes} NOT NULL UNIQUE,
            node {text} NOT NULL, address {bytes} NOT NULL, origin {bytes} NOT NULL, protocol {text} NOT NULL,
            rule {text} NOT NULL, account {text} NOT NULL, allocation {text} NOT NULL, site {text} NOT NULL,
            pod {text} NOT NULL, reason {text} NOT NULL);
        CREATE INDEX series_node ON series (node);
        CREATE INDEX series_account ON series (account, allocation);
        CREATE INDEX series_address ON series (address);
        CREATE INDEX series_origin ON series (origin);
        -- Which reports are in, so that none counts twice.
        CREATE TABLE reports (
            node {text} NOT NULL, boot {text} NOT NULL, sequence BIGINT NOT NULL,
            begins BIGINT NOT NULL, ends BIGINT NOT NULL, received BIGINT NOT NULL,
            PRIMARY KEY (node, boot, sequence)) {keyed};
        CREATE INDEX reports_begins ON reports (begins);
        -- How much of each slot each node reported: what is missing is not the same as what was not used.
        CREATE TABLE coverage (
            level BIGINT NOT NULL, slot BIGINT NOT NULL, node {text} NOT NULL,
            samples BIGINT NOT NULL, seconds BIGINT NOT NULL,
            PRIMARY KEY (level, slot, node)) {keyed};
        -- Slots to be made anew of the finer level.
        CREATE TABLE dirty (
            level BIGINT NOT NULL, slot BIGINT NOT NULL, node {text} NOT NULL,
            PRIMARY KEY (level, slot, node)) {keyed};\n"
    );
    for it in Level::ALL {
        script += &format!(
            "CREATE TABLE {} (series BIGINT NOT NULL, slot BIGINT NOT NULL, {}, PRIMARY KEY (series, slot)) {level};\n",
            it.table(),
            figures.join(", ")
        );
    }
    script
}
