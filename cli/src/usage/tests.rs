//! The command with a collector that says what it is told to say.

use super::*;
use crate::args::{Args, Command, UsageForm};
use clap::Parser;
use period::rfc3339;

/// Begin of a window of an hour.
const FROM: i64 = 1_767_225_600;

/// Answers in the order of the kinds of questions.
struct Canned {
    /// Groups of the whole window, then of its steps.
    usage: Vec<Value>,
    refusals: Vec<Value>,
    addresses: Result<Value, String>,
    coverage: Value,
    asked: Vec<Value>,
}

impl Default for Page {
    fn default() -> Page {
        Page { rows: Vec::new(), next: None, level: "TENS" }
    }
}

struct Page {
    rows: Vec<Value>,
    next: Option<&'static str>,
    level: &'static str,
}

impl Page {
    fn of(rows: &[Value]) -> Page {
        Page { rows: rows.to_vec(), ..Page::default() }
    }

    fn json(self) -> Value {
        json!({"usage": {
            "level": self.level, "until": rfc3339(FROM + 3_600), "nodes": self.rows,
            "pageInfo": {"hasNextPage": self.next.is_some(), "endCursor": self.next},
        }})
    }
}

fn row(by: &[&str], at: i64, figures: &[f64]) -> Value {
    json!({"by": by, "at": rfc3339(at), "slots": 300, "figures": figures})
}

impl Ask for Canned {
    async fn ask(&mut self, query: &str, variables: Value) -> Result<Value> {
        self.asked.push(variables.clone());
        Ok(match query {
            NOW => json!({"now": rfc3339(FROM + 3_625)}),
            OBJECTS => json!({"addresses": self.addresses.clone().map_err(|it| anyhow!(it))?}),
            COVERAGE => self.coverage.clone(),
            _ if variables["by"].as_array().is_some_and(|by| by.contains(&json!("REASON"))) => {
                self.refusals.remove(0)
            }
            _ => self.usage.remove(0),
        })
    }
}

async fn say(canned: &mut Canned, line: &str) -> Result<Answer> {
    let args = Args::try_parse_from(["kubectl-aegis", "usage"].into_iter().chain(line.split_whitespace()))?;
    let Command::Usage(how) = args.command else { panic!("{line}") };
    let question = Question::of(&how, (!args.connection.all_namespaces).then_some("shop"))?;
    usage(canned, &how, question).await
}

fn holders(nodes: &[&str]) -> Value {
    let holder = |node: &&str| json!({"node": node, "site": "main", "held": 8, "draining": 0});
    json!([{
        "address": "203.0.113.0", "account": "shop", "allocation": "partners", "first": 4, "last": 255,
        "holders": nodes.iter().map(holder).collect::<Vec<_>>(),
    }])
}

/// All steps of an hour by 10 seconds, but those that are left out.
fn reported(nodes: i64, but: std::ops::Range<i64>) -> Vec<Value> {
    let steps = (0..360).filter(|step| !but.contains(step));
    steps
        .map(|step| json!({"at": rfc3339(FROM + 10 * step), "nodes": nodes, "seconds": 10 * nodes}))
        .collect()
}

fn shop() -> Canned {
    let group = |origin: &str, protocol: &str, figures: &[f64]| {
        row(&["partners", "203.0.113.0", origin, protocol], FROM, figures)
    };
    // Peak, in use, flows, refused, sent, received.
    let groups = [
        group("198.51.100.7:443", "tcp", &[52_345.0, 41_234.25, 1_234_567.0, 42.0, 3.4e9, 61.2e9]),
        group("", "tcp", &[900.0, 450.5, 12_345.0, 0.0, 1_500.0, 0.0]),
        group("198.51.100.9:53", "udp", &[7.0, 1.5, 80.0, 0.0, 4_800.0, 9_600.0]),
    ];
    let refusals = [
        row(&["partners", "203.0.113.0", "198.51.100.7:443", "tcp", "no_port"], FROM, &[40.0]),
        row(&["partners", "203.0.113.0", "198.51.100.7:443", "tcp", "pod_rate"], FROM, &[2.0]),
        row(&["partners", "203.0.113.0", "198.51.100.9:53", "udp", ""], FROM, &[0.0]),
    ];
    Canned {
        usage: vec![Page::of(&groups).json()],
        refusals: vec![Page::of(&refusals).json()],
        addresses: Ok(holders(&["n1", "n2"])),
        coverage: json!({
            "reports": [{"node": "n1", "last": rfc3339(FROM + 3_600)}, {"node": "n2", "last": rfc3339(FROM + 3_000)}],
            "reported": reported(1, 90..96),
        }),
        asked: Vec::new(),
    }
}

#[tokio::test]
async fn the_page_shows_what_it_says() {
    let answer = say(&mut shop(), "").await.unwrap();
    let table = answer.write(UsageForm::Table).unwrap();
    let page = include_str!("../../../docs/cli.md");
    assert!(
        page.contains(&format!("$ kubectl aegis usage\n{table}```")),
        "docs/cli.md has other than\n{table}"
    );
    let over_time = over_time().await.write(UsageForm::Table).unwrap();
    assert!(
        page.contains(&format!("$ kubectl aegis usage partners --by node --step 15m\n{over_time}```")),
        "docs/cli.md has other than\n{over_time}"
    );
}

async fn over_time() -> Answer {
    let steps = [
        row(&["n1"], FROM, &[30.0, 20.0, 900.0, 0.0, 2e6, 8e6]),
        row(&["n1"], FROM + 2_700, &[25.0, 12.0, 500.0, 3.0, 1e6, 4e6]),
    ];
    let all = [row(&["n1"], FROM, &[30.0, 18.5, 1_400.0, 3.0, 3e6, 12e6])];
    let step = |step: i64, seconds: i64| json!({"at": rfc3339(FROM + step), "nodes": 1, "seconds": seconds});
    let mut canned = Canned {
        usage: vec![Page::of(&all).json(), Page::of(&steps).json()],
        refusals: vec![Page::of(&[row(&["n1", "no_port"], FROM + 2_700, &[3.0])]).json()],
        addresses: Ok(holders(&["n1"])),
        coverage: json!({
            "reports": [{"node": "n1", "last": rfc3339(FROM + 3_600)}],
            "reported": [step(0, 900), step(900, 450), step(2_700, 900)],
        }),
        asked: Vec::new(),
    };
    let answer = say(&mut canned, "partners --by node --step 15m").await.unwrap();
    // Both are of the same window; the second goes from group to group.
    let asked: Vec<&Value> = canned.asked.iter().filter(|it| it.get("figures").is_some()).collect();
    assert_eq!(
        (&asked[0]["step"], &asked[1]["step"], &asked[1]["order"]),
        (&Value::Null, &json!(900), &json!("GROUP"))
    );
    let coverage = canned.asked.iter().find(|it| it.get("nodes").is_some()).unwrap();
    assert_eq!((&coverage["ranges"], &coverage["step"]), (&json!(["203.0.113.0"]), &json!(900)));
    answer
}

#[tokio::test]
async fn programs_get_all_of_it_exactly() {
    let json: Value =
        serde_json::from_str(&say(&mut shop(), "").await.unwrap().write(UsageForm::Json).unwrap()).unwrap();
    assert_eq!(
        (&json["from"], &json["to"]),
        (&json!("2026-01-01T00:00:00Z"), &json!("2026-01-01T01:00:00Z"))
    );
    assert_eq!(
        json["rows"][0],
        json!({
            "group": {"allocation": "partners", "address": "203.0.113.0", "origin": "198.51.100.7:443", "protocol": "tcp"},
            "slots": 300, "ports": 64_512, "fillPercent": 81.14,
            "figures": {"peak": 52_345, "inUse": 41_234.25, "flows": 1_234_567, "refused": 42, "sentBytes": 3_400_000_000_u64, "receivedBytes": 61_200_000_000_u64},
            "refusedBy": {"no_port": 40, "pod_rate": 2},
        })
    );
    assert_eq!(
        json["coverage"],
        json!({
            "nodes": 2, "reportedSeconds": 3_540, "wantedSeconds": 7_200,
            "unknown": [{"from": "2026-01-01T00:15:00Z", "to": "2026-01-01T00:16:00Z"}],
            "silent": [{"node": "n2", "last": "2026-01-01T00:50:00Z"}],
        })
    );
    let csv = say(&mut shop(), "").await.unwrap().write(UsageForm::Csv).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(
        lines[..2],
        [
            "allocation,address,origin,protocol,peak,inUse,flows,refused,sentBytes,receivedBytes,at,slots,ports,fillPercent,refusedBy,reportedPercent",
            "partners,203.0.113.0,198.51.100.7:443,tcp,52345,41234.25,1234567,42,3400000000,61200000000,,300,64512,81.14,no_port 40;pod_rate 2,",
        ]
    );
    let over_time: Value = serde_json::from_str(&over_time().await.write(UsageForm::Json).unwrap()).unwrap();
    let rows: Vec<(&Value, &Value)> = over_time["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (&it["figures"]["peak"], &it["reportedPercent"]))
        .collect();
    let expected =
        [(json!(30), json!(100)), (json!(0), json!(50)), (json!(null), json!(0)), (json!(25), json!(100))];
    assert_eq!(rows, expected.iter().map(|(peak, share)| (peak, share)).collect::<Vec<_>>());
}

#[tokio::test]
async fn all_pages_are_read_and_the_highest_shown() {
    let group = |number: usize| {
        row(&[&format!("n{number}")], FROM, &[100.0 - number as f64, 1.0, 0.0, 0.0, 0.0, 0.0])
    };
    let page = |from: usize, next| {
        Page { rows: (from..from + 40).map(group).collect(), next, level: "MINUTES" }.json()
    };
    let mut canned = Canned { usage: vec![page(0, Some("more")), page(40, None)], ..shop() };
    let answer = say(&mut canned, "--by node --limit 3").await.unwrap();
    assert_eq!((answer.rows.len(), answer.left_out, answer.slot_seconds), (3, 77, 60));
    let table = answer.write(UsageForm::Table).unwrap();
    assert!(table.contains("note: 77 groups are not shown: see --limit"), "{table}");
    let after: Vec<&Value> = canned.asked.iter().filter_map(|it| it.get("after")).collect();
    assert_eq!(after, [&json!("more")]);
    // An end is made where there is none.
    let many = (0..PAGES).map(|_| page(0, Some("more"))).collect();
    let answer = say(&mut Canned { usage: many, ..shop() }, "--by node").await.unwrap();
    assert!(answer.notes[0].contains("more than 10000 groups"), "{:?}", answer.notes);
}

#[tokio::test]
async fn nothing_is_told_apart_from_what_is_not_known_or_not_to_be_seen() {
    let none = || Canned { usage: vec![Page::default().json()], ..shop() };
    let text = async |canned: &mut Canned, line: &str| {
        say(canned, line).await.unwrap().write(UsageForm::Table).unwrap()
    };
    assert!(text(&mut none(), "").await.contains("\nnothing was in use\n"));
    let nodes = json!([{"node": "n1", "last": null}]);
    let mut silent = Canned { coverage: json!({"reports": nodes, "reported": []}), ..none() };
    let said = text(&mut silent, "").await;
    assert!(said.contains("not known: no node reported anything of this window"), "{said}");
    assert!(said.contains("note: node n1 has not reported for 30 days"), "{said}");
    let mut stranger =
        Canned { coverage: json!({"reports": [], "reported": []}), addresses: Ok(json!([])), ..none() };
    let said = text(&mut stranger, "").await;
    assert!(said.contains("kubectl auth can-i get egressallocations.aegis.dev/usage -n shop"), "{said}");
    // A collector that does not know the objects yet still tells use.
    let mut young = Canned { addresses: Err("objects are not known".into()), ..shop() };
    let said = text(&mut young, "").await;
    assert!(said.contains("52345") && !said.contains("FULL"), "{said}");
    assert!(
        said.contains("note: how full ports are, and who reported, is not known: objects are not known"),
        "{said}"
    );
}

#[tokio::test]
async fn questions_that_make_no_sense_are_not_asked() {
    let mut canned = Canned { usage: Vec::new(), ..shop() };
    for (line, said) in [
        ("--from 2026-01-02T00:00:00Z --to 2026-01-01T00:00:00Z", "it must end later than it begins"),
        ("--step 7s", "a multiple of 10s"),
        ("--since 30d --step 10s", "more than 5000"),
        ("--by node,node", "twice"),
    ] {
        let error = say(&mut canned, line).await.unwrap_err().to_string();
        assert!(error.contains(said), "{line}: {error}");
    }
    for line in
        ["--since 1h --from 2026-01-01T00:00:00Z", "--total --by node", "--since never", "--by colour"]
    {
        assert!(say(&mut canned, line).await.is_err(), "{line}");
    }
}
