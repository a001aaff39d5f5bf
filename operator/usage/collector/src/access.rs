//! Who somebody is and what they may see, as the API server says.

use crate::cache::Cache;
use crate::review::{Reviewer, Unanswered};
use crate::watch::Cluster;
use aegis_usage::{Access, Denied, Pending, Prefix, Viewer, cluster};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::authentication::v1::UserInfo;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For how long it is remembered whose a token is.
const KNOWN: Duration = Duration::from_secs(60);

/// For how long a token is refused without being looked at again.
const REFUSED: Duration = Duration::from_secs(10);

/// For how long it is remembered what somebody may.
const ALLOWED: Duration = Duration::from_secs(30);

/// Tokens that are remembered: agents have one each. Those that are refused are apart, so that they cannot push others out.
const TOKENS: usize = 16_384;

/// Rights that are remembered.
const RIGHTS: usize = 131_072;

/// Longest token.
const LENGTH: usize = 16_384;

/// Most accounts that are tried for somebody who names none.
const ACCOUNTS: usize = 256;

/// Rights that are asked for at a time, of one person.
const AT_A_TIME: usize = 16;

/// What the API server says of the node of a pod whose token it is.
const NODE: &str = "authentication.kubernetes.io/node-name";

/// What it takes to see the use of an account.
const GET: &str = "get";

/// And to give its feed another address.
const UPDATE: &str = "update";

/// What a token is remembered by; the token itself is not kept.
type Digest = [u8; 32];

/// Whose token, what is asked (a verb), and in which namespace; none = in all.
type Right = (Digest, &'static str, Option<String>);

/// Tokens that the API server knows.
pub struct Tokens {
    reviewer: Reviewer,
    cluster: Cluster,
    rules: Rules,
    people: Mutex<Cache<Digest, Arc<Person>>>,
    strangers: Mutex<Cache<Digest, ()>>,
    rights: Mutex<Cache<Right, bool>>,
}

/// What counts.
pub struct Rules {
    /// Audience that a token must be meant for.
    pub audience: String,
    /// User name of the agents.
    pub agent: String,
    /// Questions may be asked with tokens for the API server, too.
    pub api_tokens: bool,
}

/// Whose a token is.
struct Person {
    token: Digest,
    user: UserInfo,
    /// The token is meant for the collector.
    direct: bool,
}

impl Tokens {
    /// Nobody is known yet.
    pub fn new(reviewer: Reviewer, cluster: Cluster, rules: Rules) -> Tokens {
        Tokens {
            reviewer,
            cluster,
            rules,
            people: Mutex::new(Cache::new(TOKENS, KNOWN)),
            strangers: Mutex::new(Cache::new(TOKENS, REFUSED)),
            rights: Mutex::new(Cache::new(RIGHTS, ALLOWED)),
        }
    }

    async fn person(&self, token: &str) -> Result<Arc<Person>, Denied> {
        if token.len() > LENGTH {
            return Err(Denied::Unknown);
        }
        let digest: Digest = Sha256::digest(token).into();
        let now = Instant::now();
        if let Some(person) = lock(&self.people).get(&digest, now) {
            return Ok(person);
        }
        if lock(&self.strangers).get(&digest, now).is_some() {
            return Err(Denied::Unknown);
        }
        let mut owner = self.reviewer.owner(token, Some(&self.rules.audience)).await.map_err(unavailable)?;
        let direct = owner.is_some();
        if !direct && self.rules.api_tokens {
            owner = self.reviewer.owner(token, None).await.map_err(unavailable)?;
        }
        // From before it was asked: what is remembered is never older than it says.
        let Some(user) = owner else {
            lock(&self.strangers).put(digest, (), now);
            return Err(Denied::Unknown);
        };
        let person = Arc::new(Person { token: digest, user, direct });
        lock(&self.people).put(digest, person.clone(), now);
        Ok(person)
    }

    async fn agent(&self, token: &str) -> Result<String, Denied> {
        let person = self.person(token).await?;
        agent(&person, &self.rules.agent).ok_or(Denied::Forbidden)
    }

    async fn look(&self, token: &str, accounts: &[String]) -> Result<Viewer, Denied> {
        let person = self.person(token).await?;
        if !self.cluster.is_complete() {
            return Err(Denied::Unavailable);
        }
        if self.may(&person, GET, None).await? {
            return Ok(Viewer { all: true, ..Viewer::default() });
        }
        let mut tried = candidates(&person.user, self.cluster.accounts());
        tried.extend(accounts.iter().filter(|account| is_name(account)).cloned());
        let seen = futures::stream::iter(tried)
            .map(|account| async {
                let may = self.may(&person, GET, Some(account.clone())).await?;
                Ok::<_, Denied>(may.then_some(account))
            })
            .buffer_unordered(AT_A_TIME)
            .try_filter_map(|account| async { Ok(account) });
        Ok(Viewer { all: false, accounts: seen.try_collect().await? })
    }

    async fn may(
        &self,
        person: &Person,
        verb: &'static str,
        account: Option<String>,
    ) -> Result<bool, Denied> {
        let (key, now) = ((person.token, verb, account), Instant::now());
        if let Some(may) = lock(&self.rights).get(&key, now) {
            return Ok(may);
        }
        let may = self.reviewer.may(&person.user, verb, key.2.as_deref()).await.map_err(unavailable)?;
        lock(&self.rights).put(key, may, now);
        Ok(may)
    }
}

impl Access for Tokens {
    fn node<'a>(&'a self, token: &'a str) -> Pending<'a, Result<String, Denied>> {
        Box::pin(self.agent(token))
    }

    fn viewer<'a>(&'a self, token: &'a str, accounts: &'a [String]) -> Pending<'a, Result<Viewer, Denied>> {
        Box::pin(self.look(token, accounts))
    }

    fn renews<'a>(&'a self, token: &'a str, account: &'a str) -> Pending<'a, Result<bool, Denied>> {
        Box::pin(async move {
            let person = self.person(token).await?;
            if !is_name(account) {
                return Ok(false);
            }
            self.may(&person, UPDATE, Some(account.into())).await
        })
    }

    fn prefixes(&self) -> Vec<Prefix> {
        self.cluster.prefixes()
    }

    fn cluster(&self) -> Option<Arc<cluster::Cluster>> {
        self.cluster.told()
    }
}

/// The node of an agent: of a pod of the agents' account, with a token that is meant for the collector.
fn agent(person: &Person, agents: &str) -> Option<String> {
    let Person { user, direct, .. } = person;
    let nodes = user.extra.as_ref()?.get(NODE)?;
    let ours = *direct && user.username.as_deref() == Some(agents);
    nodes.first().filter(|node| ours && !node.is_empty()).cloned()
}

/// Accounts that are tried for somebody: the one of their service account, then the others by name.
fn candidates(user: &UserInfo, accounts: BTreeSet<String>) -> BTreeSet<String> {
    let home = user.username.as_deref().and_then(|name| name.strip_prefix("system:serviceaccount:"));
    let home = home.and_then(|name| name.split(':').next()).map(String::from);
    let most = ACCOUNTS - usize::from(home.is_some());
    accounts.into_iter().take(most).chain(home).collect()
}

/// Whether a namespace can have this name: with an empty one the API server would be asked about all.
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(plain)
}

fn unavailable(_: Unanswered) -> Denied {
    Denied::Unavailable
}

/// Nothing is left half done in here by a thread that panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = "system:serviceaccount:aegis-system:aegis-node-agent";

    fn user(name: &str, node: Option<&str>) -> UserInfo {
        let extra = node.map(|node| [(NODE.to_owned(), vec![node.to_owned()])].into());
        UserInfo { username: Some(name.into()), extra, ..UserInfo::default() }
    }

    #[test]
    fn only_pods_of_the_agents_are_agents() {
        let of = |user: UserInfo, direct| agent(&Person { token: [0; 32], user, direct }, AGENT);
        assert_eq!(of(user(AGENT, Some("n1")), true).as_deref(), Some("n1"));
        assert_eq!(of(user(AGENT, Some("n1")), false), None, "meant for the API server");
        assert_eq!(of(user(AGENT, None), true), None, "bound to no node");
        assert_eq!(of(user(AGENT, Some("")), true), None);
        assert_eq!(of(user("system:serviceaccount:other:aegis-node-agent", Some("n1")), true), None);
    }

    #[test]
    fn a_bounded_number_of_accounts_is_tried() {
        let many: BTreeSet<String> = (0..1_000).map(|number| format!("a{number:04}")).collect();
        let tried = candidates(&user("system:serviceaccount:zoo:me", None), many.clone());
        assert_eq!(tried.len(), ACCOUNTS);
        assert!(tried.contains("zoo") && tried.contains("a0000") && !tried.contains("a0999"));
        assert_eq!(candidates(&user("jane", None), many).len(), ACCOUNTS);
    }

    #[test]
    fn names_that_mean_something_else_are_not_asked() {
        assert!(is_name("shop") && is_name("shop-1"));
        for other in ["", "*", "a.b", "A", "a/b", "a\0", &"a".repeat(64)] {
            assert!(!is_name(other), "{other:?}");
        }
    }
}
