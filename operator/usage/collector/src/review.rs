//! What the API server is asked: whose a token is, and what somebody may.

use crate::error::Error;
use crate::metrics::{Kind, Metrics};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use kube::{Client, Config};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Longest time to connect to the API server.
const CONNECT: Duration = Duration::from_secs(2);

/// Longest time of a question, its turn included.
const PATIENCE: Duration = Duration::from_secs(5);

/// Questions of each kind at a time. Those about rights, which may be many for one person, do not keep agents waiting.
const AT_A_TIME: usize = 16;

/// The virtual resource that roles name: who may `get` it in a namespace sees the use of that account, who may `update` it gives its
/// feed another address.
const RESOURCE: (&str, &str, &str) = ("aegis.dev", "egressallocations", "usage");

/// Asks.
pub struct Reviewer {
    client: Client,
    tokens: Semaphore,
    rights: Semaphore,
    metrics: Metrics,
}

/// The API server did not answer, or not as it should.
#[derive(Debug)]
pub struct Unanswered;

impl Reviewer {
    /// By this client.
    pub fn new(client: Client, metrics: Metrics) -> Reviewer {
        let turns = || Semaphore::new(AT_A_TIME);
        Reviewer { client, tokens: turns(), rights: turns(), metrics }
    }

    /// Whose a token is that is meant for `audience`, or without one for the API server itself. None: nobody's.
    pub async fn owner(&self, token: &str, audience: Option<&str>) -> Result<Option<UserInfo>, Unanswered> {
        let audiences = audience.map(|audience| vec![audience.to_owned()]);
        let spec = TokenReviewSpec { audiences, token: token.into() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let answer = self.ask(Kind::Token, reviews.create(&params, &review)).await?;
        let Some(status) = answer.status else { return Ok(None) };
        // An authenticator that knows nothing of audiences says yes without naming ours.
        let meant = audience
            .is_none_or(|audience| status.audiences.iter().flatten().any(|confirmed| confirmed == audience));
        Ok(status.user.filter(|_| status.authenticated == Some(true) && meant))
    }

    /// Whether somebody may `get` the use of an account, or do something else (`verb`) to it; None: of all.
    pub async fn may(&self, user: &UserInfo, verb: &str, account: Option<&str>) -> Result<bool, Unanswered> {
        let (group, resource, subresource) = RESOURCE;
        let attributes = ResourceAttributes {
            group: Some(group.into()),
            resource: Some(resource.into()),
            subresource: Some(subresource.into()),
            verb: Some(verb.into()),
            namespace: account.map(Into::into),
            ..ResourceAttributes::default()
        };
        let spec = SubjectAccessReviewSpec {
            extra: user.extra.clone(),
            groups: user.groups.clone(),
            uid: user.uid.clone(),
            user: user.username.clone(),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let answer = self.ask(Kind::Access, reviews.create(&params, &review)).await?;
        Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }

    async fn ask<T>(
        &self,
        kind: Kind,
        question: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Unanswered> {
        let turns = match kind {
            Kind::Token => &self.tokens,
            Kind::Access => &self.rights,
        };
        let asked = tokio::time::timeout(PATIENCE, async {
            let _turn = turns.acquire().await;
            question.await
        });
        let answer = match asked.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the API server does not review");
                Err(Unanswered)
            }
            Err(_) => {
                tracing::warn!("the API server does not answer in time");
                Err(Unanswered)
            }
        };
        self.metrics.reviewed(kind, answer.is_ok());
        answer
    }
}

/// A client by the pod's own account, or by `KUBECONFIG`.
///
/// # Errors
/// There is no usable configuration.
pub async fn connect() -> Result<Client, Error> {
    let mut config = Config::infer().await.map_err(|error| Error::Configure(Box::new(error)))?;
    config.connect_timeout = Some(CONNECT);
    // Against a server that froze, and a connection that died without a word.
    config.read_timeout = Some(Duration::from_secs(u64::from(crate::watch::WATCH_SECONDS) + 10));
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|error| Error::Client(Box::new(error)))
}
