//! Conditions: set with care for their times, and what of a change deserves an Event.

use crate::events::Notice;
use aegis_crds::{Condition, reason, type_};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeSet;

/// A condition as it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Type.
    pub type_: &'static str,
    /// `True` or `False`.
    pub status: bool,
    /// Stable word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Wanted {
    /// A condition that is true.
    pub fn good(type_: &'static str, reason: &'static str, message: &str) -> Wanted {
        Wanted { type_, status: true, reason, message: message.to_owned() }
    }

    /// A condition that is false.
    pub fn bad(type_: &'static str, reason: &'static str, message: &str) -> Wanted {
        Wanted { type_, status: false, reason, message: message.to_owned() }
    }
}

/// What a condition notes beside itself.
pub struct Clock {
    /// Generation of the object that was judged.
    pub generation: Option<i64>,
    /// Now.
    pub now: Timestamp,
}

/// Most bytes of a message (the schema's limit is 32,768 characters; people stop reading much earlier).
const MESSAGE_LIMIT: usize = 2_000;

impl Clock {
    /// The conditions to write. The time of transition changes only when the status does: a condition that stays as
    /// it is costs no write.
    pub fn settle(&self, old: &[Condition], wanted: Vec<Wanted>) -> Vec<Condition> {
        let settled = wanted.into_iter().map(|wanted| {
            let status = if wanted.status { "True" } else { "False" };
            let same = old.iter().find(|old| old.type_ == wanted.type_ && old.status == status);
            Condition {
                type_: wanted.type_.to_owned(),
                status: status.to_owned(),
                reason: wanted.reason.to_owned(),
                message: shorten(wanted.message),
                observed_generation: self.generation,
                last_transition_time: same
                    .map_or(Time(whole_second(self.now)), |same| same.last_transition_time.clone()),
            }
        });
        settled.collect()
    }
}

/// Times in the API have whole seconds; anything else would come back changed.
fn whole_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn shorten(mut message: String) -> String {
    if message.len() > MESSAGE_LIMIT {
        message.truncate(message.floor_char_boundary(MESSAGE_LIMIT));
        message.push_str(" ...");
    }
    message
}

/// Whether some condition has another status than before, or is new.
pub fn turned(old: &[Condition], new: &[Condition]) -> bool {
    new.iter().any(|new| find(old, &new.type_).is_none_or(|old| old.status != new.status))
}

/// What deserves an Event: a change of status or reason, except of `Programmed`, which comes and goes with every
/// node. What starts out well is no news, except an allocation. A reason that several conditions have is told once.
pub fn notices(old: &[Condition], new: &[Condition]) -> Vec<Notice> {
    let news = new.iter().filter(|new| {
        let before = find(old, &new.type_);
        let changed = before.is_none_or(|old| (&old.status, &old.reason) != (&new.status, &new.reason));
        let good = (new.type_ == type_::CAPACITY_LOW) != (new.status == "True");
        let quiet =
            new.type_ == type_::PROGRAMMED || (before.is_none() && good && new.type_ != type_::ALLOCATED);
        changed && !quiet
    });
    let notices = news.map(|new| Notice {
        warning: match new.type_.as_str() {
            type_::CAPACITY_LOW => new.status == "True",
            _ => new.status != "True" && new.reason != reason::DRAINING,
        },
        reason: new.reason.clone(),
        note: new.message.clone(),
    });
    let mut told = BTreeSet::new();
    notices.filter(|notice| told.insert(notice.reason.clone())).collect()
}

/// The condition of a type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}
