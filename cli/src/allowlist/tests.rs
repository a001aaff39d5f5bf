use super::label::label;
use super::*;
use crate::files;
use clap::ValueEnum;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};

const RULE: Rule = Rule { ports: Vec::new(), protocol: Transport::Tcp, name: None };

fn list_of(addresses: BTreeSet<Egress>, allocations: &[&str]) -> List {
    let origin = |at: usize| Origin {
        allocation: allocations[at % allocations.len()].to_owned(),
        prefix: "leased, \"old\"".to_owned(),
    };
    let addresses = addresses.into_iter().enumerate().map(|(at, it)| (it, origin(at))).collect();
    List { addresses, context: None, time: Timestamp::UNIX_EPOCH }
}

fn four(last: u8) -> Egress {
    Egress::V4(Ipv4Addr::new(203, 0, 113, last))
}

/// Addresses close to each other, so that ranges are met.
fn addresses() -> impl Strategy<Value = BTreeSet<Egress>> {
    let six = |last: u8| Egress::V6(0x2001_0db8_0001_0000 + u64::from(last));
    // In /64s of their own: of one that the list has they would be a part.
    let single =
        |last: u8| Egress::Single((0x2001_0db8_0002_0000_0000_0000_0000_0000 + u128::from(last)).into());
    let one = prop_oneof![any::<u8>().prop_map(four), (0..40_u8).prop_map(six), (0..40_u8).prop_map(single),];
    prop::collection::btree_set(one, 1..60)
}

/// All that ranges have, each once; a range that is met twice fails the test.
fn inside(ranges: impl IntoIterator<Item = IpNet>) -> BTreeSet<Egress> {
    let mut found = BTreeSet::new();
    for range in ranges {
        let parts: Vec<IpNet> = match range {
            IpNet::V4(range) => range.subnets(32).unwrap().map(IpNet::V4).collect(),
            IpNet::V6(range) if range.prefix_len() > 64 => {
                range.subnets(128).unwrap().map(IpNet::V6).collect()
            }
            IpNet::V6(range) => range.subnets(64).unwrap().map(IpNet::V6).collect(),
        };
        for part in parts {
            let egress = match part.addr() {
                IpAddr::V6(address) if part.prefix_len() == 128 => Egress::Single(address),
                address => Egress::containing(address),
            };
            assert!(found.insert(egress), "{part} twice");
        }
    }
    found
}

/// The ranges in a text.
fn ranges(text: &str) -> Vec<IpNet> {
    let word = |it: char| it.is_ascii_hexdigit() || matches!(it, '.' | ':' | '/');
    text.split(|it| !word(it)).filter(|it| it.contains('/')).filter_map(|it| it.parse().ok()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_form_has_all_addresses_and_no_other(addresses in addresses()) {
        let list = list_of(addresses.clone(), &["shop/partners", "shop/others"]);
        for form in Form::value_variants() {
            let text = write(&list, *form, &RULE).unwrap();
            prop_assert!(text.ends_with('\n'));
            let found = match form {
                Form::Text => text.lines().map(|line| line.parse().unwrap()).collect(),
                Form::Json => {
                    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
                    let of = |it: &serde_json::Value| it.as_str().unwrap().parse::<IpNet>().unwrap();
                    let each = json["addresses"].as_array().unwrap().iter().map(|it| of(&it["cidr"]));
                    prop_assert_eq!(&inside(each), &addresses);
                    let both = ["ipv4", "ipv6"].map(|it| json[it].as_array().unwrap());
                    both.into_iter().flatten().map(of).collect()
                }
                Form::Csv => {
                    text.lines().skip(1).map(|row| row.split(',').next().unwrap().parse().unwrap()).collect()
                }
                _ => ranges(&text),
            };
            prop_assert_eq!(inside(found), addresses.clone(), "{:?}", form);
        }
    }

    #[test]
    fn names_are_what_targets_take(titles in prop::collection::btree_set("[a-z0-9]{1,63}/[a-z0-9][a-z0-9.-]{0,62}", 1..3)) {
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        let list = list_of([four(0), four(1)].into(), &titles);
        for (form, most) in [(Form::Iptables, 28), (Form::Gcp, 58), (Form::Azure, 75), (Form::Aws, 250)] {
            let name = label(&list, None, form).unwrap();
            // Its own judge lets it pass, as one that somebody gives.
            prop_assert_eq!(&label(&list, Some(&name), form).unwrap(), &name);
            prop_assert!(name.len() <= most);
        }
    }
}

#[test]
fn long_names_stay_apart() {
    let name = |title: &str| label(&list_of([four(0)].into(), &[title]), None, Form::Iptables).unwrap();
    let (one, other) = (name("warehouse/partners-north"), name("warehouse/partners-south"));
    assert_eq!(one, "egress-warehouse-pa-dc4ae9b8");
    assert_ne!(one, other);
}

#[test]
fn names_that_no_target_takes_are_refused() {
    let list = list_of([four(0)].into(), &["shop/partners"]);
    for name in ["", "a b", "Partner", "1st", "-x", "x-", "x;reboot", "a_b", "é", &"x".repeat(29)] {
        let said = label(&list, Some(name), Form::Iptables).unwrap_err().to_string();
        assert!(said.contains("--name"), "{said}");
    }
}

#[test]
fn no_name_leaves_its_comment_or_its_cell() {
    let mut list = list_of([four(0)].into(), &["shop/a\nreboot"]);
    list.context = Some("prod\r\nreboot; $(reboot) `reboot`".to_owned());
    for form in [Form::Terraform, Form::Iptables, Form::Nftables, Form::Aws, Form::Gcp, Form::Azure] {
        let text = write(&list, form, &RULE).unwrap();
        assert!(text.lines().all(|line| !line.starts_with("reboot")), "{text}");
        assert!(
            text.starts_with(
                "# Egress addresses of shop/a_reboot in context prod__reboot_ __reboot_ _reboot_, as of 1970"
            ),
            "{text}"
        );
    }
    let csv = write(&list, Form::Csv, &RULE).unwrap();
    assert!(csv.ends_with("203.0.113.0/32,IPv4,\"shop/a\nreboot\",\"leased, \"\"old\"\"\"\n"), "{csv}");
}

#[test]
fn what_a_target_cannot_take_is_refused() {
    let list = list_of((0..=202).step_by(2).map(four).collect(), &["shop/partners"]);
    let said = write(&list, Form::Aws, &RULE).unwrap_err().to_string();
    assert!(said.contains("102 ranges of IPv4"), "{said}");
    let rule = Rule { ports: (1..=16).collect(), ..RULE };
    assert!(write(&list, Form::Iptables, &rule).unwrap_err().to_string().contains("at most 15 ports"));
    assert!(write(&list, Form::Nftables, &rule).is_ok());
}

#[test]
fn a_status_alone_is_enough_unless_something_is_under_way() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/allowlist.yaml");
    let mut state = files::state(&[data]).unwrap();
    state.snapshot.addresses.clear();
    state.missing.insert("egressaddresses", "may not be read".to_owned());
    let said = |name: &str| list(&state, &Wanted::named(&[name.to_owned()], "mill"), None).unwrap();
    let (feed, warnings) = said("feed");
    assert_eq!((feed.addresses.len(), warnings.as_slice()), (4, &[][..]));
    let (young, warnings) = said("young");
    assert_eq!(young.addresses.len(), 1);
    assert_eq!(warnings[1], "egressaddresses: may not be read, so the list is what the status says");
}

#[test]
fn what_cannot_be_read_is_not_left_out_in_silence() {
    let mut found = Vec::new();
    let bad = "{kind: EgressAllocation, metadata: {name: bad, namespace: mill}, spec: {prefixes: 7}}\n---\n\
               {kind: EgressAllocation, metadata: {name: odd, namespace: shop}, spec: {prefixes: [leased]}, \
                status: {addresses: [{address: 203.0.113.1/30, prefix: leased}]}}";
    files::parse("here", bad, &mut found).unwrap();
    let mut state = State::default();
    for object in &found {
        assert!(files::place(&mut state, object).unwrap());
    }
    for (namespace, said) in [
        ("mill", "EgressAllocation mill/bad cannot be read"),
        ("shop", "EgressAllocation shop/odd: \"203.0.113.1/30\""),
    ] {
        let error = list(&state, &Wanted::All(Some(namespace.to_owned())), None).unwrap_err();
        assert!(error.to_string().contains(said), "{error:#}");
    }
}
