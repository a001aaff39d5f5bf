//! `AegisPrefix`.

use crate::object::created;
use aegis_core::model::Prefix;
use aegis_crds::AegisPrefix;
use ipnet::Ipv4Net;
use kube::ResourceExt;
use std::net::Ipv4Addr;

/// Translates, or says what is wrong.
pub fn model(object: &AegisPrefix) -> Result<Prefix, String> {
    let reserved = object.spec.reserved.iter().enumerate().map(|(index, entry)| {
        range(entry).ok_or_else(|| {
            format!("spec.reserved[{index}]: {entry:?} is neither an IPv4 address nor a range such as 203.0.113.4/30")
        })
    });
    Ok(Prefix {
        name: object.name_any(),
        created: created(&object.metadata),
        cidr: cidr(&object.spec.cidr)
            .ok_or_else(|| format!("spec.cidr: {:?} is no IPv4 range without host bits", object.spec.cidr))?,
        reserved: reserved.collect::<Result<_, _>>()?,
        account: object.spec.account.clone(),
        deleting: object.metadata.deletion_timestamp.is_some(),
    })
}

/// A range without host bits.
pub fn cidr(text: &str) -> Option<Ipv4Net> {
    text.parse().ok().filter(|range: &Ipv4Net| range.addr() == range.network())
}

fn range(text: &str) -> Option<Ipv4Net> {
    cidr(text).or_else(|| text.parse::<Ipv4Addr>().ok().map(Ipv4Net::from))
}
