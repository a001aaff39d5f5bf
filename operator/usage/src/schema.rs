//! Tables, the same in both databases.

use crate::level::Level;
use crate::sql::{Error, FIGURES, Sql, int, transaction};

/// Raised with every change of a table: the number of [`steps`].
const VERSION: i64 = 4;

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

/// Makes the tables that are missing, also those that came after a store was made.
///
/// # Errors
/// [`Error::Schema`] if a newer collector made them.
pub(crate) fn create(sql: &mut dyn Sql, words: &Words) -> Result<(), Error> {
    sql.script(&format!(
        "CREATE TABLE IF NOT EXISTS meta (name {} PRIMARY KEY, value BIGINT NOT NULL)",
        words.text
    ))?;
    let found = sql.rows("SELECT value FROM meta WHERE name = 'schema'", &[])?;
    let found = found.first().map(|row| int(row, 0)).transpose()?.unwrap_or(0);
    let missing =
        usize::try_from(found).ok().and_then(|found| steps(words).get(found..).map(<[String]>::to_vec));
    let missing = missing.ok_or(Error::Schema { found, known: VERSION })?;
    if missing.is_empty() {
        return Ok(());
    }
    transaction(sql, |sql| {
        sql.script(&missing.concat())?;
        sql.run(
            "INSERT INTO meta (name, value) VALUES ('schema', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            &[VERSION.into()],
        )
        .map(|_| ())
    })
}

/// What made each version of the one before.
fn steps(words: &Words) -> [String; VERSION as usize] {
    [tables(words), alerts(words), totals(words), owners(words)]
}

fn owners(words: &Words) -> String {
    let Words { text, keyed, .. } = words;
    format!(
        "-- Whose a prefix is, and since when.
        CREATE TABLE owners (
            prefix {text} NOT NULL, account {text} NOT NULL, since BIGINT NOT NULL, PRIMARY KEY (prefix)) {keyed};\n"
    )
}

fn totals(words: &Words) -> String {
    let mut script = String::new();
    for it in Level::ALL {
        let (totals, resolution) = (it.totals(), it.resolution());
        // Made from here on: what is older has none.
        script += &format!(
            "{}INSERT INTO meta (name, value) SELECT '{totals}', COALESCE(MAX(slot) + {resolution}, 0)
             FROM coverage WHERE level = {resolution};\n",
            table(totals, words)
        );
    }
    script
}

/// A table of figures.
fn table(name: &str, words: &Words) -> String {
    let figures: Vec<String> = FIGURES.iter().map(|(name, _)| format!("{name} BIGINT NOT NULL")).collect();
    format!(
        "CREATE TABLE {name} (series BIGINT NOT NULL, slot BIGINT NOT NULL, {}, PRIMARY KEY (series, slot)) {};\n",
        figures.join(", "),
        words.level
    )
}

fn alerts(words: &Words) -> String {
    let Words { text, keyed, .. } = words;
    format!(
        "-- What is known of an account's alerts between two looks, and the first item of which no event was written.
        CREATE TABLE alert_states (
            account {text} NOT NULL, state {text} NOT NULL, told BIGINT NOT NULL, PRIMARY KEY (account)) {keyed};
        -- Items of feeds.
        CREATE TABLE alert_items (
            account {text} NOT NULL, number BIGINT NOT NULL, id {text} NOT NULL, item {text} NOT NULL,
            PRIMARY KEY (account, number), UNIQUE (account, id)) {keyed};
        -- The secrets in the addresses of feeds.
        CREATE TABLE feed_tokens (
            account {text} NOT NULL, token {text} NOT NULL, made BIGINT NOT NULL, PRIMARY KEY (account)) {keyed};\n"
    )
}

fn tables(words: &Words) -> String {
    let Words { identity, text, bytes, keyed, .. } = words;
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
        script += &table(it.table(), words);
    }
    script
}
