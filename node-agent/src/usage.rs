//! Reports of use: what is counted goes in, and to the collector by itself.

use crate::args::Args;
use aegis_delivery::{Boot, Bounds, Delivery, Reporter, Settings, Timing, Wait, now};
use std::io;
use std::sync::Arc;

/// Bytes of reports that are kept in memory while the disk takes none.
const MEMORY: u64 = 4 << 20;

/// Starts to deliver what waits from before and what the reporter is given; None where the agent does not report. On a thread of its own: a disk
/// that hangs must not hold up the data plane.
///
/// # Errors
/// There is no thread for it.
pub fn start(args: &Args) -> io::Result<Option<Reporter>> {
    let Some(settings) = settings(args) else { return Ok(None) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let boot = Boot::now();
    tracing::info!(%boot, folder = %settings.folder.display(), "use is reported");
    let (reporter, delivery) = Delivery::new(settings, boot, Arc::new(now));
    let run = move || runtime.block_on(delivery.run());
    std::thread::Builder::new().name("usage".to_owned()).spawn(run)?;
    Ok(Some(reporter))
}

fn settings(args: &Args) -> Option<Settings> {
    Some(Settings {
        node: args.node_name.clone(),
        collector: args.usage_collector.clone()?,
        token: args.usage_token.clone(),
        authority: args.usage_ca.clone(),
        folder: args.usage_backlog.clone(),
        bounds: Bounds {
            disk: args.usage_backlog_size,
            memory: MEMORY,
            age: args.usage_backlog_hours * 3_600,
        },
        timing: Timing::default(),
        wait: Wait::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn agents_report_where_they_are_told_to() {
        let args = |more: &[&str]| Args::parse_from([&["x", "--node-name=n1"], more].concat());
        assert!(settings(&args(&[])).is_none());
        let url = "--usage-collector=https://host";
        let all = settings(&args(&[url, "--usage-backlog-size=2Mi", "--usage-backlog-hours=3"]));
        let all = all.expect("settings");
        assert_eq!(all.bounds, Bounds { disk: 2 << 20, memory: MEMORY, age: 10_800 });
        assert_eq!(all.node, "n1");
    }

    #[test]
    fn metrics_say_what_is_lost_where_reports_are_made() {
        let metrics = crate::metrics::Metrics::default();
        assert!(!metrics.encode().unwrap().contains("aegis_usage_"), "nobody reports");
        let args = Args::parse_from(["x", "--node-name=n1", "--usage-collector=https://host"]);
        let (reporter, _delivery) = Delivery::new(settings(&args).unwrap(), Boot::new(1, 1), Arc::new(now));
        // It ends before it begins.
        reporter.report(Vec::new(), 20, 10);
        metrics.follow_usage(move || reporter.counters());
        let text = metrics.encode().unwrap();
        for line in [
            "aegis_usage_reports_lost_total{reason=\"invalid\"} 1\n",
            "aegis_usage_reports_lost_total{reason=\"full\"} 0\n",
            "aegis_usage_deliveries_total{result=\"taken\"} 0\n",
            "aegis_usage_reports_delivered_total 0\n",
        ] {
            assert!(text.contains(line), "{line} {text}");
        }
        assert!(!text.contains("aegis_usage_delivered_seconds"), "never so far: {text}");
    }
}
