//! What a node's agent is asked: its own program is run a second time in its container, and answers in JSON.

use super::Cluster;
use crate::state::{AGENT, State, is_part};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, AttachParams};
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;

/// Longest time that an agent may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer.
const MOST: u64 = 4 << 20;
/// Agents that are asked at a time.
const AT_A_TIME: usize = 16;

/// A node with the pod of its agent.
#[derive(Clone, Copy)]
pub struct Agent<'a> {
    /// The node.
    pub node: &'a str,
    pod: &'a Pod,
}

impl<'a> Agent<'a> {
    /// Those of all nodes, by name.
    pub fn all(state: &'a State) -> Vec<Agent<'a>> {
        let agents = state.system.iter().filter(|pod| is_part(pod, AGENT));
        let mut agents: Vec<Agent<'a>> = agents
            .filter_map(|pod| Some(Agent { node: pod.spec.as_ref()?.node_name.as_deref()?, pod }))
            .collect();
        agents.sort_by_key(|agent| agent.node);
        agents
    }

    /// That of a node, or all.
    ///
    /// # Errors
    /// There is none, as far as anybody may see.
    pub fn of_node_or_all(state: &'a State, node: Option<&str>) -> Result<Vec<Agent<'a>>> {
        if let Some(node) = node {
            return Ok(vec![Agent::of(state, node)?]);
        }
        let all = Agent::all(state);
        ensure!(
            !all.is_empty(),
            "there is no pod of an agent, or pods of the system namespace may not be listed: see --system-namespace"
        );
        Ok(all)
    }

    /// That of a node.
    pub fn of(state: &'a State, node: &str) -> Result<Agent<'a>> {
        Agent::all(state).into_iter().find(|agent| agent.node == node).with_context(|| {
            format!(
                "there is no pod of an agent on node {node}, or pods of the system namespace may not be listed"
            )
        })
    }

    fn pin_root(&self) -> &str {
        let containers = self.pod.spec.iter().flat_map(|spec| &spec.containers);
        let mut arguments = containers.flat_map(|it| it.args.iter().flatten());
        arguments.find_map(|it| it.strip_prefix("--pin-root=")).unwrap_or("/sys/fs/bpf/aegis")
    }
}

impl Cluster {
    /// An agent's answer. `question` is what its program takes as arguments.
    pub async fn ask<T: DeserializeOwned>(&self, agent: Agent<'_>, question: &[String]) -> Result<T> {
        let root = format!("--pin-root={}", agent.pin_root());
        // Wherever the image has it.
        let mut command = vec!["/proc/1/exe".to_owned()];
        command.extend(question.iter().cloned());
        command.push(root);
        let answer = tokio::time::timeout(PATIENCE, self.run(&agent.pod.name_any(), command)).await;
        let node = agent.node;
        let (output, errors) =
            answer.with_context(|| format!("the agent of node {node} does not answer"))??;
        let told = serde_json::from_str(&output);
        told.with_context(|| format!("the agent of node {node} does not tell that: {}", errors.trim()))
    }

    /// The answers of several, in their order.
    ///
    /// # Errors
    /// There is no answer at all.
    pub async fn ask_all<T>(&self, agents: &[Agent<'_>], question: &[String]) -> Result<Vec<Result<T>>>
    where
        T: DeserializeOwned + Send + 'static,
    {
        let mut answers = Vec::new();
        for agents in agents.chunks(AT_A_TIME) {
            let mut asked = JoinSet::new();
            for (at, agent) in agents.iter().enumerate() {
                let (cluster, node, pod) = (self.clone(), agent.node.to_owned(), agent.pod.clone());
                let question = question.to_vec();
                asked.spawn(async move {
                    let agent = Agent { node: &node, pod: &pod };
                    (at, cluster.ask(agent, &question).await)
                });
            }
            let mut told = asked.join_all().await;
            told.sort_by_key(|(at, _)| *at);
            answers.extend(told.into_iter().map(|(_, answer)| answer));
        }
        if answers.iter().all(Result::is_err)
            && let Some(Err(error)) = answers.pop()
        {
            return Err(error);
        }
        Ok(answers)
    }

    async fn run(&self, pod: &str, command: Vec<String>) -> Result<(String, String)> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.system);
        let parameters = AttachParams::default().container("agent").stdout(true).stderr(true);
        let mut process = api.exec(pod, command, &parameters).await?;
        let (mut output, mut errors) = (String::new(), String::new());
        let (stdout, stderr) = (process.stdout(), process.stderr());
        let read_output = async {
            if let Some(stdout) = stdout {
                stdout.take(MOST).read_to_string(&mut output).await?;
            }
            std::io::Result::Ok(())
        };
        let read_errors = async {
            if let Some(stderr) = stderr {
                stderr.take(MOST).read_to_string(&mut errors).await?;
            }
            std::io::Result::Ok(())
        };
        tokio::try_join!(read_output, read_errors)?;
        process.join().await?;
        Ok((output, errors))
    }
}
