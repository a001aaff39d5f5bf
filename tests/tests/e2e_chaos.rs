//! A short run of what `make chaos` does for as long as one likes.

use aegis_tests::chaos::{self, Options};
use aegis_tests::cluster::Cluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flows_of_living_nodes_survive_everything() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let report = chaos::run(lab, Options { seconds: 90, seed: 4 }).await?;
    print!("{}", report.text());
    chaos::judge(&report)
}
