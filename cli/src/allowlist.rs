//! `kubectl aegis allowlist`: what to hand to the partner, in the form that his firewall takes.

use aegis_core::egress::Egress;
use aegis_crds::EgressAllocation;
use anyhow::{Result, ensure};
use kube::ResourceExt;
use serde_json::json;
use std::net::Ipv4Addr;

/// Forms.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// One range a line.
    #[default]
    Text,
    /// For programs.
    Json,
    /// For spreadsheets: range, family, prefix.
    Csv,
    /// Two local values, lists of ranges of IPv4 and of IPv6.
    Terraform,
    /// Commands that accept what comes from there.
    Iptables,
    /// A table with a set of each family.
    Nftables,
    /// Commands that make managed prefix lists.
    Aws,
    /// A command that makes a firewall rule.
    Gcp,
    /// A command that makes a rule of a network security group.
    Azure,
}

/// Addresses of an allocation in a form.
pub fn allowlist(object: &EgressAllocation, form: Form) -> Result<String> {
    let namespace = object.namespace().unwrap_or_default();
    let title = format!("{namespace}/{}", object.name_any());
    let uses = object.status.iter().flat_map(|status| &status.addresses);
    let mut found: Vec<(Egress, &str)> =
        uses.filter_map(|it| Some((it.address.parse().ok()?, it.prefix.as_str()))).collect();
    found.sort();
    ensure!(
        !found.is_empty(),
        "EgressAllocation {title} has no addresses (yet): see `kubectl describe egressallocation -n {namespace} {}`",
        object.name_any()
    );
    let range = |it: &(Egress, &str)| it.0.range().to_string();
    let all: Vec<String> = found.iter().map(range).collect();
    let four: Vec<String> = found.iter().filter(|it| it.0.v4().is_some()).map(range).collect();
    let six: Vec<String> = found.iter().filter(|it| it.0.v4().is_none()).map(range).collect();
    let label = format!("egress-{namespace}-{}", object.name_any());
    let word = label.replace(['-', '.'], "_");
    let lines = |lines: Vec<String>| lines.into_iter().map(|line| line + "\n").collect::<String>();
    Ok(match form {
        Form::Text => lines(all),
        Form::Json => {
            let entries: Vec<_> = found.iter().map(|it| json!({"cidr": range(it), "prefix": it.1})).collect();
            serde_json::to_string_pretty(&json!({"allocation": title, "addresses": entries}))? + "\n"
        }
        Form::Csv => {
            let row = |it: &(Egress, &str)| {
                format!("{},{},{}", range(it), if it.0.v4().is_some() { "IPv4" } else { "IPv6" }, it.1)
            };
            lines(std::iter::once("cidr,family,prefix".to_owned()).chain(found.iter().map(row)).collect())
        }
        Form::Terraform => format!(
            "locals {{\n  {word}_ipv4 = {}\n  {word}_ipv6 = {}\n}}\n",
            serde_json::to_string(&four)?,
            serde_json::to_string(&six)?
        ),
        Form::Iptables => {
            let rule = |command: &str, range: &String| {
                format!("{command} -A INPUT -s {range} -m comment --comment {label} -j ACCEPT")
            };
            let four = four.iter().map(|range| rule("iptables", range));
            lines(four.chain(six.iter().map(|range| rule("ip6tables", range))).collect())
        }
        Form::Nftables => nftables(&word, &found),
        Form::Aws => {
            let entry = |cidr: &String| json!({"Cidr": cidr, "Description": label});
            // A list is of one family.
            let lists =
                [("IPv4", &four), ("IPv6", &six)].into_iter().filter(|(_, ranges)| !ranges.is_empty());
            let mut texts = Vec::new();
            for (family, ranges) in lists {
                let entries: Vec<_> = ranges.iter().map(entry).collect();
                texts.push(format!(
                    "aws ec2 create-managed-prefix-list --prefix-list-name {label}-{} --address-family {family} \\\n  \
                     --max-entries {} --entries '{}'",
                    family.to_lowercase(),
                    ranges.len(),
                    serde_json::to_string(&entries)?
                ));
            }
            lines(texts)
        }
        Form::Gcp => {
            // A rule is of one family.
            let rules =
                [("ipv4", &four), ("ipv6", &six)].into_iter().filter(|(_, ranges)| !ranges.is_empty());
            let command = |(family, ranges): (&str, &Vec<String>)| {
                format!(
                    "gcloud compute firewall-rules create {label}-{family} --direction=INGRESS --action=ALLOW --rules=tcp:443 \\\n  \
                     --source-ranges={}",
                    ranges.join(",")
                )
            };
            lines(rules.map(command).collect())
        }
        Form::Azure => format!(
            "az network nsg rule create --resource-group GROUP --nsg-name NSG --name {label} --priority 100 \\\n  \
             --access Allow --direction Inbound --protocol Tcp --destination-port-ranges 443 \\\n  \
             --source-address-prefixes {}\n",
            all.join(" ")
        ),
    })
}

fn nftables(word: &str, found: &[(Egress, &str)]) -> String {
    let set = |name: &str, kind: &str, ranges: Vec<String>| {
        format!(
            "  set {name} {{\n    type {kind}\n    flags interval\n    elements = {{ {} }}\n  }}\n",
            ranges.join(", ")
        )
    };
    let mut text = format!("table inet {word} {{\n");
    let four: Vec<Ipv4Addr> = found.iter().filter_map(|it| it.0.v4()).collect();
    if !four.is_empty() {
        text += &set("ipv4", "ipv4_addr", four.iter().map(ToString::to_string).collect());
    }
    let six = found.iter().filter(|it| it.0.v4().is_none());
    let six: Vec<String> = six.map(|it| it.0.range().to_string()).collect();
    if !six.is_empty() {
        text += &set("ipv6", "ipv6_addr", six);
    }
    text + "}\n"
}
