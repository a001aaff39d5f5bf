//! Alerts in the page: of a store that has looked at the use of some accounts.

use crate::support::T0;
use crate::support::alerts::{account, full};
use crate::support::objects::{NASTY, cluster};
use crate::world::{NOW, World};
use crate::{lines, signed};
use aegis_browser::Page;
use aegis_usage::alert::{PortUse, Rule};

/// What exceeds the limits of alerts, and what asks for attention besides.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_shown_where_there_are_some() {
    let (world, mut page) = (World::start().await, Page::open().await);
    signed(&world, &mut page, "account-x", "#/alerts").await;
    page.until("document.getElementById('alerts').textContent.startsWith('None')").await;
    let bad = lines(&mut page, "#conditions tbody tr").await;
    assert!(bad.len() == 1 && bad[0].starts_with("partnerx◆ CapacityLow: AboveTarget"), "{bad:?}");
    drop(world);
    // 80 percent of 1,000 ports, which n1 alone has; n4 is silent at the end. One has to last for longer than it does.
    let patient = Rule {
        name: "patient".into(),
        uid: "2".into(),
        port_use: Some(PortUse { wait: 86_400, ..full().port_use.unwrap() }),
        ..full()
    };
    let named = |name: &str| Rule { name: name.into(), ..full() };
    let accounts = [
        account("x", vec![named("nearly-full"), patient], &["n1", "n2", "n4", NASTY]),
        account("y", vec![named("of-y")], &["y-node"]),
    ];
    let world = World::of(Some(cluster()), &accounts).await;
    signed(&world, &mut page, "account-x", "#/alerts").await;
    page.until("document.querySelectorAll('#alerts tbody tr').length === 2").await;
    let told = lines(&mut page, "#alerts tbody tr").await;
    let stored = world.stored("198.51.100.1:443", (T0, NOW), 10, "");
    let (now, most) = (stored[&(NOW - 10)], stored.values().copied().fold(0.0, f64::max));
    let ports = |ports: f64| {
        let ports = ports as i64;
        if ports < 1_000 { ports.to_string() } else { format!("{},{:03}", ports / 1_000, ports % 1_000) }
    };
    let silent = "▲ 1 node silent: it may be more, and is not cleared";
    let rest = format!(
        "since 2023-11-14 23:00:00port use192.0.2.1 to 198.51.100.1:443 tcp{} now, {} at the most",
        ports(now),
        ports(most)
    );
    let raised = format!("nearly-fullx / partner▲ raised at 2023-11-14 23:00:30{silent}{rest}");
    assert_eq!(told, [raised, format!("patientx / partner◆ not raised yet{silent}{rest}")]);
    page.picture("alerts").await;
    // Who sees everything sees all of them.
    signed(&world, &mut page, "admin", "#/alerts").await;
    page.until("document.querySelectorAll('#alerts tbody tr').length === 3").await;
    // Both worlds have a port of their own.
    assert_eq!(page.wrongs("http://127.0.0.1:", "").await, [""; 0]);
}
