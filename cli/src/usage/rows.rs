//! From what the collector says to rows.

use super::coverage::Known;
use super::question::Question;
use super::told::{Address, Line};
use super::words::{Dimension, Figure, Sort};
use std::collections::{BTreeMap, BTreeSet};

/// Ports of a slice.
const SLICE: u64 = 256;

/// What a group did in the window, or in a step of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Values of what is told apart.
    pub group: Vec<String>,
    /// Begin of the step, where time is told apart.
    pub at: Option<i64>,
    /// Slots of the level in which it was seen.
    pub slots: u64,
    /// Figures, in the order in which they were asked. None: not known.
    pub figures: Option<Vec<f64>>,
    /// Why flows were refused, and how many.
    pub refused_by: BTreeMap<String, u64>,
    /// Ports that there are for what is told apart, as of now.
    pub ports: Option<u64>,
    /// What is known of the step.
    pub known: Option<Known>,
}

impl Row {
    fn of(line: &Line, at: Option<i64>) -> Row {
        Row {
            group: line.by.clone(),
            at,
            slots: line.slots,
            figures: Some(line.figures.clone()),
            refused_by: BTreeMap::new(),
            ports: None,
            known: None,
        }
    }

    /// A figure.
    pub fn figure(&self, question: &Question, figure: Figure) -> Option<f64> {
        let place = question.figures.iter().position(|it| *it == figure)?;
        self.figures.as_ref()?.get(place).copied()
    }

    /// The peak in percent of the ports that there are.
    pub fn fill(&self, question: &Question) -> Option<f64> {
        let ports = self.ports.filter(|it| *it > 0)?;
        Some(self.figure(question, Figure::Peak)? * 100.0 / ports as f64)
    }
}

/// The groups, those first that are asked for first, and how many of them are left out.
pub fn groups(question: &Question, lines: &[Line], addresses: &[Address]) -> (Vec<Row>, usize) {
    let by_address = by_address(addresses);
    let mut rows: Vec<Row> = lines.iter().map(|line| Row::of(line, None)).collect();
    for row in &mut rows {
        row.ports = ports(question, &row.group, &by_address);
    }
    if question.sort == Sort::Fill {
        let key = |row: &Row| (row.fill(question), row.figure(question, Figure::Peak));
        // Those of the same fill stay in the collector's order.
        rows.sort_by(|one, other| {
            let ((fill, peak), (other_fill, other_peak)) = (key(one), key(other));
            order(other_fill, fill).then(order(other_peak, peak))
        });
    }
    let left = rows.len().saturating_sub(question.limit);
    rows.truncate(question.limit);
    (rows, left)
}

fn order(one: Option<f64>, other: Option<f64>) -> std::cmp::Ordering {
    one.unwrap_or(-1.0).total_cmp(&other.unwrap_or(-1.0))
}

/// A row for each step of each of these groups. What has no line was not in use where somebody reported, and is not known elsewhere.
pub fn over_time(groups: Vec<Row>, lines: &[Line], known: &BTreeMap<i64, Known>) -> Vec<Row> {
    let mut by_group: BTreeMap<&[String], BTreeMap<i64, &Line>> = BTreeMap::new();
    for line in lines {
        by_group.entry(&line.by).or_default().insert(line.at, line);
    }
    let nothing = BTreeMap::new();
    let mut rows = Vec::new();
    for group in groups {
        let seen = by_group.get(group.group.as_slice()).unwrap_or(&nothing);
        let all: BTreeSet<i64> = known.keys().chain(seen.keys()).copied().collect();
        for at in all {
            let known = known.get(&at).copied();
            let mut row = match seen.get(&at) {
                Some(line) => Row::of(line, Some(at)),
                None => Row {
                    at: Some(at),
                    slots: 0,
                    figures: group
                        .figures
                        .as_ref()
                        .filter(|_| matches!(known, Some(Known::Part(_))))
                        .map(|it| vec![0.0; it.len()]),
                    refused_by: BTreeMap::new(),
                    ..group.clone()
                },
            };
            (row.ports, row.known) = (group.ports, known);
            rows.push(row);
        }
    }
    rows
}

/// Adds the reasons of refusals, from lines by the same groups and the reason.
pub fn reasons(rows: &mut [Row], lines: &[Line]) {
    let mut found: BTreeMap<(Vec<String>, i64), BTreeMap<String, u64>> = BTreeMap::new();
    for line in lines {
        let mut group = line.by.clone();
        let reason = group.pop();
        let refused = line.figures.first().copied().unwrap_or_default();
        if let Some(reason) = reason.filter(|it| !it.is_empty() && refused > 0.0) {
            *found.entry((group, line.at)).or_default().entry(reason).or_default() += refused as u64;
        }
    }
    for ((group, at), reasons) in found {
        let same = |row: &&mut Row| row.group == group && row.at.is_none_or(|it| it == at);
        if let Some(row) = rows.iter_mut().find(same) {
            row.refused_by = reasons;
        }
    }
}

fn by_address(addresses: &[Address]) -> BTreeMap<&str, &Address> {
    addresses.iter().map(|it| (it.address.as_str(), it)).collect()
}

/// Ports that there are towards one origin for a group that is of one address, one origin and one protocol: those of the address, of the
/// node or of the site. An IPv6 /64, which is told with its length, has no ports to fill.
fn ports(question: &Question, group: &[String], addresses: &BTreeMap<&str, &Address>) -> Option<u64> {
    let value = |dimension| {
        let place = question.by.iter().position(|it| *it == dimension)?;
        group.get(place).map(String::as_str)
    };
    // Origins that were too many to be told apart are several.
    value(Dimension::Origin).filter(|it| !it.is_empty())?;
    value(Dimension::Protocol)?;
    let address = addresses.get(value(Dimension::Address)?).filter(|it| !it.address.contains('/'))?;
    let filter = |name: &str| -> Vec<&str> {
        question.filter[name].as_array().into_iter().flatten().filter_map(|it| it.as_str()).collect()
    };
    let (nodes, sites) = (filter("nodes"), filter("sites"));
    let (node, site) = (value(Dimension::Node), value(Dimension::Site));
    if node.is_none() && site.is_none() && nodes.is_empty() && sites.is_empty() {
        return Some((address.last + 1).saturating_sub(address.first) * SLICE);
    }
    let counts = |it: &&super::told::Holder| {
        node.is_none_or(|node| node == it.node)
            && site.is_none_or(|site| site == it.site)
            && (nodes.is_empty() || nodes.contains(&it.node.as_str()))
            && (sites.is_empty() || sites.contains(&it.site.as_str()))
    };
    let slices: u64 = address.holders.iter().filter(counts).map(|it| it.held + it.draining).sum();
    Some(slices * SLICE).filter(|it| *it > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Usage;
    use crate::usage::told::Holder;

    fn question(by: &[Dimension]) -> Question {
        let how = Usage { by: by.to_vec(), limit: 2, ..Usage::default() };
        Question::of(&how, Some("shop")).unwrap()
    }

    fn line(by: &[&str], at: i64, peak: f64) -> Line {
        let mut figures = vec![0.0; 6];
        figures[0] = peak;
        Line { by: by.iter().map(|it| (*it).to_owned()).collect(), at, slots: 3, figures }
    }

    fn address() -> Address {
        let holder = |node: &str, held| Holder { node: node.into(), site: "east".into(), held, draining: 0 };
        Address {
            address: "203.0.113.0".into(),
            account: "shop".into(),
            allocation: "partners".into(),
            first: 4,
            last: 255,
            holders: vec![holder("n1", 8), holder("n2", 2)],
        }
    }

    const PORTS: [Dimension; 3] = [Dimension::Address, Dimension::Origin, Dimension::Protocol];

    #[test]
    fn the_fullest_comes_first_and_what_has_no_measure_last() {
        let question = question(&[&PORTS[..], &[Dimension::Node]].concat());
        let lines = [
            line(&["203.0.113.0", "", "tcp", "n1"], 0, 9_000.0),
            line(&["203.0.113.0", "198.51.100.7:443", "tcp", "n1"], 0, 1_024.0),
            line(&["203.0.113.0", "198.51.100.7:443", "tcp", "n2"], 0, 512.0),
        ];
        let (rows, left) = groups(&question, &lines, &[address()]);
        assert_eq!(left, 1);
        let told: Vec<_> =
            rows.iter().map(|it| (it.group[3].as_str(), it.ports, it.fill(&question))).collect();
        assert_eq!(told, [("n2", Some(512), Some(100.0)), ("n1", Some(2_048), Some(50.0))]);
    }

    #[test]
    fn ports_are_those_of_what_is_told_apart() {
        let address = address();
        let known = by_address(std::slice::from_ref(&address));
        let group = |values: &[&str]| values.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        let of = |question: &Question, values: &[&str]| ports(question, &group(values), &known);
        let plain = question(&PORTS);
        assert_eq!(of(&plain, &["203.0.113.0", "198.51.100.7:443", "tcp"]), Some(64_512));
        assert_eq!(
            of(&plain, &["203.0.113.9", "198.51.100.7:443", "tcp"]),
            None,
            "of an address that is gone"
        );
        assert_eq!(of(&plain, &["203.0.113.0", "", "tcp"]), None, "of several origins");
        assert_eq!(of(&question(&[Dimension::Address]), &["203.0.113.0"]), None);
        let mut one = plain.clone();
        one.filter["nodes"] = serde_json::json!(["n2"]);
        assert_eq!(of(&one, &["203.0.113.0", "198.51.100.7:443", "tcp"]), Some(512));
        let site = question(&[&PORTS[..], &[Dimension::Site]].concat());
        assert_eq!(of(&site, &["203.0.113.0", "198.51.100.7:443", "tcp", "east"]), Some(2_560));
        assert_eq!(of(&site, &["203.0.113.0", "198.51.100.7:443", "tcp", "west"]), None);
    }

    #[test]
    fn a_step_without_a_line_is_rest_only_where_somebody_reported() {
        let question = question(&[Dimension::Node]);
        let (rows, _) = groups(&question, &[line(&["n1"], 0, 7.0)], &[]);
        let known =
            [(0, Known::Part(100)), (60, Known::Part(50)), (120, Known::Nothing), (180, Known::NotYet)]
                .into();
        let lines = [line(&["n1"], 0, 7.0), line(&["n1"], 180, 3.0), line(&["n2"], 60, 5.0)];
        let rows = over_time(rows, &lines, &known);
        let told: Vec<_> =
            rows.iter().map(|it| (it.at.unwrap(), it.figure(&question, Figure::Peak))).collect();
        assert_eq!(told, [(0, Some(7.0)), (60, Some(0.0)), (120, None), (180, Some(3.0))]);
        assert_eq!(rows[2].known, Some(Known::Nothing));
    }

    #[test]
    fn reasons_come_to_their_rows() {
        let refused = |by: &[&str], count: f64| Line { figures: vec![count], ..line(by, 0, 0.0) };
        let plain = question(&[Dimension::Node]);
        let (mut rows, _) = groups(&plain, &[line(&["n1"], 0, 7.0), line(&["n2"], 0, 1.0)], &[]);
        let lines =
            [refused(&["n1", "no_port"], 4.0), refused(&["n1", "pod_rate"], 2.0), refused(&["n2", ""], 0.0)];
        reasons(&mut rows, &lines);
        assert_eq!(rows[0].refused_by, [("no_port".to_owned(), 4), ("pod_rate".to_owned(), 2)].into());
        assert!(rows[1].refused_by.is_empty());
    }
}
