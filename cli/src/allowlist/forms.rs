//! How a list is written.

use super::List;
use super::label::label;
use aegis_core::egress::Family;
use anyhow::{Result, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Most ports that a rule of iptables takes.
const PORTS: usize = 15;
/// Most entries of one call that makes a prefix list.
const ENTRIES: usize = 100;

/// Forms.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// One range a line.
    #[default]
    Text,
    /// For programs: ranges, and whose each address is.
    Json,
    /// For spreadsheets: a row for each address.
    Csv,
    /// Two local values, lists of ranges of IPv4 and of IPv6, and how to use them.
    Terraform,
    /// Commands that fill a chain, as often as wanted.
    Iptables,
    /// For `nft -f`, as often as wanted: sets and a chain in the table `inet filter`.
    Nftables,
    /// Commands that make managed prefix lists.
    Aws,
    /// Commands that make firewall rules.
    Gcp,
    /// Commands that make rules of a network security group.
    Azure,
}

/// Protocols with ports.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What rules say beside the addresses.
#[derive(clap::Args, Clone, Debug)]
pub struct Rule {
    /// Ports of the origin in rules, separated by commas.
    #[arg(long = "port", value_name = "PORTS", value_delimiter = ',', default_value = "443",
        value_parser = clap::value_parser!(u16).range(1..))]
    pub ports: Vec<u16>,
    /// Their protocol.
    #[arg(long, value_enum, default_value_t)]
    pub protocol: Transport,
    /// Name of rules and lists: lowercase letters, digits, hyphens; else from the allocation's name.
    #[arg(long)]
    pub name: Option<String>,
}

/// Ranges of a family.
struct Group {
    /// `ipv4`, `ipv6`.
    word: &'static str,
    ranges: Vec<String>,
}

/// The text of a list, with a line feed at its end.
pub fn write(list: &List, form: Form, rule: &Rule) -> Result<String> {
    let group = |(word, family)| Group {
        word,
        ranges: list.ranges(family).iter().map(ToString::to_string).collect(),
    };
    let both = [("ipv4", Family::V4), ("ipv6", Family::V6)].map(group);
    let own: Vec<&Group> = both.iter().filter(|it| !it.ranges.is_empty()).collect();
    let name = label(list, rule.name.as_deref(), form)?;
    let word = name.replace('-', "_");
    let protocol = match rule.protocol {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let ports: BTreeSet<u16> = rule.ports.iter().copied().collect();
    let joined = |by: &str| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(by);
    let body = match form {
        Form::Text => return Ok(own.iter().flat_map(|it| &it.ranges).map(|it| format!("{it}\n")).collect()),
        Form::Json => return json(list, &both),
        Form::Csv => return Ok(csv(list)),
        Form::Terraform => terraform(&word, &both, protocol, &ports),
        Form::Iptables => {
            ensure!(ports.len() <= PORTS, "a rule of iptables takes at most {PORTS} ports");
            own.iter().map(|it| iptables(&name, it, protocol, &joined(","))).collect()
        }
        Form::Nftables => nftables(&word, &own, protocol, &joined(", ")),
        Form::Aws => own.iter().map(|it| aws(&name, it)).collect::<Result<_>>()?,
        Form::Gcp => {
            let rules = ports.iter().map(|port| format!("{protocol}:{port}")).collect::<Vec<_>>().join(",");
            own.iter().map(|it| gcp(&name, it, &rules)).collect()
        }
        Form::Azure => azure(&name, &own, protocol, &joined(" ")),
    };
    Ok(head(list) + &body)
}

/// Comments: whose they are, and of when. An interactive zsh runs them as commands, so nothing in them means anything to a shell.
fn head(list: &List) -> String {
    let allocations: Vec<&str> = list.allocations().into_iter().collect();
    let mut whose = allocations.join(", ");
    if let Some(context) = &list.context {
        whose += &format!(" in context {context}");
    }
    let plain = |it: char| if it.is_alphanumeric() || "-_./:@, ".contains(it) { it } else { '_' };
    let whose: String = whose.chars().map(plain).collect();
    format!(
        "# Egress addresses of {whose}, as of {}.\n# Make this anew when they change, by kubectl aegis allowlist.\n",
        list.time
    )
}

fn json(list: &List, both: &[Group; 2]) -> Result<String> {
    let address = |(egress, origin): (&aegis_core::egress::Egress, &super::Origin)| json!({"cidr": egress.range(), "allocation": origin.allocation, "prefix": origin.prefix});
    let text = json!({
        "allocations": list.allocations(),
        "context": list.context,
        "time": list.time.to_string(),
        "ipv4": both[0].ranges,
        "ipv6": both[1].ranges,
        "addresses": list.addresses.iter().map(address).collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&text)? + "\n")
}

fn csv(list: &List) -> String {
    let cell = |text: &str| match text.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let mut text = "cidr,family,allocation,prefix\n".to_owned();
    for (egress, origin) in &list.addresses {
        let family = match egress.family() {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        let cells = [&egress.range().to_string(), family, &cell(&origin.allocation), &cell(&origin.prefix)];
        text += &(cells.join(",") + "\n");
    }
    text
}

/// Both lists, empty or not: what refers to one does not break.
fn terraform(word: &str, both: &[Group; 2], protocol: &str, ports: &BTreeSet<u16>) -> String {
    let mut text = "locals {\n".to_owned();
    for Group { word: family, ranges } in both {
        let lines: String = ranges.iter().map(|range| format!("    \"{range}\",\n")).collect();
        let lines = if lines.is_empty() { lines } else { format!("\n{lines}  ") };
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {word}_{family} = [{lines}]");
    }
    text += "}\n\n# For example:\n";
    for Group { word: family, .. } in both.iter().filter(|it| !it.ranges.is_empty()) {
        for port in ports {
            let _ = write!(
                text,
                "#\n\
                 # resource \"aws_vpc_security_group_ingress_rule\" \"{word}_{family}_{port}\" {{\n\
                 #   for_each          = toset(local.{word}_{family})\n\
                 #   security_group_id = aws_security_group.origin.id\n\
                 #   cidr_{family}         = each.value\n\
                 #   ip_protocol       = \"{protocol}\"\n\
                 #   from_port         = {port}\n\
                 #   to_port           = {port}\n\
                 # }}\n"
            );
        }
    }
    text
}

/// A chain of its own, filled anew in one step: what the family no longer has is no longer let in.
fn iptables(name: &str, group: &Group, protocol: &str, ports: &str) -> String {
    let command = if group.word == "ipv4" { "iptables" } else { "ip6tables" };
    let rule =
        |range| format!("-A {name} -s {range} -p {protocol} -m multiport --dports {ports} -j ACCEPT\n");
    let rules: String = group.ranges.iter().map(rule).collect();
    format!(
        "{command}-restore --wait --noflush <<'END'\n*filter\n:{name} - [0:0]\n{rules}COMMIT\nEND\n\
         {command} --wait -C INPUT -j {name} 2>/dev/null || {command} --wait -I INPUT -j {name}\n"
    )
}

/// In the table that has the chain of the host's own rules: what a table accepts, another still drops.
fn nftables(word: &str, own: &[&Group], protocol: &str, ports: &str) -> String {
    let chain = format!("{word}_in");
    let mut text = format!("# Once: nft insert rule inet filter input jump {chain}\ntable inet filter {{\n");
    for Group { word: family, .. } in own {
        let _ = writeln!(text, "  set {word}_{family} {{ type {family}_addr; flags interval; }}");
    }
    let _ = writeln!(text, "  chain {chain} {{ }}\n}}\nflush chain inet filter {chain}");
    for Group { word: family, ranges } in own {
        let set = format!("{word}_{family}");
        let header = if *family == "ipv4" { "ip" } else { "ip6" };
        let _ = write!(
            text,
            "flush set inet filter {set}\n\
             add element inet filter {set} {{ {} }}\n\
             add rule inet filter {chain} {header} saddr @{set} {protocol} dport {{ {ports} }} accept\n",
            ranges.join(", ")
        );
    }
    text
}

fn aws(name: &str, Group { word, ranges }: &Group) -> Result<String> {
    let family = if *word == "ipv4" { "IPv4" } else { "IPv6" };
    ensure!(
        ranges.len() <= ENTRIES,
        "{} ranges of {family}: a managed prefix list is made of at most {ENTRIES}; name fewer allocations",
        ranges.len()
    );
    let entry = |cidr| json!({"Cidr": cidr, "Description": name});
    let entries = serde_json::to_string(&ranges.iter().map(entry).collect::<Vec<_>>())?;
    Ok(format!(
        "aws ec2 create-managed-prefix-list --prefix-list-name {name}-{word} --address-family {family} \\\n  \
         --max-entries {} --entries '{entries}'\n",
        ranges.len()
    ))
}

fn gcp(name: &str, Group { word, ranges }: &Group, rules: &str) -> String {
    format!(
        "gcloud compute firewall-rules create {name}-{word} --network=\"${{NETWORK:-default}}\" \\\n  \
         --direction=INGRESS --action=ALLOW --rules={rules} \\\n  --source-ranges={}\n",
        ranges.join(",")
    )
}

/// A rule is of one family, and of one priority.
fn azure(name: &str, own: &[&Group], protocol: &str, ports: &str) -> String {
    let protocol = if protocol == "tcp" { "Tcp" } else { "Udp" };
    let mut text = "# Set GROUP and NSG, of whose priorities these must be free.\n".to_owned();
    for (priority, Group { word, ranges }) in (100..).zip(own) {
        let _ = write!(
            text,
            "az network nsg rule create --resource-group \"${{GROUP:?}}\" --nsg-name \"${{NSG:?}}\" \\\n  \
             --name {name}-{word} --priority {priority} --direction Inbound --access Allow \\\n  \
             --protocol {protocol} --destination-port-ranges {ports} \\\n  --source-address-prefixes {}\n",
            ranges.join(" ")
        );
    }
    text
}
