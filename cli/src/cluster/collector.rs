//! The collector of use, and how it is asked: by a port of its pod that is forwarded through the API server, or at an address; over TLS
//! in either case; with a token that is meant for it.

mod https;
mod pod;
mod token;

use super::{Cluster, configure};
use crate::args::{Connection, Way};
use crate::usage::Ask;
use anyhow::{Context, Result, bail};
use https::{Https, Trust};
use hyper::{StatusCode, Uri};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use kube::{Client, Config};
use serde_json::{Value, json};
use std::time::Duration;
use token::Token;

/// As its Service, its ConfigMap and its pods are called by the chart.
pub const NAME: &str = "aegis-collector";

/// Role of the chart that lets people reach the collector by its pod.
pub const CLIENT: &str = "aegis-collector-client";

/// Longest time until there is a connection.
const CONNECT: Duration = Duration::from_secs(20);

/// Longest time of a question: the collector gives up after 20 s.
const QUESTION: Duration = Duration::from_secs(40);

/// Where questions go.
const PATH: &str = "/v1/graphql";

/// What the kubeconfig says, before anything is connected.
pub struct Place {
    config: Result<Config>,
    context: Option<String>,
    system: String,
    /// The namespace that counts.
    pub namespace: String,
}

impl Place {
    /// By kubeconfig and context. Without any there may still be an address and a token.
    pub async fn of(connection: &Connection) -> Place {
        let (config, context) = match configure(connection).await {
            Ok((config, context)) => (Ok(config), context),
            Err(error) => (Err(error), None),
        };
        let of_context = config.as_ref().ok().map(|it| it.default_namespace.clone());
        let namespace = connection.namespace.clone().or(of_context).unwrap_or_else(|| "default".to_owned());
        Place { config, context, system: connection.system_namespace.clone(), namespace }
    }

    fn cluster(self) -> Result<(Cluster, Config)> {
        let config = self.config?;
        let client = Client::try_from(config.clone())?;
        let cluster =
            Cluster { client, namespace: self.namespace, context: self.context, system: self.system };
        Ok((cluster, config))
    }
}

/// What the chart tells of the collector to those who ask it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Notice {
    /// The authority of its certificate, in PEM.
    authority: Option<String>,
    /// It takes tokens for the API server.
    api_tokens: bool,
    /// Where it is reached from outside of the cluster.
    url: Option<String>,
}

/// The collector, with somebody's token.
pub struct Collector {
    connection: Https,
    token: Token,
}

impl Collector {
    /// Connects, for questions about these accounts.
    ///
    /// # Errors
    /// It cannot be reached, or there is no token for it.
    pub async fn reach(place: Place, way: &Way, accounts: &[String]) -> Result<Collector> {
        let given = token::given(way)?;
        let (url, token) = match (&way.collector, given) {
            (Some(url), Some(token)) => (url, token),
            (Some(url), None) => {
                let (cluster, config) = place.cluster().context("a token is asked for at the API server")?;
                let notice = cluster.notice().await.unwrap_or_default();
                (url, token::of(&cluster, &config, way, &notice, accounts).await?)
            }
            (None, given) => {
                let (cluster, config) = place.cluster()?;
                let notice = cluster.notice().await;
                let told = notice.as_ref().ok().cloned().unwrap_or_default();
                // First the pod: without a collector no token is of any use.
                let pod = cluster.collector_pod(&told).await?;
                let trust = match &way.ca_file {
                    Some(file) => Trust::file(file)?,
                    None => cluster.authority(notice, &pod).await?,
                };
                let token = match given {
                    Some(token) => token,
                    None => token::of(&cluster, &config, way, &told, accounts).await?,
                };
                let connection = cluster.forward(&pod, trust, &told).await?;
                return Ok(Collector { connection, token });
            }
        };
        let connection = direct(url, way).await?;
        Ok(Collector { connection, token })
    }
}

/// Connects to an address.
async fn direct(url: &str, way: &Way) -> Result<Https> {
    let (host, port) = address(url)?;
    let trust = match &way.ca_file {
        Some(file) => Trust::file(file)?,
        None => Trust::System,
    };
    let stream = tokio::time::timeout(CONNECT, tokio::net::TcpStream::connect((host.as_str(), port))).await;
    let stream = match stream {
        Ok(stream) => stream.with_context(|| format!("there is no connection to {host}:{port}"))?,
        Err(_) => bail!("there is no connection to {host}:{port} within {} s", CONNECT.as_secs()),
    };
    let opened = tokio::time::timeout(CONNECT, Https::open(stream, &host, &trust)).await;
    opened.with_context(|| format!("{url} does not answer within {} s", CONNECT.as_secs()))?.with_context(|| {
        let hint = match trust {
            Trust::System => format!(
                "; if its certificate is the chart's: kubectl get configmap -n NAMESPACE {NAME} -o jsonpath='{{.data.ca\\.crt}}' > ca.crt, and --ca-file ca.crt"
            ),
            Trust::These(_) => String::new(),
        };
        format!("{url} cannot be trusted{hint}")
    })
}

/// Host and port of `https://HOST[:PORT]`.
fn address(url: &str) -> Result<(String, u16)> {
    let uri: Uri = url.parse().with_context(|| format!("--collector {url}"))?;
    let host = uri.authority().filter(|it| !it.host().is_empty() && !it.as_str().contains('@'));
    match (uri.scheme_str(), host, uri.path_and_query().map(|it| it.as_str())) {
        (Some("https"), Some(host), None | Some("/")) => {
            let name = host.host().trim_start_matches('[').trim_end_matches(']');
            Ok((name.to_owned(), host.port_u16().unwrap_or(443)))
        }
        // A token is a password.
        (Some("http"), ..) => bail!("--collector {url}: tokens are not sent in plain text: say https://…"),
        _ => bail!("--collector {url}: say https://HOST or https://HOST:PORT"),
    }
}

impl Cluster {
    /// What the chart tells of the collector; nothing where it tells nothing, or where that may not be read.
    async fn notice(&self) -> Result<Notice, kube::Error> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.system);
        let data = maps.get_opt(NAME).await?.and_then(|it| it.data).unwrap_or_default();
        let text = |key: &str| data.get(key).filter(|it| !it.trim().is_empty()).cloned();
        Ok(Notice {
            authority: text("ca.crt"),
            api_tokens: data.get("apiTokens").is_some_and(|it| it == "true"),
            url: text("url"),
        })
    }
}

impl Ask for Collector {
    async fn ask(&mut self, query: &str, variables: Value) -> Result<Value> {
        let body = json!({"query": query, "variables": variables}).to_string();
        let answer = tokio::time::timeout(QUESTION, self.connection.post(PATH, &self.token.text, body)).await;
        let (status, body) = answer
            .with_context(|| format!("the collector does not answer within {} s", QUESTION.as_secs()))?
            .context("the collector does not answer")?;
        read(status, &body, &self.token)
    }
}

/// The data of an answer.
fn read(status: StatusCode, body: &str, token: &Token) -> Result<Value> {
    let said = body.trim();
    match status {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED => bail!("the collector does not take {}: {}", token.of, token.remedy),
        StatusCode::SERVICE_UNAVAILABLE => bail!("the collector cannot answer now ({said}): try again"),
        StatusCode::NOT_FOUND => bail!("what answers there is no collector: {status}"),
        other => bail!("the collector answers {other}: {said}"),
    }
    let mut answer: Value = serde_json::from_str(body).context("what answers there is no collector")?;
    let errors: Vec<&str> =
        answer["errors"].as_array().into_iter().flatten().filter_map(|it| it["message"].as_str()).collect();
    if !errors.is_empty() {
        bail!("the collector says: {}", errors.join("; "));
    }
    Ok(answer["data"].take())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_nowhere_in_plain_text() {
        for (url, expected) in [
            ("https://use.example.com", ("use.example.com", 443)),
            ("https://localhost:8443/", ("localhost", 8443)),
            ("https://[2001:db8::1]:1", ("2001:db8::1", 1)),
        ] {
            let (host, port) = address(url).unwrap();
            assert_eq!((host.as_str(), port), expected);
        }
        assert!(address("http://localhost:8443").unwrap_err().to_string().contains("not sent in plain text"));
        for wrong in
            ["", "localhost", "localhost:8443", "https://", "https://a@b", "https://host/page", "ftp://host"]
        {
            assert!(address(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn answers_that_are_none_say_what_to_do() {
        let token =
            Token { text: "secret".into(), of: "the token of --token".into(), remedy: "make another".into() };
        let said = |status, body| read(status, body, &token).map_err(|error| format!("{error:#}"));
        assert_eq!(said(StatusCode::OK, r#"{"data": {"now": 1}}"#), Ok(json!({"now": 1})));
        for (status, body, expected) in [
            (StatusCode::UNAUTHORIZED, "x", "the collector does not take the token of --token: make another"),
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "not now\n",
                "the collector cannot answer now (not now): try again",
            ),
            (
                StatusCode::OK,
                r#"{"data": null, "errors": [{"message": "too wide"}]}"#,
                "the collector says: too wide",
            ),
            (StatusCode::OK, "<html>", "what answers there is no collector: "),
        ] {
            let error = said(status, body).unwrap_err();
            assert!(error.starts_with(expected) && !error.contains("secret"), "{error}");
        }
    }
}
