//! A real API server for tests that need nothing more: etcd and kube-apiserver on loopback, in a folder of their own,
//! gone when the last test that uses them is.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

/// Version of the API server, which `helm template` has to be told.
pub const KUBERNETES: &str = "1.36.3";

/// Namespace in which [`ApiServer::install_chart`] installs the chart.
pub const NAMESPACE: &str = "aegis-system";

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// One of the tools that `make setup` builds. An error says how to get them.
pub fn tool(name: &str) -> Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/aegis/tools"));
    let tools =
        std::env::var_os("AEGIS_TOOLS").map(PathBuf::from).or_else(home).context("HOME is not set")?;
    let path = tools.join("bin").join(name);
    ensure!(
        path.is_file(),
        "{} is missing: run `make setup`, or let AEGIS_TOOLS name the folder",
        path.display()
    );
    Ok(path)
}

/// etcd and kube-apiserver. They end when this is dropped, and also when the test process is killed.
pub struct ApiServer {
    directory: PathBuf,
    ports: Ports,
    etcd: Child,
    server: Mutex<Option<Child>>,
}

struct Ports {
    etcd: u16,
    etcd_peers: u16,
    server: u16,
}

impl ApiServer {
    /// The server that all tests of this process share, with the chart installed (with these values, which must be the
    /// same in all tests of a process). It starts with the first test that
    /// asks and ends with the last one that holds it.
    pub fn shared(values: &[&str]) -> Result<Arc<ApiServer>> {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = shared.upgrade() {
            return Ok(server);
        }
        let server = Arc::new(ApiServer::start()?);
        server.install_chart(values)?;
        *shared = Arc::downgrade(&server);
        Ok(server)
    }

    /// Starts an empty one and waits until it is ready, which takes about 3 s.
    pub fn start() -> Result<ApiServer> {
        // Somebody else may take a port between our look and the server's; then another try helps.
        let mut last = None;
        for _ in 0..3 {
            match ApiServer::try_start() {
                Ok(server) => return Ok(server),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no attempt")?)
    }

    fn try_start() -> Result<ApiServer> {
        let (program, _) = (tool("etcd")?, tool("kube-apiserver")?);
        let directory = new_directory()?;
        let [etcd, etcd_peers, server] = free_ports()?;
        let ports = Ports { etcd, etcd_peers, server };
        write_keys(&directory)?;
        write_kubeconfig(&directory.join("kubeconfig"), ports.server, "admin")?;
        let mut command = Command::new(program);
        command.arg(format!("--data-dir={}/etcd", directory.display())).args([
            "--unsafe-no-fsync".to_owned(),
            format!("--listen-client-urls=http://127.0.0.1:{}", ports.etcd),
            format!("--advertise-client-urls=http://127.0.0.1:{}", ports.etcd),
            format!("--listen-peer-urls=http://127.0.0.1:{}", ports.etcd_peers),
        ]);
        let etcd = spawn(command, &directory.join("etcd.log"))?;
        let server = ApiServer { directory, ports, etcd, server: Mutex::new(None) };
        server.resume()?;
        Ok(server)
    }

    /// Ends kube-apiserver: an outage. What etcd has, stays.
    pub fn suspend(&self) {
        if let Some(child) = self.server.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            end(child);
        }
    }

    /// Starts kube-apiserver, again if it was suspended, and waits until it is ready.
    pub fn resume(&self) -> Result<()> {
        let directory = self.directory.display();
        let mut command = Command::new(tool("kube-apiserver")?);
        command.args([
            format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd),
            format!("--secure-port={}", self.ports.server),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={directory}"),
            format!("--token-auth-file={directory}/tokens.csv"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={directory}/sa.key"),
            format!("--service-account-signing-key-file={directory}/sa.key"),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            // Nothing here has an address to reconcile the service `kubernetes` with.
            "--endpoint-reconciler-type=none".to_owned(),
        ]);
        let log = self.directory.join("kube-apiserver.log");
        let mut child = spawn(command, &log)?;
        let limit = Instant::now() + Duration::from_secs(60);
        while self.kubectl(&["get", "--raw", "/readyz"]).is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("kube-apiserver ended with {status}: {}", tail(&log));
            }
            ensure!(Instant::now() < limit, "kube-apiserver is not ready after 60 s: {}", tail(&log));
            std::thread::sleep(Duration::from_millis(100));
        }
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        Ok(())
    }

    /// Credentials of an administrator; the user `nobody` in it has none.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Credentials of whoever has this token, in a file of this name.
    pub fn kubeconfig_of(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.directory.join(format!("kubeconfig-{name}"));
        write_kubeconfig(&path, self.ports.server, token)?;
        Ok(path)
    }

    /// The folder of its files, which goes when it ends.
    pub fn folder(&self) -> &Path {
        &self.directory
    }

    /// A client with an administrator's rights.
    pub async fn client(&self) -> Result<kube::Client> {
        let file = kube::config::Kubeconfig::read_from(self.kubeconfig())?;
        let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await?;
        Ok(kube::Client::try_from(config)?)
    }

    /// kubectl as an administrator, to its end. Its error output is the error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// kubectl with something to read.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(tool("kubectl")?);
        command
            .arg(format!("--kubeconfig={}", self.kubeconfig().display()))
            .arg(format!("--cache-dir={}/kubectl", self.directory.display()))
            .args(arguments);
        finish(command, input)
    }

    /// Applies objects that several tests need, for one test at a time: kubectl looks first and creates then, and between
    /// the two another test may have created.
    pub fn provide(&self, objects: &str) -> Result<()> {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        self.kubectl_with(&["apply", "-f", "-"], objects).map(drop)
    }

    /// helm, to its end.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(tool("helm")?);
        for (name, folder) in
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(name, self.directory.join("helm").join(folder));
        }
        command.env("KUBECONFIG", self.kubeconfig()).args(arguments);
        finish(command, "")
    }

    /// Installs or upgrades the chart with values as `--set` takes them. Nothing runs: there is no node.
    pub fn install_chart(&self, values: &[&str]) -> Result<()> {
        let chart = repository().join("charts/aegis");
        let chart = chart.to_str().context("the path of the repository is not UTF-8")?;
        let mut arguments =
            vec!["upgrade", "--install", "aegis", chart, "--namespace", NAMESPACE, "--create-namespace"];
        for value in values {
            arguments.extend(["--set", value]);
        }
        self.helm(&arguments)?;
        self.wait_for_definitions()
    }

    /// Installs the resource definitions alone, without the chart.
    pub fn install_definitions(&self) -> Result<()> {
        let definitions = repository().join("crds/generated");
        let definitions = definitions.to_str().context("the path of the repository is not UTF-8")?;
        self.kubectl(&["apply", "--server-side", "-f", definitions])?;
        self.wait_for_definitions()
    }

    fn wait_for_definitions(&self) -> Result<()> {
        for name in [
            "aegisprefixes",
            "egressallocations",
            "zonebindings",
            "egresspolicies",
            "egressapplications",
            "usagealerts",
            "egressaddresses",
            "egressnodes",
        ] {
            let name = format!("crd/{name}.aegis.dev");
            self.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", &name])?;
        }
        Ok(())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.suspend();
        end(&mut self.etcd);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Ports of loopback that nobody has at the moment.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All are held at once, so that they differ.
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// A new folder `aegis-api-<process>-<number>`; those of processes that are gone are removed.
pub fn new_directory() -> Result<PathBuf> {
    let parent = std::env::temp_dir();
    for entry in fs::read_dir(&parent)?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let process = name.strip_prefix("aegis-api-").and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    for number in 0.. {
        let path = parent.join(format!("aegis-api-{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("create {}", path.display())),
        }
    }
    bail!("no folder in {}", parent.display())
}

fn write_keys(directory: &Path) -> Result<()> {
    fs::write(directory.join("tokens.csv"), "admin,admin,admin,system:masters\n")?;
    let mut command = Command::new("openssl");
    command.args(["genrsa", "-out"]).arg(directory.join("sa.key")).arg("2048");
    finish(command, "").map(drop)
}

fn write_kubeconfig(path: &Path, port: u16, token: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: 'https://127.0.0.1:{port}', insecure-skip-tls-verify: true}}}}]
users: [{{name: admin, user: {{token: '{token}'}}}}, {{name: nobody, user: {{}}}}]
contexts: [{{name: test, context: {{cluster: test, user: admin}}}}]
current-context: test
"
    );
    fs::write(path, text).context("write the kubeconfig")
}

fn finish(mut command: Command, input: &str) -> Result<String> {
    let title = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {title}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that reads nothing may be gone already; its exit status tells what matters.
        let _ = stdin.write_all(input.as_bytes());
    }
    let Output { status, stdout, stderr } =
        child.wait_with_output().with_context(|| format!("run {title}"))?;
    if !status.success() {
        bail!("{}", String::from_utf8_lossy(&stderr).trim());
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Starts a server that the kernel kills when this process ends, however it ends.
pub fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::create(log).with_context(|| format!("create {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: prctl with these arguments only sets a number of the forked child.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let title = format!("{:?}", command.get_program());
    let (reply, started) = mpsc::channel();
    keeper().send((command, reply)).ok().context("the thread that starts servers is gone")?;
    started.recv()?.with_context(|| format!("start {title}"))
}

type Order = (Command, mpsc::Sender<std::io::Result<Child>>);

/// The signal comes when the *thread* that started a child ends, and a test's thread ends early: so one thread, which
/// lives as long as the process, starts them all.
fn keeper() -> mpsc::Sender<Order> {
    static KEEPER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in orders {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    keeper.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
