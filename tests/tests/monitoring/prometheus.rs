//! A real Prometheus on loopback, with the chart's rules, in a folder of its own.

use crate::folder;
use aegis_tests::apiserver::{free_ports, new_directory, spawn};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Who is scraped: the job, the node, the port on loopback.
pub type Target = (&'static str, String, u16);

/// It ends when this is dropped, and also when the test process is killed.
pub struct Prometheus {
    directory: PathBuf,
    port: u16,
    child: Child,
}

/// An answer to a query: labels and value of each series.
pub type Series = Vec<(Value, f64)>;

impl Prometheus {
    /// Starts it and waits until it is ready.
    pub fn start(targets: &[Target]) -> Prometheus {
        // Somebody else may take the port between our look and Prometheus's; then another try helps.
        let mut last = String::new();
        for _ in 0..3 {
            match Prometheus::try_start(targets) {
                Ok(started) => return started,
                Err(error) => last = error,
            }
        }
        panic!("{last}")
    }

    fn try_start(targets: &[Target]) -> Result<Prometheus, String> {
        let directory = new_directory().expect("make a folder");
        let [port] = free_ports().expect("find a free port");
        let config = directory.join("prometheus.yml");
        fs::write(&config, configuration(targets).to_string()).expect("write the configuration");
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let log = directory.join("prometheus.log");
        let child = spawn(command, &log).expect("start Prometheus: `make setup` installs it");
        let mut started = Prometheus { directory, port, child };
        let limit = Instant::now() + Duration::from_secs(60);
        while started.get("/-/ready").is_err() {
            let ended = started.child.try_wait().expect("look at Prometheus").is_some();
            if ended || Instant::now() > limit {
                return Err(format!(
                    "Prometheus does not start: {}",
                    fs::read_to_string(&log).unwrap_or_default()
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(started)
    }

    /// Body of a page that it serves.
    fn get(&self, path: &str) -> Result<String, String> {
        get(self.port, path)
    }

    fn ask(&self, path: &str) -> Result<Value, String> {
        let body = self.get(path)?;
        let answer: Value = serde_json::from_str(&body).map_err(|error| format!("{error}: {body}"))?;
        if answer["status"] == "success" { Ok(answer["data"].clone()) } else { Err(body) }
    }

    /// What a query finds now; an error where it cannot be parsed or evaluated.
    pub fn query(&self, expr: &str) -> Result<Series, String> {
        let data = self.ask(&format!("/api/v1/query?query={}", encoded(expr)))?;
        let found = data["result"].as_array().into_iter().flatten().map(|series| {
            let value = series["value"][1].as_str().and_then(|value| value.parse().ok()).unwrap_or(f64::NAN);
            (series["metric"].clone(), value)
        });
        Ok(found.collect())
    }

    /// Values of a label of a metric.
    pub fn label_values(&self, metric: &str, label: &str) -> Vec<String> {
        let data = self.ask(&format!("/api/v1/label/{label}/values?match[]={}", encoded(metric)));
        let data = data.unwrap_or_else(|error| panic!("values of {label}: {error}"));
        data.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Names of the rules that it evaluates, each with the last error.
    pub fn rules(&self) -> Vec<(String, String)> {
        let data = self.ask("/api/v1/rules").expect("ask for the rules");
        let groups = data["groups"].as_array().into_iter().flatten();
        let rules = groups.flat_map(|group| group["rules"].as_array().into_iter().flatten());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        rules.map(|rule| (text(&rule["name"]), text(&rule["lastError"]))).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Targets are named as the chart's ServiceMonitors name them: the job by its Service, with the labels `node` and `namespace`.
fn configuration(targets: &[Target]) -> Value {
    let scrapes = ["aegis-operator", "aegis-node-agent", "aegis-collector"].map(|job| {
        let of_job = targets.iter().filter(|(of, ..)| *of == job).map(|(_, node, port)| {
            json!({"targets": [format!("127.0.0.1:{port}")], "labels": {"node": node, "namespace": "aegis-system"}})
        });
        json!({"job_name": job, "honor_labels": true, "static_configs": of_job.collect::<Vec<_>>()})
    });
    json!({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [folder("rules").join("*.yaml").display().to_string()],
        "scrape_configs": scrapes,
    })
}

/// Body of a page of a server on loopback.
pub fn get(port: u16, path: &str) -> Result<String, String> {
    ask(port, &format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"))
}

/// Body of the answer of a server on loopback, as an error where it is a refusal.
pub fn ask(port: u16, request: &str) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(text)?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(text)?;
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.lines().next().is_some_and(|line| line.contains(" 200 ")) => {
            Ok(body.to_owned())
        }
        Some((_, body)) => Err(body.to_owned()),
        None => Err(answer),
    }
}

fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}
