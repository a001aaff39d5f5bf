//! What rules and lists are called.

use super::{Form, List};
use anyhow::{Result, ensure};

/// A name that the form takes: lowercase letters, digits and hyphens, which every firewall allows, and no longer than
/// this one allows.
pub fn label(list: &List, given: Option<&str>, form: Form) -> Result<String> {
    // Names of both families end with `-ipv4` and `-ipv6`, but for a chain's.
    let most = match form {
        Form::Iptables => 28,
        Form::Gcp => 63 - 5,
        Form::Azure => 80 - 5,
        _ => 200,
    };
    let Some(given) = given else { return Ok(derived(list, most)) };
    let fits = given.starts_with(|it: char| it.is_ascii_lowercase())
        && given.chars().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || it == '-')
        && !given.ends_with('-')
        && given.len() <= most;
    ensure!(
        fits,
        "--name {given:?}: a name is of lowercase letters, digits and hyphens, begins with a letter, does not end with a \
         hyphen, and has at most {most} characters here"
    );
    Ok(given.to_owned())
}

/// That of the only allocation, else of the only namespace.
fn derived(list: &List, most: usize) -> String {
    let titles: Vec<&str> = list.allocations().into_iter().collect();
    let namespace = |title: &str| title.split('/').next().unwrap_or_default().to_owned();
    let base = match titles.as_slice() {
        [title] => format!("egress-{title}"),
        [first, rest @ ..] if rest.iter().all(|it| namespace(it) == namespace(first)) => {
            format!("egress-{}", namespace(first))
        }
        _ => "egress".to_owned(),
    };
    let plain = |it: char| if it.is_ascii_alphanumeric() { it.to_ascii_lowercase() } else { '-' };
    let text: String = base.chars().map(plain).collect();
    let text = text.trim_end_matches('-');
    if text.len() <= most {
        return text.to_owned();
    }
    // Names with the same beginning stay apart (FNV-1a: the same in every version).
    let hash =
        base.bytes().fold(0x811c_9dc5_u32, |hash, it| (hash ^ u32::from(it)).wrapping_mul(0x0100_0193));
    format!("{}-{hash:08x}", text[..most - 9].trim_end_matches('-'))
}
