//! DNS messages, as far as they matter here.

use aegis_core::policy::names::{Record, normal};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::svcb::{SVCB, SvcParamValue};
use hickory_proto::rr::{Name, RData, Record as Rr, RecordType};
use std::net::IpAddr;

/// Why a message cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It is none.
    #[error("no DNS message: {0}")]
    Decode(#[from] hickory_proto::serialize::binary::DecodeError),
    /// It cannot be written.
    #[error("cannot write a DNS message: {0}")]
    Encode(#[from] hickory_proto::ProtoError),
    /// It does not answer the query.
    #[error("not an answer to the query")]
    Other,
}

/// What an answer says.
#[derive(Debug)]
pub struct Answer {
    /// What matters here of all of its records: a resolver of somebody's may use any of them.
    pub records: Vec<Record>,
    /// It did not fit: whoever asked asks again over TCP.
    pub truncated: bool,
    /// Whether the name exists, or why nobody knows.
    pub code: ResponseCode,
}

/// Reads the answer to a query.
pub fn read(query: &Message, answer: &[u8]) -> Result<Answer, MessageError> {
    let answer = Message::from_vec(answer)?;
    let question = |message: &Message| -> Vec<Query> {
        let lower = |query: &Query| {
            let mut query = query.clone();
            query.name = query.name.to_lowercase();
            query
        };
        message.queries.iter().map(lower).collect()
    };
    let fits = answer.metadata.id == query.metadata.id
        && answer.metadata.message_type == MessageType::Response
        // A server that cannot read the query answers without.
        && (answer.queries.is_empty() && answer.answers.is_empty() || question(&answer) == question(query));
    if !fits {
        return Err(MessageError::Other);
    }
    let records = answer.answers.iter().chain(&answer.authorities).chain(&answer.additionals);
    Ok(Answer {
        records: records.flat_map(record).collect(),
        truncated: answer.metadata.truncation,
        code: answer.metadata.response_code,
    })
}

fn record(record: &Rr) -> Vec<Record> {
    let name = normal(&record.name.to_ascii());
    let address = |address: IpAddr| Record::Address(name.clone(), address, record.ttl);
    match &record.data {
        RData::A(found) => vec![address(IpAddr::V4(found.0))],
        RData::AAAA(found) => vec![address(IpAddr::V6(found.0))],
        RData::CNAME(of) => vec![Record::Alias(name, normal(&of.0.to_ascii()))],
        RData::HTTPS(service) => hints(&service.0, &name, record.ttl),
        RData::SVCB(service) => hints(service, &name, record.ttl),
        _ => Vec::new(),
    }
}

/// A service's record may name the addresses at which it is, and another name under which it is.
fn hints(service: &SVCB, name: &str, ttl: u32) -> Vec<Record> {
    let addresses = service.svc_params.iter().flat_map(|(_, value)| -> Vec<IpAddr> {
        match value {
            SvcParamValue::Ipv4Hint(hint) => hint.0.iter().map(|it| IpAddr::V4(it.0)).collect(),
            SvcParamValue::Ipv6Hint(hint) => hint.0.iter().map(|it| IpAddr::V6(it.0)).collect(),
            _ => Vec::new(),
        }
    });
    let mut records: Vec<Record> =
        addresses.map(|address| Record::Address(name.to_owned(), address, ttl)).collect();
    if !service.target_name.is_root() {
        records.push(Record::Alias(name.to_owned(), normal(&service.target_name.to_ascii())));
    }
    records
}

/// What is answered to somebody who must not get the true answer.
pub fn refusal(query: &Message) -> Result<Vec<u8>, MessageError> {
    let mut message = Message::error_msg(query.metadata.id, query.metadata.op_code, ResponseCode::ServFail);
    message.metadata.recursion_desired = query.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.add_queries(query.queries.clone());
    Ok(message.to_vec()?)
}

/// A query for addresses of one kind.
pub fn query(id: u16, name: &str, kind: RecordType) -> Result<Message, MessageError> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(format!("{name}."))?, kind));
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::rdata::{A, CNAME};
    use std::net::Ipv4Addr;

    fn answer(to: &Message) -> Message {
        let mut message = Message::response(to.metadata.id, to.metadata.op_code);
        message.add_queries(to.queries.clone());
        message
    }

    #[test]
    fn an_answer_is_read_whatever_the_case_of_its_names() {
        let query = query(7, "API.example.com", RecordType::A).unwrap();
        let mut message = answer(&query);
        message.queries[0].name = message.queries[0].name.to_lowercase();
        let name = |text| Name::from_ascii(text).unwrap();
        let alias = RData::CNAME(CNAME(name("CDN.example.net.")));
        message.add_answer(Rr::from_rdata(name("Api.Example.com."), 60, alias));
        let address = RData::A(A(Ipv4Addr::new(198, 51, 100, 7)));
        message.add_answer(Rr::from_rdata(name("cdn.example.NET."), 5, address));
        let read = read(&query, &message.to_vec().unwrap()).unwrap();
        let expected = [
            Record::Alias("api.example.com".into(), "cdn.example.net".into()),
            Record::Address("cdn.example.net".into(), Ipv4Addr::new(198, 51, 100, 7).into(), 5),
        ];
        assert_eq!(read.records, expected);
        assert!(!read.truncated && read.code == ResponseCode::NoError);
    }

    #[test]
    fn what_answers_something_else_is_no_answer() {
        let query = query(7, "api.example.com", RecordType::A).unwrap();
        let right = answer(&query);
        assert!(read(&query, &right.to_vec().unwrap()).is_ok());
        let mut wrong = [right.clone(), right.clone(), right];
        wrong[0].metadata.id = 8;
        wrong[1].metadata.message_type = MessageType::Query;
        wrong[2].queries[0].name = Name::from_ascii("evil.example.").unwrap();
        for message in wrong {
            let bytes = message.to_vec().unwrap();
            assert!(matches!(read(&query, &bytes), Err(MessageError::Other)), "{message:?}");
        }
        assert!(matches!(read(&query, b"\0\x07no"), Err(MessageError::Decode(_))));
    }

    #[test]
    fn a_refusal_answers_the_query() {
        let query = query(9, "api.example.com", RecordType::AAAA).unwrap();
        let read = read(&query, &refusal(&query).unwrap()).unwrap();
        assert_eq!(read.code, ResponseCode::ServFail);
        assert!(read.records.is_empty());
    }
}
