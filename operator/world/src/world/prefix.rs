//! `AegisPrefix`.

use crate::object::created;
use aegis_core::egress::{Kind, NETWORK_LENGTH};
use aegis_core::model::{Delegate, Delegation, Prefix};
use aegis_core::selector::Selector;
use aegis_crds::AegisPrefix;
use aegis_crds::rules::{FieldError, expressions};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;
use std::net::IpAddr;

/// Translates, or says what is wrong.
pub fn model(object: &AegisPrefix) -> Result<Prefix, String> {
    let reserved = object.spec.reserved.iter().enumerate().map(|(index, entry)| {
        range(entry).ok_or_else(|| {
            format!(
                "spec.reserved[{index}]: {entry:?} is neither an address nor a range such as 203.0.113.4/30"
            )
        })
    });
    Ok(Prefix {
        name: object.name_any(),
        created: created(&object.metadata),
        cidr: cidr(&object.spec.cidr)
            .filter(|range| Kind::of(range).has_ports() || range.prefix_len() <= NETWORK_LENGTH)
            .ok_or_else(|| {
                format!(
                    "spec.cidr: {:?} is no range without host bits, or an IPv6 one that is longer than /64 and no single address (/128)",
                    object.spec.cidr
                )
            })?,
        reserved: reserved.collect::<Result<_, _>>()?,
        account: object.spec.account.clone(),
        delegations: object.spec.delegations.iter().map(delegation).collect::<Result<_, _>>()?,
        deleting: object.metadata.deletion_timestamp.is_some(),
    })
}

fn delegation(delegation: &aegis_crds::Delegation) -> Result<Delegation, String> {
    let field = || format!("spec.delegations[{:?}]", delegation.name);
    let to = match (&delegation.account, &delegation.namespace_selector) {
        (Some(account), None) => Delegate::Account(account.clone()),
        (None, Some(selector)) => {
            Delegate::Namespaces(self::selector(selector).map_err(|error| format!("{}: {error}", field()))?)
        }
        _ => return Err(format!("{}: must have either account or namespaceSelector", field())),
    };
    Ok(Delegation { name: delegation.name.clone(), to, max: delegation.max_addresses })
}

fn selector(selector: &LabelSelector) -> Result<Selector, FieldError> {
    Ok(Selector {
        labels: selector.match_labels.clone().unwrap_or_default(),
        expressions: expressions(
            "namespaceSelector.matchExpressions.operator",
            selector.match_expressions.clone(),
        )?,
    })
}

/// A range without host bits.
pub fn cidr(text: &str) -> Option<IpNet> {
    text.parse().ok().filter(|range: &IpNet| range.addr() == range.network())
}

fn range(text: &str) -> Option<IpNet> {
    cidr(text).or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}
