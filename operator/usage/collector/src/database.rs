//! Where use is kept, and that it is this collector's alone.

use crate::error::Error;
use aegis_usage::{Address, PostgresTls, Store};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest time of a question.
const PATIENCE: Duration = Duration::from_secs(20);

/// The store, and what keeps others away from it.
pub struct Database {
    /// The store.
    pub store: Store,
    /// Locked for as long as it is open. PostgreSQL has a lock of its own.
    pub lock: Option<File>,
}

/// Opens a file of SQLite or a database of PostgreSQL. Blocks.
///
/// # Errors
/// It cannot be opened, or another collector has it.
pub fn open(database: &str, tls: &PostgresTls) -> Result<Database, Error> {
    if ["postgres://", "postgresql://"].iter().any(|scheme| database.starts_with(scheme)) {
        let address = Address::parse(database, tls)?;
        return Ok(Database { store: Store::postgres_at(address, PATIENCE)?, lock: None });
    }
    let lock = lock(Path::new(database))?;
    Ok(Database { store: Store::sqlite(database, PATIENCE)?, lock: Some(lock) })
}

/// Two that write would forget series of each other.
fn lock(database: &Path) -> Result<File, Error> {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let failed = |source| Error::Lock { path: path.clone(), source };
    let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Taken(database.into())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(database: &str) -> Result<Database, Error> {
        super::open(database, &PostgresTls::default())
    }

    #[test]
    fn one_at_a_time_has_a_file() {
        let folder = std::env::temp_dir().join(format!("aegis-collector-lock-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("use.db").display().to_string();
        let first = open(&path).unwrap();
        assert!(matches!(open(&path), Err(Error::Taken(_))));
        drop(first);
        assert!(open(&path).is_ok());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_connection_string_is_no_file_and_its_password_is_not_told() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://aegis:sesame@127.0.0.1:{}/use", port.local_addr().unwrap().port());
        drop(port);
        let Err(error) = open(&url) else { panic!("nobody is there") };
        assert!(matches!(error, Error::Store(aegis_usage::Error::Postgres(_))), "{error}");
        assert!(!format!("{error} {error:?}").contains("sesame"), "{error:?}");
    }
}
