//! A PostgreSQL server of its own, on a Unix socket, that ends with the test.

use super::{PATIENCE, folder};
use aegis_usage::Store;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use tempfile::TempDir;

/// The user that runs the server where root runs the tests: PostgreSQL refuses to be root.
const NOBODY: u32 = 65_534;

/// An order of letters that is not that of bytes: the store must not depend on the database's language.
const OTHER_ORDER: &str = "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'";

pub struct Server {
    process: Child,
    programs: PathBuf,
    settings: Vec<String>,
    folder: TempDir,
    /// Its port, by which the socket is named.
    port: String,
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
        Server::prepared(settings, |_| ())
    }

    /// Starts it with these settings, where it is installed, after files of its own were put into its folder, which is where it runs.
    ///
    /// # Panics
    /// It does not start.
    pub fn prepared(settings: &[&str], files: impl FnOnce(&Path)) -> Option<Server> {
        let programs = programs()?;
        let folder = folder("postgres");
        files(folder.path());
        let data = folder.path().join("data");
        let root = is_root();
        if root {
            let files = std::fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().path());
            for path in files.chain([folder.path().to_owned()]) {
                chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let run = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.current_dir(folder.path()).env("LC_ALL", "C.UTF-8");
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
        let port = settings.iter().find_map(|it| it.strip_prefix("port=")).unwrap_or("5432").into();
        let settings: Vec<String> = settings.iter().map(|it| (*it).to_owned()).collect();
        let process = launch(&programs, folder.path(), &settings, root);
        let (next, schemas) = (AtomicU32::new(0), OnceLock::new());
        let mut server = Server { process, programs, settings, folder, port, next, schemas };
        server.until_it_answers();
        Some(server)
    }

    fn until_it_answers(&mut self) {
        let mut tries = 0;
        while let Err(error) = postgres::Client::connect(&self.url("postgres"), postgres::NoTls) {
            let ended = self.process.try_wait().unwrap();
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(ended.is_none() && tries < 600, "PostgreSQL does not answer: {error}\n{}", log());
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    fn end(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }

    /// Ends it, with all connections, and starts it with the same data.
    pub fn restart(&mut self) {
        self.end();
        self.process = launch(&self.programs, self.folder.path(), &self.settings, is_root());
        self.until_it_answers();
    }

    /// Stops all of its processes where they are, while `work` is done. Its machine still takes what is sent.
    pub fn frozen<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Stopped(Vec<String>);
        impl Stopped {
            fn signal(&self, signal: &str) {
                assert!(Command::new("kill").arg(signal).args(&self.0).status().unwrap().success());
            }
        }
        impl Drop for Stopped {
            fn drop(&mut self) {
                self.signal("-CONT");
            }
        }
        let file = std::fs::read_to_string(self.folder.path().join("data/postmaster.pid")).unwrap();
        let first = file.lines().next().unwrap().to_owned();
        let children = std::fs::read_to_string(format!("/proc/{first}/task/{first}/children")).unwrap();
        let all = [first].into_iter().chain(children.split_whitespace().map(String::from));
        let stopped = Stopped(all.collect());
        stopped.signal("-STOP");
        work()
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

    /// Lets clients on the Unix socket in, and of others only those of a line of `pg_hba.conf`.
    pub fn only(&self, line: &str) {
        let loaded = || -> std::time::SystemTime {
            let mut client = postgres::Client::connect(&self.url("postgres"), postgres::NoTls).unwrap();
            client.query_one("SELECT pg_conf_load_time()", &[]).unwrap().get(0)
        };
        let before = loaded();
        std::fs::write(self.folder.path().join("data/pg_hba.conf"), format!("local all all trust\n{line}\n"))
            .unwrap();
        self.run("SELECT pg_reload_conf()");
        // A new connection has what the server has read.
        for _ in 0..600 {
            if loaded() > before {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("the server does not read its settings again");
    }

    /// Does something as the one who may do everything.
    pub fn run(&self, text: &str) {
        let mut client = postgres::Client::connect(&self.url("postgres"), postgres::NoTls).unwrap();
        client.batch_execute(text).unwrap();
    }

    fn url(&self, database: &str) -> String {
        format!("host={} port={} user=aegis dbname={database}", self.folder.path().display(), self.port)
    }

    /// Bytes that a database takes.
    pub fn size(&self, url: &str) -> i64 {
        let mut client = postgres::Client::connect(url, postgres::NoTls).unwrap();
        client.query_one("SELECT pg_database_size(current_database())", &[]).unwrap().get(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0)
}

fn launch(programs: &Path, folder: &Path, settings: &[String], root: bool) -> Child {
    let log = std::fs::File::create(folder.join("log")).unwrap();
    // A shell between: when the tests are gone, however they ended, it reads the end of its input and ends the server.
    let mut shell = Command::new("sh");
    if root {
        shell.uid(NOBODY).gid(NOBODY);
    }
    shell
        .current_dir(folder)
        .args(["-c", r#""$0" "$@" & server=$!; read -r _; kill -QUIT $server; wait $server"#])
        .arg(programs.join("postgres"))
        .arg("-D")
        .arg(folder.join("data"))
        .stdin(Stdio::piped())
        .arg("-k")
        .arg(folder)
        .args(["-c", "listen_addresses=", "-c", "max_connections=30"])
        .args(settings.iter().flat_map(|it| ["-c", it]))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
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
