//! What is read may be old: copies of different kinds are of different moments.

use super::state::*;

/// What somebody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Current,
    Behind,
}

/// What an operator's snapshot is made of: copies of different kinds are of different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    pub object: View,
    pub nodes: View,
    pub reports: View,
    pub leases: View,
}

/// Kinds of objects, each of which lags by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Object,
    Nodes,
    Reports,
    Leases,
}

impl View {
    pub fn of(self, state: &State) -> &Server {
        match self {
            View::Current => &state.server,
            View::Behind => &state.behind,
        }
    }

    /// The views that differ.
    pub fn both(differ: bool) -> &'static [View] {
        if differ { &[View::Current, View::Behind] } else { &[View::Current] }
    }
}

impl Views {
    pub const CURRENT: Views =
        Views { object: View::Current, nodes: View::Current, reports: View::Current, leases: View::Current };
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Object, Kind::Nodes, Kind::Reports, Kind::Leases];

    pub fn lags(self, state: &State) -> bool {
        let (server, behind) = (&state.server, &state.behind);
        match self {
            Kind::Object => server.object != behind.object,
            Kind::Nodes => server.nodes != behind.nodes,
            Kind::Reports => server.reports != behind.reports,
            Kind::Leases => server.leases != behind.leases,
        }
    }

    pub fn catch_up(self, state: &mut State) {
        match self {
            Kind::Object => state.behind.object = state.server.object,
            Kind::Nodes => state.behind.nodes = state.server.nodes,
            Kind::Reports => state.behind.reports = state.server.reports,
            Kind::Leases => state.behind.leases = state.server.leases,
        }
    }
}
