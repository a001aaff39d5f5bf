//! `ZoneBinding`: planning does not need it, but its owner wants to know what no schema can tell.

use super::prefix::cidr;
use aegis_core::policy::Binding;
use aegis_core::policy::names::HostPattern;
use aegis_crds::{ZoneBinding, rules};

/// Translates, or says what is wrong.
pub fn model(object: &ZoneBinding) -> Result<Binding, String> {
    check(object)?;
    rules::binding(object).map_err(|error| error.to_string())
}

/// Says what is wrong, naming the entry.
fn check(object: &ZoneBinding) -> Result<(), String> {
    let spec = &object.spec;
    for (index, range) in spec.zone.cidrs.iter().enumerate() {
        if cidr(range).is_none() {
            return Err(format!("spec.zone.cidrs[{index}]: {range:?} is no range without host bits"));
        }
    }
    for (index, host) in spec.zone.hosts.iter().enumerate() {
        if HostPattern::new(host).is_none() {
            return Err(format!("spec.zone.hosts[{index}]: {host:?} is no host name"));
        }
    }
    for (index, port) in spec.zone.ports.iter().enumerate() {
        if port.end_port.zip(port.port).is_some_and(|(end, first)| end < first) {
            return Err(format!("spec.zone.ports[{index}].endPort: less than port"));
        }
    }
    let selector = spec.workloads.pod_selector.iter();
    let expressions = selector.filter_map(|selector| selector.match_expressions.as_ref()).flatten();
    for (index, expression) in expressions.enumerate() {
        let values = expression.values.as_ref().is_some_and(|values| !values.is_empty());
        let field = format!("spec.workloads.podSelector.matchExpressions[{index}]");
        match expression.operator.as_str() {
            "In" | "NotIn" if !values => {
                return Err(format!("{field}.values: needed by {}", expression.operator));
            }
            "Exists" | "DoesNotExist" if values => {
                return Err(format!("{field}.values: not allowed with {}", expression.operator));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => {
                return Err(format!(
                    "{field}.operator: {other:?} is none of In, NotIn, Exists, DoesNotExist"
                ));
            }
        }
    }
    Ok(())
}
