//! The feed of an account, as RSS 2.0 and as Atom.

use super::item::{Item, moment};
use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};
use std::io;

/// What namespaces of XML the forms have.
const ATOM: &str = "http://www.w3.org/2005/Atom";

/// Of `tag:` identities (RFC 4151): whose they are, and since when.
const AUTHORITY: &str = "tag:aegis.dev,2026";

/// Minutes after which readers may come again.
const MINUTES: &str = "1";

/// The two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// RSS 2.0.
    Rss,
    /// Atom, RFC 4287.
    Atom,
}

/// What is in a feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Whose it is: a namespace.
    pub account: String,
    /// Where the service is, without a slash at the end.
    pub base: String,
    /// Where the feed is.
    pub address: String,
    /// When it changed for the last time, in seconds since the Unix epoch.
    pub updated: i64,
    /// Its items, the newest first.
    pub items: Vec<Item>,
}

type Xml = Writer<Vec<u8>>;

impl Form {
    /// The one that a file of this name has.
    pub fn of(file: &str) -> Option<Form> {
        match file {
            "rss.xml" => Some(Form::Rss),
            "atom.xml" => Some(Form::Atom),
            _ => None,
        }
    }

    /// Media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Form::Rss => "application/rss+xml; charset=utf-8",
            Form::Atom => "application/atom+xml; charset=utf-8",
        }
    }
}

impl Feed {
    /// The document.
    ///
    /// # Errors
    /// It cannot be written, which memory does not do.
    pub fn write(&self, form: Form) -> io::Result<Vec<u8>> {
        let mut xml = Writer::new_with_indent(Vec::new(), b' ', 1);
        xml.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
        match form {
            Form::Rss => self.rss(&mut xml)?,
            Form::Atom => self.atom(&mut xml)?,
        }
        Ok(xml.into_inner())
    }

    fn title(&self) -> String {
        format!("Egress alerts of {}", self.account)
    }

    fn rss(&self, xml: &mut Xml) -> io::Result<()> {
        let root = xml.create_element("rss").with_attribute(("version", "2.0"));
        root.with_attribute(("xmlns:atom", ATOM)).write_inner_content(|xml| {
            xml.create_element("channel").write_inner_content(|xml| {
                text(xml, "title", &self.title())?;
                text(xml, "link", &self.base)?;
                text(xml, "description", "What was raised and cleared by UsageAlerts, the newest first")?;
                text(xml, "lastBuildDate", &date(self.updated))?;
                text(xml, "ttl", MINUTES)?;
                let link =
                    xml.create_element("atom:link").with_attribute(("href", clean(&self.address).as_str()));
                link.with_attribute(("rel", "self"))
                    .with_attribute(("type", "application/rss+xml"))
                    .write_empty()?;
                self.items.iter().try_for_each(|item| rss_item(xml, item))
            })?;
            Ok(())
        })?;
        Ok(())
    }

    fn atom(&self, xml: &mut Xml) -> io::Result<()> {
        let root = xml.create_element("feed").with_attribute(("xmlns", ATOM));
        root.write_inner_content(|xml| {
            text(xml, "id", &format!("{AUTHORITY}:usage-alerts/{}", self.account))?;
            text(xml, "title", &self.title())?;
            text(xml, "updated", &moment(self.updated))?;
            xml.create_element("author").write_inner_content(|xml| text(xml, "name", "Aegis"))?;
            let link = xml.create_element("link").with_attribute(("href", clean(&self.address).as_str()));
            link.with_attribute(("rel", "self"))
                .with_attribute(("type", "application/atom+xml"))
                .write_empty()?;
            self.items.iter().try_for_each(|item| atom_entry(xml, item))
        })?;
        Ok(())
    }
}

fn rss_item(xml: &mut Xml, item: &Item) -> io::Result<()> {
    xml.create_element("item").write_inner_content(|xml| {
        text(xml, "title", &item.title())?;
        text(xml, "description", &html(item))?;
        text(xml, "category", &item.key.alert)?;
        let guid = xml.create_element("guid").with_attribute(("isPermaLink", "false"));
        guid.write_text_content(BytesText::new(&identity(item)))?;
        text(xml, "pubDate", &date(item.published))
    })?;
    Ok(())
}

fn atom_entry(xml: &mut Xml, item: &Item) -> io::Result<()> {
    xml.create_element("entry").write_inner_content(|xml| {
        text(xml, "id", &identity(item))?;
        text(xml, "title", &item.title())?;
        text(xml, "updated", &moment(item.published))?;
        text(xml, "published", &moment(item.published))?;
        xml.create_element("category")
            .with_attribute(("term", clean(&item.key.alert).as_str()))
            .write_empty()?;
        let content = xml.create_element("content").with_attribute(("type", "html"));
        content.write_text_content(BytesText::new(&clean(&html(item))))?;
        Ok(())
    })?;
    Ok(())
}

fn identity(item: &Item) -> String {
    format!("{AUTHORITY}:usage-alert/{}/{}", item.account, item.id)
}

fn text(xml: &mut Xml, name: &str, content: &str) -> io::Result<()> {
    xml.create_element(name).write_text_content(BytesText::new(&clean(content))).map(|_| ())
}

/// Readers take it for HTML: whatever has come from elsewhere must not be.
fn html(item: &Item) -> String {
    let escaped = |text: &String| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    item.text().iter().map(|text| format!("<p>{}</p>", escaped(text))).collect()
}

/// Without characters that XML has no way to write.
fn clean(text: &str) -> String {
    let known = |c: char| (c >= ' ' || "\t\n\r".contains(c)) && !['\u{fffe}', '\u{ffff}'].contains(&c);
    text.chars().map(|c| if known(c) { c } else { '\u{fffd}' }).collect()
}

/// As RSS has it.
pub(crate) fn date(second: i64) -> String {
    let time = jiff::Timestamp::from_second(second).unwrap_or_default();
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    printer.timestamp_to_rfc9110_string(&time).unwrap_or_default()
}
