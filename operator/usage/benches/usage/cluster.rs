//! A cluster that reports: some nodes, with as many origins each, of 20 accounts with an address each.

use crate::support::T0;
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION, Volume};
use std::net::Ipv4Addr;

/// Accounts, and addresses.
pub const ACCOUNTS: u64 = 20;

#[derive(Clone, Copy)]
pub struct Cluster {
    pub nodes: u64,
    pub origins: u64,
}

impl Cluster {
    /// Rows of all nodes in a slot.
    pub fn rows(self) -> u64 {
        self.nodes * self.origins
    }

    /// What all nodes report in a slot.
    pub fn reports(self, slot: u64) -> impl Iterator<Item = Report> {
        (0..self.nodes).map(move |node| self.report(node, slot))
    }

    fn report(self, node: u64, slot: u64) -> Report {
        let row = |origin| Row { key: key(node, origin), figures: Figures::default() };
        let mut report = Report {
            version: VERSION,
            node: format!("node-{node}"),
            boot: "b".into(),
            sequence: 0,
            from: 0,
            to: 0,
            rows: (0..self.origins).map(row).collect(),
        };
        tell(&mut report, node, slot);
        report
    }
}

/// Makes of a node's report that of another slot.
pub fn tell(report: &mut Report, node: u64, slot: u64) {
    report.sequence = slot;
    report.from = T0 + 10 * slot as i64;
    report.to = report.from + 10;
    for (origin, row) in (0..).zip(&mut report.rows) {
        let in_use = (origin * 7 + slot * 13 + node) % 2_000;
        let volume = Volume { packets: in_use * 12, bytes: in_use * 9_000 };
        row.figures = Figures {
            in_use,
            peak: in_use + 20,
            flows: in_use / 3,
            sent: volume,
            received: volume,
            ..Figures::default()
        };
    }
}

/// The address of an account.
pub fn address(account: u64) -> Ipv4Addr {
    [192, 0, 2, account as u8].into()
}

fn key(node: u64, origin: u64) -> Key {
    let account = origin % ACCOUNTS;
    Key {
        address: Some(address(account).into()),
        origin: Some(([198, 51, (origin >> 8) as u8, origin as u8], 443).into()),
        protocol: Protocol::Tcp,
        rule: "binding/partner".into(),
        account: format!("account-{account}"),
        allocation: "partner".into(),
        site: format!("site-{}", node % 3),
        pod: String::new(),
    }
}
