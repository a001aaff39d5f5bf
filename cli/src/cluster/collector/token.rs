//! The token by which the collector knows who asks.

use super::{Cluster, NAME, Notice};
use crate::args::Way;
use anyhow::{Context, Result, bail};
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::{Request, Response};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Config;
use kube::api::{Api, PostParams};
use kube::client::{Body, ConfigExt};
use tower::{Layer, ServiceExt};

/// Audience of the collector's tokens.
const AUDIENCE: &str = "aegis-collector";

/// Service account that is asked as where none is named: the account's own, else the one of the chart, which sees all accounts.
const READER: &str = "aegis-collector-reader";

/// For how long a token is good: the shortest time that there is.
const SECONDS: i64 = 600;

/// A token.
pub struct Token {
    /// Itself.
    pub text: String,
    /// Which one it is.
    pub of: String,
    /// What to do if it is not taken.
    pub remedy: String,
}

impl Token {
    fn given(text: String, of: String) -> Result<Token> {
        let remedy = format!(
            "it is over, or not for the audience {AUDIENCE}: kubectl create token NAME -n NAMESPACE --audience {AUDIENCE} makes one"
        );
        let text = text.trim().to_owned();
        if text.is_empty() {
            bail!("{of} is empty");
        }
        Ok(Token { text, of, remedy })
    }
}

/// The one that was given, unless somebody else is to be asked as.
pub fn given(way: &Way) -> Result<Option<Token>> {
    if let Some(path) = &way.token_file {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        return Token::given(text, format!("the token of {}", path.display())).map(Some);
    }
    match &way.token {
        Some(text) if way.service_account.is_none() => {
            Token::given(text.clone(), "the token of --token or AEGIS_COLLECTOR_TOKEN".to_owned()).map(Some)
        }
        _ => Ok(None),
    }
}

/// One that is asked for: of the service account that is named; else the kubeconfig's own where the collector takes it, which knows best what
/// somebody may; else of a service account that is there for it.
pub async fn of(
    cluster: &Cluster,
    config: &Config,
    way: &Way,
    notice: &Notice,
    accounts: &[String],
) -> Result<Token> {
    if let Some(name) = &way.service_account {
        let (namespace, name) = match name.split_once('/') {
            Some((namespace, name)) => (namespace, name),
            None => (cluster.namespace.as_str(), name.as_str()),
        };
        return match cluster.request(namespace, name).await? {
            Ok(token) => Ok(token),
            Err(why) => bail!("--service-account: {why}"),
        };
    }
    // Nobody but the platform decides that the collector gets to see tokens with which it could act as their owners.
    if notice.api_tokens
        && let Some(text) = own(config).await?
    {
        let remedy = "log in again; or it is not one that the API server takes by itself".to_owned();
        return Ok(Token { text, of: "the token of your kubeconfig".to_owned(), remedy });
    }
    let mut refusals = Vec::new();
    for namespace in candidates(accounts, &cluster.system) {
        match cluster.request(namespace, READER).await? {
            Ok(token) => return Ok(token),
            Err(why) => refusals.push(why),
        }
    }
    let account = accounts.first().map_or("NAMESPACE", String::as_str);
    bail!(
        "there is no token for the collector: {}. One of these helps:\n  \
         a service account of the account: kubectl create serviceaccount {READER} -n {account} && kubectl create rolebinding {READER} -n {account} --clusterrole=aegis-viewer --serviceaccount={account}:{READER}\n  \
         another one that may see it: --service-account NAMESPACE/NAME\n  \
         a token that you have: --token-file FILE (kubectl create token NAME --audience {AUDIENCE})\n  \
         where people sign in by OIDC: usage.apiTokens of the chart",
        refusals.join("; ")
    );
}

/// Namespaces in which the reader is looked for: that of the account, if it is one, then the one of Aegis.
fn candidates<'a>(accounts: &'a [String], system: &'a str) -> Vec<&'a str> {
    let own = accounts.first().filter(|it| accounts.len() == 1 && *it != system);
    own.map(String::as_str).into_iter().chain([system]).collect()
}

impl Cluster {
    /// Asks for a token of a service account; the inner error says why there is none.
    async fn request(&self, namespace: &str, name: &str) -> Result<Result<Token, String>> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let spec = TokenRequestSpec {
            audiences: Some(vec![AUDIENCE.to_owned()]),
            expiration_seconds: Some(SECONDS),
            ..TokenRequestSpec::default()
        };
        let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
        let of = format!("service account {namespace}/{name}");
        match accounts.create_token_request(name, &PostParams::default(), &request).await {
            Ok(made) => {
                let text = made.status.and_then(|it| it.token);
                let text = text.with_context(|| format!("the API server gives no token of {of}"))?;
                let remedy = format!("does {NAME} ask the same API server, for the audience {AUDIENCE}?");
                Ok(Ok(Token { text, of: format!("a token of {of}"), remedy }))
            }
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Err(format!("there is no {of}"))),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                Ok(Err(format!("you may not create serviceaccounts/token of {of} ({})", status.message)))
            }
            Err(error) => Err(error).with_context(|| format!("ask for a token of {of}")),
        }
    }
}

/// The token with which the kubeconfig lets requests to the API server be made, from wherever it has it: a file, a plugin, a provider.
/// None: it has a certificate.
async fn own(config: &Config) -> Result<Option<String>> {
    let Some(layer) = config.auth_layer()? else { return Ok(None) };
    // What would be sent comes back.
    let echo = tower::service_fn(|request: Request<Body>| async move {
        let mut response = Response::new(Body::empty());
        if let Some(value) = request.headers().get(AUTHORIZATION) {
            response.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        Ok::<_, tower::BoxError>(response)
    });
    let sent = layer.layer(echo).oneshot(Request::new(Body::empty())).await;
    let sent = sent.map_err(anyhow::Error::from_boxed).context("the kubeconfig gives no token")?;
    let header = sent.headers().get(AUTHORIZATION).map(HeaderValue::to_str).transpose()?;
    Ok(header.and_then(|it| it.strip_prefix("Bearer ")).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_of_the_account_comes_before_the_one_that_sees_all() {
        let names = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        assert_eq!(candidates(&names(&["shop"]), "aegis-system"), ["shop", "aegis-system"]);
        assert_eq!(candidates(&names(&["shop", "bank"]), "aegis-system"), ["aegis-system"]);
        assert_eq!(candidates(&[], "aegis-system"), ["aegis-system"]);
        assert_eq!(candidates(&names(&["aegis-system"]), "aegis-system"), ["aegis-system"]);
    }

    #[test]
    fn a_token_is_what_was_given_without_its_line_feed() {
        let way = Way { token: Some(" text\n".into()), ..Way::default() };
        assert_eq!(given(&way).unwrap().unwrap().text, "text");
        let empty = Way { token: Some("\n".into()), ..Way::default() };
        assert!(given(&empty).is_err_and(|it| it.to_string().contains("is empty")));
        let missing = Way { token_file: Some("/nonexistent".into()), ..Way::default() };
        assert!(given(&missing).is_err_and(|it| it.to_string().contains("read /nonexistent")));
        assert!(given(&Way::default()).unwrap().is_none());
    }

    #[tokio::test]
    async fn the_kubeconfigs_own_token_is_found_wherever_it_is() {
        let mut config = Config::new("https://192.0.2.1".parse().unwrap());
        assert_eq!(own(&config).await.unwrap(), None);
        config.auth_info.token = Some("of the file".to_owned().into());
        assert_eq!(own(&config).await.unwrap().as_deref(), Some("of the file"));
        let plugin = serde_json::json!({
            "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "interactiveMode": "Never",
            "args": ["-c", r#"echo '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "of the plugin"}}'"#],
        });
        config.auth_info =
            kube::config::AuthInfo { exec: serde_json::from_value(plugin).unwrap(), ..Default::default() };
        assert_eq!(own(&config).await.unwrap().as_deref(), Some("of the plugin"));
        // A password is no token.
        config.auth_info = kube::config::AuthInfo {
            username: Some("jane".into()),
            password: Some("sesame".to_owned().into()),
            ..Default::default()
        };
        assert_eq!(own(&config).await.unwrap(), None);
    }
}
