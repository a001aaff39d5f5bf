//! Cursors: the place of the last row of a page, in the order of the answers. They are no secret and give no right: a page is what the
//! question and the scope say, from there on.

use super::{Dimension, Order, Query, QueryError};
use crate::sql::{Error, Row, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The place of a row.
pub(super) fn write(query: &Query, row: &Row) -> Result<String, Error> {
    let groups = query.by.len();
    let mut place: Vec<&Value> = row.iter().take(groups + 1).collect();
    if query.order == Order::Highest {
        place.insert(0, row.get(groups + 2).ok_or(Error::Column(groups + 2))?);
    }
    pack(&place).ok_or(Error::Column(0))
}

/// A place as text.
pub(crate) fn pack(place: &impl Serialize) -> Option<String> {
    let text = serde_json::to_string(place).ok()?;
    Some(text.bytes().map(|byte| format!("{byte:02x}")).collect())
}

/// The place that a text is of.
pub(crate) fn unpack<T: DeserializeOwned>(cursor: &str) -> Option<T> {
    serde_json::from_slice(&decode(cursor)?).ok()
}

/// The values that a page goes on after, in the order of the answers.
pub(super) fn read(query: &Query, cursor: &str) -> Result<Vec<Value>, QueryError> {
    let place: Vec<Value> = unpack(cursor).ok_or(QueryError::Cursor)?;
    let number = |value: &Value| matches!(value, Value::Int(_));
    let group = |value: &Value, dimension: &Dimension| match dimension {
        // Bytes without any are read as a list of nothing, and so are they.
        Dimension::Address | Dimension::Origin => matches!(value, Value::Bytes(_)),
        _ => matches!(value, Value::Text(text) if !text.contains('\0')),
    };
    let highest = usize::from(query.order == Order::Highest);
    let (first, rest) = place.split_at_checked(highest).ok_or(QueryError::Cursor)?;
    let (groups, at) = rest.split_at_checked(query.by.len()).ok_or(QueryError::Cursor)?;
    let fits = first.iter().all(number)
        && groups.iter().zip(&query.by).all(|(value, dimension)| group(value, dimension))
        && at.len() == 1
        && at.iter().all(number);
    if fits { Ok(place) } else { Err(QueryError::Cursor) }
}

fn decode(cursor: &str) -> Option<Vec<u8>> {
    if !cursor.is_ascii() || cursor.len() % 2 == 1 {
        return None;
    }
    (0..cursor.len()).step_by(2).map(|at| u8::from_str_radix(cursor.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_written() {
        let by = vec![Dimension::Account, Dimension::Origin];
        let mut query = Query { by, ..Query::default() };
        let row = vec!["shop".into(), Value::Bytes(vec![]), 60.into(), 6.into(), 77.into()];
        let after = read(&query, &write(&query, &row).unwrap()).unwrap();
        assert_eq!(after, row[..3]);
        query.order = Order::Highest;
        let after = read(&query, &write(&query, &row).unwrap()).unwrap();
        assert_eq!(after, [77.into(), "shop".into(), Value::Bytes(vec![]), 60.into()]);
    }

    #[test]
    fn others_are_refused() {
        let query = Query { by: vec![Dimension::Account], ..Query::default() };
        let of = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let wrong = [
            "",
            "7",
            "zz",
            "ä",
            "+1",
            &of("{}"),
            &of("[]"),
            &of("[1,2]"),
            &of("[\"a\"]"),
            &of("[\"a\",1,1]"),
        ];
        for cursor in wrong {
            assert_eq!(read(&query, cursor), Err(QueryError::Cursor), "{cursor}");
        }
        assert_eq!(read(&query, &of("[\"a\",1]")), Ok(vec!["a".into(), 1.into()]));
    }
}
