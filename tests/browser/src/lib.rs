//! A browser without a window, driven by the DevTools protocol over a WebSocket.
//!
//! # Panics
//! All of it, where the browser does not do what it is asked for: it is there for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Names of programs that do.
const PROGRAMS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/// Nothing that is not asked for, and nothing towards the outside.
const FLAGS: [&str; 15] = [
    "--headless=new",
    "--remote-debugging-port=0",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--disable-extensions",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--hide-scrollbars",
];

/// One page of a browser of its own, which ends with it.
pub struct Page {
    process: Child,
    _folder: TempDir,
    send: SplitSink<WebSocketStream<TcpStream>, Message>,
    receive: SplitStream<WebSocketStream<TcpStream>>,
    session: String,
    next: u64,
    /// What the page did since it was opened, as far as nobody has looked at it.
    pub events: VecDeque<(String, Value)>,
}

/// A program that runs. Ubuntu's packages only name one that comes as a snap.
fn program() -> Option<&'static str> {
    PROGRAMS.into_iter().find(|name| {
        let version = Command::new(name).arg("--version").stderr(Stdio::null()).output();
        version.is_ok_and(|it| it.status.success())
    })
}

impl Page {
    /// An empty page, as large as a desktop's.
    pub async fn open() -> Page {
        Page::open_with(&[]).await
    }

    /// The same with further flags.
    pub async fn open_with(flags: &[&str]) -> Page {
        let program = program().unwrap_or_else(|| {
            panic!("none of {PROGRAMS:?} runs: these tests need a browser (Debian: apt-get install chromium)")
        });
        let folder = tempfile::Builder::new().prefix("aegis-browser-").tempdir().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        // A shell between: when the tests are gone, however they ended, it reads the end of its input and ends the browser.
        let process = Command::new("sh")
            .args(["-c", r#""$0" "$@" & browser=$!; read -r _; kill $browser; wait $browser"#, program])
            .args(FLAGS)
            .args(flags)
            // Chromium refuses to put root into a sandbox. Here it sees nothing but this page.
            .args(root().then_some("--no-sandbox"))
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .arg("about:blank")
            .env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let port = folder.path().join("profile/DevToolsActivePort");
        let begin = Instant::now();
        let (port, path) = loop {
            let text = std::fs::read_to_string(&port).unwrap_or_default();
            if let Some((port, path)) = text.split_once('\n').filter(|(_, path)| !path.is_empty()) {
                break (port.to_owned(), path.trim().to_owned());
            }
            let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            assert!(begin.elapsed() < PATIENCE, "{program} does not start: {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let stream = TcpStream::connect(format!("127.0.0.1:{port}")).await.unwrap();
        let (socket, _) = client_async(format!("ws://127.0.0.1:{port}{path}"), stream).await.unwrap();
        let (send, receive) = socket.split();
        let (session, events) = (String::new(), VecDeque::new());
        let mut page = Page { process, _folder: folder, send, receive, session, next: 0, events };
        let target = page.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        page.session = page.call("Target.attachToTarget", attach).await["sessionId"].as_str().unwrap().into();
        for domain in ["Page", "Runtime", "Network", "Log"] {
            page.call(&format!("{domain}.enable"), json!({})).await;
        }
        page.size(1280, 900).await;
        page
    }

    /// Asks the browser to do something, and waits for what it says.
    pub async fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut message = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        self.send.send(Message::text(message.to_string())).await.unwrap();
        loop {
            let next = tokio::time::timeout(PATIENCE, self.receive.next()).await;
            let Message::Text(text) = next.expect(method).expect("the browser is there").unwrap() else {
                continue;
            };
            let mut said: Value = serde_json::from_str(&text).unwrap();
            if said["id"] == id {
                assert!(said["error"].is_null(), "{method}: {said}");
                return said["result"].take();
            }
            if let Some(method) = said["method"].as_str().map(String::from) {
                self.events.push_back((method, said["params"].take()));
            }
        }
    }

    /// Leaves for another address.
    pub async fn go(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
    }

    /// The value of an expression in the page.
    pub async fn value(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", params).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// The text that an expression in the page is.
    pub async fn text(&mut self, expression: &str) -> String {
        let value = self.value(expression).await;
        value.as_str().unwrap_or_else(|| panic!("{expression} is {value}")).into()
    }

    /// Waits until an expression holds. While a page is only coming it may fail: its parts are not there yet.
    pub async fn until(&mut self, expression: &str) {
        let begin = Instant::now();
        let params = json!({ "expression": format!("Boolean({expression})"), "returnByValue": true, "awaitPromise": true });
        while self.call("Runtime.evaluate", params.clone()).await["result"]["value"] != true {
            if begin.elapsed() > PATIENCE {
                let text = self.value("document.body.innerText").await;
                panic!("{expression} does not come true: {text}\n{:?}", self.wrongs("http", "").await);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Presses and releases a key.
    pub async fn key(&mut self, name: &str) {
        let (code, text) = match name {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "End" => (35, ""),
            "Home" => (36, ""),
            "PageUp" => (33, ""),
            "PageDown" => (34, ""),
            "ArrowLeft" => (37, ""),
            "ArrowUp" => (38, ""),
            "ArrowRight" => (39, ""),
            "ArrowDown" => (40, ""),
            " " => (32, " "),
            _ => panic!("which key is {name}?"),
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let code_name = if name == " " { "Space" } else { name };
            let params = json!({
                "type": kind, "key": name, "code": code_name, "windowsVirtualKeyCode": code, "text": text,
            });
            self.call("Input.dispatchKeyEvent", params).await;
        }
    }

    /// Presses Tab until an expression holds of the element that has the focus (`it`).
    pub async fn tab_to(&mut self, what: &str) {
        let mut seen = Vec::new();
        for _ in 0..60 {
            self.key("Tab").await;
            if self.value(&format!("((it) => Boolean({what}))(document.activeElement)")).await == true {
                return;
            }
            seen.push(self.value("document.activeElement.outerHTML.slice(0, 80)").await);
        }
        panic!("no Tab leads to {what}: {seen:#?}");
    }

    /// Types into what has the focus.
    pub async fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text })).await;
    }

    /// Size of the window in pixels; a narrow one is a phone's.
    pub async fn size(&mut self, width: u32, height: u32) {
        let params = json!({
            "width": width, "height": height, "screenWidth": width, "screenHeight": height,
            "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.call("Emulation.setDeviceMetricsOverride", params).await;
    }

    /// `light` or `dark`.
    pub async fn scheme(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features })).await;
    }

    /// Keeps a picture of all of the page, where AEGIS_PICTURES names a folder.
    pub async fn picture(&mut self, name: &str) {
        let Some(folder) = std::env::var_os("AEGIS_PICTURES") else { return };
        let params = json!({ "format": "png", "captureBeyondViewport": true });
        let data = self.call("Page.captureScreenshot", params).await;
        let path = std::path::Path::new(&folder).join(format!("{name}.png"));
        std::fs::write(path, unpack(data["data"].as_str().unwrap())).unwrap();
    }

    /// What went wrong in the page, and which requests went elsewhere than `origin`. Answers of a status that `but` names are no error.
    pub async fn wrongs(&mut self, origin: &str, but: &str) -> Vec<String> {
        // Whatever came before this answer is there.
        self.value("1").await;
        let wrong = |(method, params): &(String, Value)| match method.as_str() {
            "Runtime.exceptionThrown" => Some(params.to_string()),
            "Runtime.consoleAPICalled" if params["type"] == "error" => Some(params.to_string()),
            "Log.entryAdded" => {
                let entry = &params["entry"];
                let known = !but.is_empty() && entry["text"].as_str().is_some_and(|it| it.contains(but));
                (["error", "warning"].contains(&entry["level"].as_str()?) && !known)
                    .then(|| entry.to_string())
            }
            "Network.requestWillBeSent" => {
                let url = params["request"]["url"].as_str()?;
                let own = url.starts_with(origin) || url.starts_with("data:") || url == "about:blank";
                (!own).then(|| url.to_owned())
            }
            _ => None,
        };
        self.events.iter().filter_map(wrong).collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0)
}

fn unpack(text: &str) -> Vec<u8> {
    let six = |letter: u8| match letter {
        b'A'..=b'Z' => Some(u32::from(letter - b'A')),
        b'a'..=b'z' => Some(u32::from(letter - b'a') + 26),
        b'0'..=b'9' => Some(u32::from(letter - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let sixes: Vec<u32> = text.bytes().filter_map(six).collect();
    let bytes = sixes.chunks(4).flat_map(|chunk| {
        let word = (0..4).fold(0, |word, at| (word << 6) | chunk.get(at).copied().unwrap_or(0));
        word.to_be_bytes()[1..chunk.len()].to_vec()
    });
    bytes.collect()
}
