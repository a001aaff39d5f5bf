//! What the collector tells is what happened: flows and ports exactly, bytes as the router between the nodes and the origin counts
//! them. Also while an agent dies, the collector is away, clocks jump (where `AEGIS_CLOCK` allows it), and a node is gone. Prometheus, `kubectl aegis usage` and `top`, and the page tell the
//! same.

mod clock;
mod page;
mod told;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use aegis_tests::cluster::{Cluster, Origin, PATIENCE, explained, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, NAMESPACE};
use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::account::Account;
use crate::agents;
use crate::autoscaler::kubectl;
use crate::inside::Inside;

/// The collector, as its certificate names it.
const HOST: &str = "aegis-collector.aegis-system.svc";
/// Connections of each node to the first port of the origin, more by one for each further node, and to the second.
const CONNECTIONS: [usize; 2] = [100, 5];
/// Seconds for which the collector is away, unless `AEGIS_AWAY` says otherwise.
const AWAY: u64 = 25;
/// The node that goes. The collector's volume is on the first.
const GONE: Node = NODES[2];

/// Asks the collector as an account.
struct Reader<'a> {
    cluster: &'a Cluster,
    lab: &'a Lab,
    token: String,
    authority: PathBuf,
    address: String,
    /// Up to when anything may have been told: clocks may have been ahead.
    latest: Cell<i64>,
}

impl<'a> Reader<'a> {
    fn new(cluster: &'a Cluster, lab: &'a Lab, account: &str) -> anyhow::Result<Self> {
        let own = ["--namespace", account];
        let kubectl = |more: &[&str]| kubectl(lab, &[&own, more].concat());
        kubectl(&["create", "serviceaccount", "reader"])?;
        let subject = format!("--serviceaccount={account}:reader");
        kubectl(&["create", "rolebinding", "reader", "--clusterrole=aegis-viewer", &subject])?;
        let token = kubectl(&["create", "token", "reader", "--audience=aegis-collector"])?.trim().to_owned();
        let of_chart = |more: &[&str]| self::kubectl(lab, &[&["--namespace", NAMESPACE], more].concat());
        let secret = of_chart(&["get", "secret", "aegis-collector-tls", "-o", "json"])?;
        let secret: k8s_openapi::api::core::v1::Secret = serde_json::from_str(&secret)?;
        let authority = std::env::temp_dir().join(format!("{account}-ca.crt"));
        std::fs::write(&authority, &secret.data.context("no data")?.get("ca.crt").context("no ca.crt")?.0)?;
        let address = of_chart(&["get", "service", "aegis-collector", "-o", "jsonpath={.spec.clusterIP}"])?;
        Ok(Self { cluster, lab, token, authority, address, latest: Cell::new(0) })
    }

    fn ask(&self, question: &str) -> anyhow::Result<Value> {
        let answer = self.lab.exec(
            NODES[0],
            "curl",
            &[
                "--silent",
                "--show-error",
                "--max-time",
                "20",
                "--cacert",
                &self.authority.display().to_string(),
                "--connect-to",
                &format!("{HOST}:443:{}:443", self.address),
                "--header",
                &format!("Authorization: Bearer {}", self.token),
                "--json",
                &json!({ "query": question }).to_string(),
                &format!("https://{HOST}/v1/graphql"),
            ],
        )?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| format!("answer {answer:?}"))?;
        ensure!(answer.get("errors").is_none(), "{question}: {answer}");
        Ok(answer["data"].clone())
    }

    /// Figures by what is told apart, since a moment.
    fn usage(&self, since: i64, by: &str) -> anyhow::Result<BTreeMap<Vec<String>, Used>> {
        let to = jiff::Timestamp::now().as_second() / 10 * 10 + 10;
        self.latest.set(self.latest.get().max(to));
        // Ports in use are those of the last slots: some agent may not have told of the last one yet.
        let recent = (to - 40).max(since);
        let at = |second: i64| jiff::Timestamp::from_second(second).map(|it| it.to_string());
        let (since, recent, to, latest) = (at(since)?, at(recent)?, at(to)?, at(self.latest.get())?);
        let sum = |measure: &str| format!("{{measure: {measure}, aggregation: SUM}}");
        let sums =
            ["FLOWS", "SENT_PACKETS", "SENT_BYTES", "RECEIVED_PACKETS", "RECEIVED_BYTES", "REFUSED"].map(sum);
        let data = self.ask(&format!(
            "{{ all: usage(from: \"{since}\", to: \"{latest}\", level: TENS, by: {by}, figures: [{}]) {{ nodes {{ by figures }} }} \
               now: usage(from: \"{recent}\", to: \"{to}\", level: TENS, by: {by}, \
                          figures: [{{measure: IN_USE, aggregation: MAX}}, {{measure: PEAK, aggregation: MAX}}]) \
                    {{ nodes {{ by figures }} }} }}",
            sums.join(", ")
        ))?;
        let rows = |name: &str| -> anyhow::Result<BTreeMap<Vec<String>, Vec<f64>>> {
            let nodes = data[name]["nodes"].as_array().context("no nodes")?;
            let row = |row: &Value| {
                Ok((
                    serde_json::from_value(row["by"].clone())?,
                    serde_json::from_value(row["figures"].clone())?,
                ))
            };
            nodes.iter().map(row).collect()
        };
        let now = rows("now")?;
        let used = |(by, sums): (Vec<String>, Vec<f64>)| {
            let [flows, sent_packets, sent, received_packets, received, refused] = sums[..] else {
                anyhow::bail!("{sums:?}")
            };
            let (in_use, peak) = now.get(&by).map_or((0.0, 0.0), |it| (it[0], it[1]));
            Ok((
                by,
                Used {
                    in_use,
                    peak,
                    flows,
                    refused,
                    sent: (sent_packets, sent),
                    received: (received_packets, received),
                },
            ))
        };
        rows("all")?.into_iter().map(used).collect()
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.authority);
    }
}

/// What was used.
#[derive(Clone, Debug, Default, PartialEq)]
struct Used {
    in_use: f64,
    peak: f64,
    flows: f64,
    refused: f64,
    /// Packets and bytes.
    sent: (f64, f64),
    received: (f64, f64),
}

/// Counts on the router what an egress address and an origin send each other.
struct Counted<'a> {
    lab: &'a Lab,
    table: String,
}

impl<'a> Counted<'a> {
    fn start(lab: &'a Lab, account: &Account, origin: &Origin) -> anyhow::Result<Self> {
        let table = account.namespace.name().replace('-', "_");
        let (egress, host) = (account.address, origin.address());
        let port = |index| origin.port(index).port();
        let rules = [0, 1].map(|index| {
            format!(
                "ip saddr {egress} ip daddr {host} tcp dport {0} counter name sent{index}\n\
                 ip saddr {host} ip daddr {egress} tcp sport {0} counter name received{index}\n",
                port(index)
            )
        });
        let counters = ["sent0", "sent1", "received0", "received1"];
        let counters = counters.map(|name| format!("counter {name} {{ packets 0 bytes 0\n }}\n")).concat();
        let script = format!(
            "table ip {table} {{\n{counters}chain forward {{\ntype filter hook forward priority 0;\n{}}}\n}}",
            rules.concat()
        );
        let counted = Self { lab, table };
        counted.nft(&[&script])?;
        Ok(counted)
    }

    fn nft(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.lab.command_in("router", "nft").args(arguments).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Packets and bytes by the counter's name.
    fn read(&self) -> anyhow::Result<BTreeMap<String, (f64, f64)>> {
        let listed: Value =
            serde_json::from_str(&self.nft(&["-j", "list", "counters", "table", "ip", &self.table])?)?;
        let counters = listed["nftables"].as_array().into_iter().flatten().filter_map(|it| it.get("counter"));
        let number = |it: &Value| it.as_f64().unwrap_or_default();
        Ok(counters
            .filter_map(|it| {
                Some((it["name"].as_str()?.to_owned(), (number(&it["packets"]), number(&it["bytes"]))))
            })
            .collect())
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let _ = self.nft(&["delete", "table", "ip", &self.table]);
    }
}

/// Opens the connections of each node, and a few that are refused nothing.
async fn load(pods: &[Inside], origin: &Origin) -> anyhow::Result<()> {
    for (more, pod) in pods.iter().enumerate() {
        pod.open("first", origin.port(0), CONNECTIONS[0] + more).await?;
        pod.open("second", origin.port(1), CONNECTIONS[1]).await?;
    }
    Ok(())
}

async fn exchange(pods: &[Inside]) -> anyhow::Result<()> {
    for (more, pod) in pods.iter().enumerate() {
        pod.exchange("first", CONNECTIONS[0] + more).await?;
        pod.exchange("second", CONNECTIONS[1]).await?;
    }
    Ok(())
}

/// Connections to a port of the origin from so many of the nodes.
fn connections(index: u16, nodes: usize) -> usize {
    (0..nodes).map(|more| CONNECTIONS[usize::from(index)] + if index == 0 { more } else { 0 }).sum()
}

/// Connections to each port of the origin, from all nodes.
#[derive(Clone, Copy, Debug)]
struct Made {
    /// Those that live.
    live: [usize; 2],
    /// All that there were.
    all: [usize; 2],
}

impl Made {
    /// By [`load`].
    fn by_load() -> Made {
        let all = [0, 1].map(|index| connections(index, NODES.len()));
        Made { live: all, all }
    }

    /// Lets a pod open some more.
    async fn more(
        &mut self,
        pod: &Inside,
        group: &str,
        origin: &Origin,
        index: u16,
        count: usize,
    ) -> anyhow::Result<()> {
        pod.open(group, origin.port(index), count).await?;
        let index = usize::from(index);
        (self.live[index], self.all[index]) = (self.live[index] + count, self.all[index] + count);
        Ok(())
    }
}

/// Waits until the collector tells what the router counts, with the flows that there were and the ports that are in use.
async fn agrees(
    what: &str,
    reader: &Reader<'_>,
    since: i64,
    counted: &Counted<'_>,
    origin: &Origin,
    made: &Made,
) -> anyhow::Result<()> {
    let mut last = String::new();
    let all = wait_for(what, 2 * PATIENCE, async || {
        let wire = counted.read()?;
        let mut usage = match reader.usage(since, "[ORIGIN]") {
            Ok(usage) => usage,
            // The collector may just be coming back.
            Err(error) => {
                last = format!("{error:#}");
                return Ok(None);
            }
        };
        let expected: BTreeMap<Vec<String>, Used> = (0..2u16)
            .map(|index| {
                let at = usize::from(index);
                let (in_use, flows) = (made.live[at] as f64, made.all[at] as f64);
                let of = |name: &str| wire.get(&format!("{name}{index}")).copied().unwrap_or_default();
                let (sent, received) = (of("sent"), of("received"));
                let used = Used { in_use, peak: in_use, flows, refused: 0.0, sent, received };
                (vec![origin.port(index).to_string()], used)
            })
            .collect();
        last = format!("told {usage:#?}, happened {expected:#?}");
        // Of the last slots one may be from before some ended.
        for used in usage.values_mut().filter(|it| (it.in_use..=it.flows).contains(&it.peak)) {
            used.peak = used.in_use;
        }
        Ok((usage == expected).then_some(()))
    });
    let all = all.await;
    explained(reader.cluster, &[], all).await.with_context(|| last)
}

/// What is told while a node is gone.
async fn without(
    lab: &Lab,
    reader: &Reader<'_>,
    since: i64,
    counted: &Counted<'_>,
    origin: &Origin,
    others: &[Inside],
    made: &Made,
) -> anyhow::Result<()> {
    let hops: Vec<_> = NODES.into_iter().filter(|node| *node != GONE).collect();
    lab.spread(&hops)?;
    exchange(others).await?;
    let lost = [0, 1].map(|index| connections(index, NODES.len()) - connections(index, others.len()));
    let left = Made { live: [made.live[0] - lost[0], made.live[1] - lost[1]], ..*made };
    agrees("the figures without a node", reader, since, counted, origin, &left).await?;
    let by_node = reader.usage(since, "[NODE]")?;
    let flows = lost[0] + lost[1];
    let told = by_node.get(&[GONE.name()][..]).context("nothing is told of the node that is gone")?;
    ensure!((told.flows, told.in_use) == (flows as f64, 0.0), "{told:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_told_of_use_is_what_happened() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "usage", 2).await?;
    account.bind_and_wait().await?;
    let name = account.namespace.name().to_owned();
    let reader = Reader::new(&cluster, lab, &name)?;
    let origin = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("load").await?;
    let counted = Counted::start(lab, &account, &origin)?;
    let since = jiff::Timestamp::now().as_second() / 10 * 10 - 10;
    load(&pods, &origin).await?;
    exchange(&pods).await?;
    let mut made = Made::by_load();
    agrees("the figures of a load", &reader, since, &counted, &origin, &made).await?;
    // Each node tells of its own.
    let by_node = reader.usage(since, "[NODE, ORIGIN, ADDRESS, RULE, ALLOCATION, PROTOCOL]")?;
    for (more, node) in NODES.iter().enumerate() {
        let row = [
            node.name(),
            origin.port(0).to_string(),
            account.address.to_string(),
            "binding/partners".into(),
            "partners".into(),
            "tcp".into(),
        ];
        let used = by_node.get(&row[..]).with_context(|| format!("no {row:?} in {by_node:?}"))?;
        let ports = (CONNECTIONS[0] + more) as f64;
        ensure!((used.in_use, used.flows) == (ports, ports), "{row:?}: {used:?}");
    }
    told::to_prometheus(&cluster, &account).await?;
    told::to_people(lab, &name, since, &counted, &origin).await?;
    told::to_those_who_look(&account).await?;
    page::shows(&account, &reader.token, &origin).await?;

    // An agent dies; what its node does meanwhile is told by the next.
    let killed = lab.kill_agent(NODES[0])?;
    made.more(&pods[0], "without an agent", &origin, 1, 7).await?;
    exchange(&pods).await?;
    agents::back(&cluster, lab, NODES[0], &[killed]).await?;
    exchange(&pods).await?;
    agrees("the figures after an agent's death", &reader, since, &counted, &origin, &made).await?;

    // Nobody takes reports for a while.
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        kubectl(lab, &["--namespace", NAMESPACE, "scale", "deployment/aegis-collector", &replicas])
    };
    scale("0")?;
    let away = std::env::var("AEGIS_AWAY").ok().and_then(|it| it.parse().ok()).unwrap_or(AWAY);
    made.more(&pods[1], "without a collector", &origin, 0, 4).await?;
    for _ in 0..away / 5 {
        exchange(&pods).await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    scale("1")?;
    agrees("the figures of the time without a collector", &reader, since, &counted, &origin, &made).await?;

    // The clocks of all nodes jump, and jump back.
    if let Some(ahead) = clock::Ahead::if_allowed()? {
        made.more(&pods[1], "with clocks ahead", &origin, 1, 3).await?;
        exchange(&pods).await?;
        agrees("the figures with clocks ahead", &reader, since, &counted, &origin, &made).await?;
        drop(ahead);
        made.more(&pods[0], "with clocks set back", &origin, 0, 2).await?;
        exchange(&pods).await?;
        agrees("the figures with clocks set back", &reader, since, &counted, &origin, &made).await?;
    }

    // Some end, and a node is gone: what it has told stays told, and its ports are no longer in use.
    pods[0].call(json!({"do": "close", "name": "without an agent"})).await?;
    made.live[1] -= 7;
    lab.remove_node(GONE).await?;
    let others = &pods[..NODES.len() - 1];
    let result = without(lab, &reader, since, &counted, &origin, others, &made).await;
    lab.add_node(GONE).await?;
    result?;
    agents::back(&cluster, lab, GONE, &[]).await?;
    lab.spread(&NODES)?;
    account.end().await
}
