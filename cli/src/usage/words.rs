//! What may be asked, as people say it and as the collector's schema does.

use serde_json::{Value, json};

/// What is told apart.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dimension {
    /// Account: a namespace.
    Account,
    /// Allocation of the account.
    Allocation,
    /// Egress address.
    Address,
    /// Address and port that the traffic goes to.
    Origin,
    /// Transport protocol.
    Protocol,
    /// Rule that covers the traffic.
    Rule,
    /// Site of the allocation.
    Site,
    /// Node.
    Node,
    /// Pod.
    Pod,
    /// Why flows were refused.
    Reason,
}

impl Dimension {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Dimension::Account => "account",
            Dimension::Allocation => "allocation",
            Dimension::Address => "address",
            Dimension::Origin => "origin",
            Dimension::Protocol => "protocol",
            Dimension::Rule => "rule",
            Dimension::Site => "site",
            Dimension::Node => "node",
            Dimension::Pod => "pod",
            Dimension::Reason => "reason",
        }
    }

    /// As in the schema.
    pub fn schema(self) -> String {
        self.name().to_uppercase()
    }
}

/// What is measured.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// The most ports in use at any moment; of several series their sum, which the truth does not exceed.
    Peak,
    /// Ports in use, on average over the time in which there were some.
    InUse,
    /// The most ports in use at the end of ten seconds, with the same reservation as the peak.
    InUseMax,
    /// Ports in use that 95 % of the time do not exceed.
    InUseP95,
    /// Flows that began.
    Flows,
    /// Flows that were refused.
    Refused,
    /// Packets to the origin.
    SentPackets,
    /// Bytes to the origin.
    Sent,
    /// Packets from the origin.
    ReceivedPackets,
    /// Bytes from the origin.
    Received,
}

impl Figure {
    /// Those of a table.
    pub const FEW: [Figure; 6] =
        [Figure::Peak, Figure::InUse, Figure::Flows, Figure::Refused, Figure::Sent, Figure::Received];

    /// Those of all other forms. The one that costs a sort is asked for by name only.
    pub const MANY: [Figure; 9] = [
        Figure::Peak,
        Figure::InUse,
        Figure::InUseMax,
        Figure::Flows,
        Figure::Refused,
        Figure::SentPackets,
        Figure::Sent,
        Figure::ReceivedPackets,
        Figure::Received,
    ];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Figure::Peak => "peak",
            Figure::InUse => "inUse",
            Figure::InUseMax => "inUseMax",
            Figure::InUseP95 => "inUseP95",
            Figure::Flows => "flows",
            Figure::Refused => "refused",
            Figure::SentPackets => "sentPackets",
            Figure::Sent => "sentBytes",
            Figure::ReceivedPackets => "receivedPackets",
            Figure::Received => "receivedBytes",
        }
    }

    /// Over its column.
    pub fn head(self) -> &'static str {
        match self {
            Figure::Peak => "PEAK",
            Figure::InUse => "IN USE",
            Figure::InUseMax => "IN USE MAX",
            Figure::InUseP95 => "IN USE P95",
            Figure::Flows => "FLOWS",
            Figure::Refused => "REFUSED",
            Figure::SentPackets => "PACKETS SENT",
            Figure::Sent => "SENT",
            Figure::ReceivedPackets => "PACKETS RECEIVED",
            Figure::Received => "RECEIVED",
        }
    }

    /// As in the schema.
    pub fn schema(self) -> Value {
        let (measure, aggregation) = match self {
            Figure::Peak => ("PEAK", "MAX"),
            Figure::InUse => ("IN_USE", "AVG"),
            Figure::InUseMax => ("IN_USE_MAX", "MAX"),
            Figure::InUseP95 => {
                return json!({"measure": "IN_USE", "aggregation": "QUANTILE", "thousandths": 950});
            }
            Figure::Flows => ("FLOWS", "SUM"),
            Figure::Refused => ("REFUSED", "SUM"),
            Figure::SentPackets => ("SENT_PACKETS", "SUM"),
            Figure::Sent => ("SENT_BYTES", "SUM"),
            Figure::ReceivedPackets => ("RECEIVED_PACKETS", "SUM"),
            Figure::Received => ("RECEIVED_BYTES", "SUM"),
        };
        json!({"measure": measure, "aggregation": aggregation})
    }
}

/// What comes first. A mean cannot order what comes in pages.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// The fullest, and of those of which that is not known the highest peak.
    #[default]
    Fill,
    /// The highest peak.
    Peak,
    /// The most flows.
    Flows,
    /// The most refusals.
    Refused,
    /// The most bytes to the origin.
    Sent,
    /// The most bytes from the origin.
    Received,
}

impl Sort {
    /// By which the collector sorts.
    pub fn figure(self) -> Figure {
        match self {
            Sort::Fill | Sort::Peak => Figure::Peak,
            Sort::Flows => Figure::Flows,
            Sort::Refused => Figure::Refused,
            Sort::Sent => Figure::Sent,
            Sort::Received => Figure::Received,
        }
    }
}

/// Transport protocol.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo.
    Icmp,
    /// Any other.
    Other,
}

impl Protocol {
    /// As in the schema.
    pub fn schema(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Icmp => "ICMP",
            Protocol::Other => "OTHER",
        }
    }
}

/// Detail of the figures.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// 10 seconds.
    Tens,
    /// One minute, which is there 80 seconds after its begin.
    Minutes,
    /// One hour, which is there soon after its end.
    Hours,
}

impl Level {
    /// As in the schema.
    pub fn schema(self) -> &'static str {
        match self {
            Level::Tens => "TENS",
            Level::Minutes => "MINUTES",
            Level::Hours => "HOURS",
        }
    }

    /// From the schema.
    pub fn parse(text: &str) -> Option<Level> {
        [Level::Tens, Level::Minutes, Level::Hours].into_iter().find(|it| it.schema() == text)
    }

    /// Length of a slot in seconds.
    pub fn resolution(self) -> i64 {
        match self {
            Level::Tens => 10,
            Level::Minutes => 60,
            Level::Hours => 3_600,
        }
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Level::Tens => "10 seconds",
            Level::Minutes => "minutes",
            Level::Hours => "hours",
        }
    }
}
