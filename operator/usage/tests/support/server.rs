//! A PostgreSQL server of its own, on a Unix socket, that ends with the test.

use super::{Folder, PATIENCE};
use aegis_usage::Store;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The user that runs the server where root runs the tests: PostgreSQL refuses to be root.
const NOBODY: u32 = 65_534;

/// An order of letters that is not that of bytes: the store must not depend on the database's language.
const OTHER_ORDER: &str = "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'";

pub struct Server {
    process: Child,
    folder: Folder,
    next: AtomicU32,
    /// The database of all schemas.
    schemas: OnceLock<String>,
}

impl Server {
    /// Starts it, and waits until it answers. What it stores is not kept safe.
    ///
    /// # Panics
    /// PostgreSQL is not installed, or does not start.
    pub fn start() -> Server {
        Server::installed(&["fsync=off"])
            .expect("PostgreSQL is not installed (apt-get install postgresql): these tests need it")
    }

    /// Starts it with these settings, where it is installed.
    ///
    /// # Panics
    /// It does not start.
    pub fn installed(settings: &[&str]) -> Option<Server> {
        let programs = programs()?;
        let folder = Folder::new("postgres");
        let data = folder.0.join("data");
        let root =
            std::fs::metadata("/proc/self").is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0);
        if root {
            chown(&folder.0, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o700)).unwrap();
        let run = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.current_dir(&folder.0).env("LC_ALL", "C.UTF-8");
            if root {
                command.uid(NOBODY).gid(NOBODY);
            }
            command
        };
        let made = run("initdb")
            .args(["--username=aegis", "--auth=trust", "--no-sync", "--encoding=UTF8", "--pgdata"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let log = std::fs::File::create(folder.0.join("log")).unwrap();
        // A shell between: when the tests are gone, however they ended, it reads the end of its input and ends the server.
        let mut shell = Command::new("sh");
        if root {
            shell.uid(NOBODY).gid(NOBODY);
        }
        let process = shell
            .current_dir(&folder.0)
            .args(["-c", r#""$0" "$@" & server=$!; read -r _; kill -QUIT $server; wait $server"#])
            .arg(programs.join("postgres"))
            .arg("-D")
            .arg(&data)
            .stdin(Stdio::piped())
            .arg("-k")
            .arg(&folder.0)
            .args(["-c", "listen_addresses=", "-c", "max_connections=30"])
            .args(settings.iter().flat_map(|it| ["-c", it]))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Server { process, folder, next: AtomicU32::new(0), schemas: OnceLock::new() };
        let mut tries = 0;
        while let Err(error) = postgres::Client::connect(&server.url("postgres"), postgres::NoTls) {
            let ended = server.process.try_wait().unwrap();
            let log = || std::fs::read_to_string(server.folder.0.join("log")).unwrap_or_default();
            assert!(ended.is_none() && tries < 600, "PostgreSQL does not answer: {error}\n{}", log());
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Some(server)
    }

    /// An empty store in a schema of its own, which is made faster than a database. One at a time.
    pub fn store(&self) -> Store {
        let name = format!("usage{}", self.next.fetch_add(1, Ordering::Relaxed));
        let url = self.schemas.get_or_init(|| self.database());
        let mut client = postgres::Client::connect(url, postgres::NoTls).unwrap();
        client.batch_execute(&format!("CREATE SCHEMA {name}")).unwrap();
        Store::postgres(format!("{url} options='-c search_path={name}'"), PATIENCE).unwrap()
    }

    /// The connection string of a new database.
    pub fn database(&self) -> String {
        let name = format!("usage{}", self.next.fetch_add(1, Ordering::Relaxed));
        let mut client = postgres::Client::connect(&self.url("postgres"), postgres::NoTls).unwrap();
        client.batch_execute(&format!("CREATE DATABASE {name} {OTHER_ORDER}")).unwrap();
        self.url(&name)
    }

    fn url(&self, database: &str) -> String {
        format!("host={} user=aegis dbname={database}", self.folder.0.display())
    }

    /// Bytes that a database takes.
    pub fn size(&self, url: &str) -> i64 {
        let mut client = postgres::Client::connect(url, postgres::NoTls).unwrap();
        client.query_one("SELECT pg_database_size(current_database())", &[]).unwrap().get(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Where `initdb` and `postgres` are: on PATH, or where Debian has them.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|it| it.path().join("bin"));
    let has =
        |folder: &PathBuf| ["initdb", "postgres"].iter().all(|name| Path::new(folder).join(name).exists());
    std::env::split_paths(&path).chain(debian).find(has)
}
