//! Where PostgreSQL is and how far it is believed: a connection string, with the options of TLS as libpq names them, which the driver
//! does not know.

use super::tls::TlsError;
use percent_encoding::percent_decode_str;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

/// Longest time until the server takes a connection, by each of its addresses.
const CONNECT: Duration = Duration::from_secs(5);

/// For how long what was sent may go without being confirmed by the server's machine.
const UNCONFIRMED: Duration = Duration::from_secs(20);

/// After how much rest, and how often then, the server's machine is asked whether it is there; and after how many such without an answer it is not.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);

/// What the driver has where nothing is said.
const IDLE: Duration = Duration::from_secs(2 * 60 * 60);

/// How far the server is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Plain text.
    Disable,
    /// TLS with whomever it is if the server has it, plain text otherwise.
    Prefer,
    /// TLS with whomever it is; with authorities in a file as [`SslMode::VerifyCa`].
    Require,
    /// TLS with a server whose certificate is of a trusted authority, for whatever name.
    VerifyCa,
    /// And for the name that is connected to.
    VerifyFull,
}

impl FromStr for SslMode {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<SslMode, TlsError> {
        Ok(match text {
            "disable" => SslMode::Disable,
            "prefer" => SslMode::Prefer,
            "require" => SslMode::Require,
            "verify-ca" => SslMode::VerifyCa,
            "verify-full" => SslMode::VerifyFull,
            _ => return Err(TlsError::Mode(text.into())),
        })
    }
}

/// Options of a connection, by the names that libpq has for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PostgresTls {
    /// How far the server is believed. None: as far as [`SslMode::VerifyFull`], except on a Unix socket, which needs no TLS.
    pub sslmode: Option<SslMode>,
    /// File of the authorities that are trusted, in PEM. None, or `system`: those of the system.
    pub sslrootcert: Option<PathBuf>,
    /// Our certificate, in PEM, for servers that ask for one.
    pub sslcert: Option<PathBuf>,
    /// Its private key, in PEM.
    pub sslkey: Option<PathBuf>,
}

/// Where PostgreSQL is, and how it is spoken to.
pub struct Address {
    pub(super) config: Config,
    pub(super) tls: PostgresTls,
}

impl Address {
    /// Reads a connection string: `postgres://…` or `host=… user=…`. Options of TLS that it does not have are those of `otherwise`.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str, otherwise: &PostgresTls) -> Result<Address, crate::Error> {
        let mut tls = otherwise.clone();
        let rest = match ["postgres://", "postgresql://"].iter().find(|scheme| text.starts_with(**scheme)) {
            Some(scheme) => url(text, scheme.len(), &mut tls)?,
            None => words(text, &mut tls)?,
        };
        let mut config: Config = rest.parse()?;
        be_impatient(&mut config);
        Ok(Address { config, tls })
    }

    /// Whether it is on this machine, by Unix sockets, where nobody reads along and there is no TLS.
    pub(super) fn local(&self) -> bool {
        let hosts = self.config.get_hosts();
        !hosts.is_empty()
            && self.config.get_hostaddrs().is_empty()
            && hosts.iter().all(|host| matches!(host, Host::Unix(_)))
    }
}

/// Notices within half a minute that the server's machine is gone, or the way to it, where the connection string does not say when.
fn be_impatient(config: &mut Config) {
    let (idle, interval, retries) = KEEPALIVE;
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(UNCONFIRMED);
    }
    if config.get_keepalives_idle() == IDLE {
        config.keepalives_idle(idle);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(interval);
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(retries);
    }
}

impl PostgresTls {
    /// Takes an option: false if it is none of these.
    fn take(&mut self, name: &str, value: &str) -> Result<bool, TlsError> {
        let file = || (!value.is_empty()).then(|| PathBuf::from(value));
        match name {
            "sslmode" => self.sslmode = Some(value.parse()?),
            "sslrootcert" => self.sslrootcert = file(),
            "sslcert" => self.sslcert = file(),
            "sslkey" => self.sslkey = file(),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A URL without the options that were taken. They begin after the first `?` behind user and password, which may have one.
fn url(text: &str, scheme: usize, tls: &mut PostgresTls) -> Result<String, TlsError> {
    let host = text.find('@').map_or(scheme, |at| at + 1);
    let Some(begin) = text[host..].find('?').map(|at| host + at) else { return Ok(text.into()) };
    let mut rest = Vec::new();
    for option in text[begin + 1..].split('&') {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let [name, value] = [name, value].map(|text| percent_decode_str(text).decode_utf8_lossy());
        if !tls.take(&name, &value)? {
            rest.push(option);
        }
    }
    let rest = rest.join("&");
    Ok(if rest.is_empty() { text[..begin].into() } else { format!("{}?{rest}", &text[..begin]) })
}

/// `name=value`s without those that were taken.
fn words(text: &str, tls: &mut PostgresTls) -> Result<String, TlsError> {
    let mut rest = String::new();
    let mut left = text.trim_start();
    while !left.is_empty() {
        // What is no such list the driver refuses, and says why.
        let Some((name, after)) = left.split_once('=') else { return Ok(text.into()) };
        let Some((value, after)) = word(after.trim_start()) else { return Ok(text.into()) };
        left = after.trim_start();
        if !tls.take(name.trim_end(), &value)? {
            let value = value.replace('\\', "\\\\").replace('\'', "\\'");
            rest.push_str(&format!("{}='{value}' ", name.trim_end()));
        }
    }
    Ok(rest)
}

/// A value, in quotes or up to a space, with `\` before what stands for itself; and what follows it.
fn word(text: &str) -> Option<(String, &str)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, char)) = chars.next() {
        match char {
            '\\' => value.push(chars.next()?.1),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            _ if !quoted && char.is_whitespace() => return Some((value, &text[at..])),
            _ => value.push(char),
        }
    }
    (!quoted).then_some((value, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Address {
        Address::parse(text, &PostgresTls::default()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn options_of_tls_are_taken_out_of_either_form() {
        let wanted = PostgresTls {
            sslmode: Some(SslMode::VerifyCa),
            sslrootcert: Some("/a b/ca's.crt".into()),
            sslcert: Some("c".into()),
            sslkey: Some("k".into()),
        };
        for text in [
            "postgres://me:se?same@db.example:6543/use?sslmode=verify-ca&connect_timeout=7&sslrootcert=/a%20b/ca's.crt&sslcert=c&sslkey=k",
            "host = db.example port=6543 user=me password='se?same' dbname=use sslmode=verify-ca connect_timeout=7 \
             sslrootcert='/a b/ca\\'s.crt' sslcert=c sslkey=k",
        ] {
            let Address { config, tls } = parse(text);
            assert_eq!(tls, wanted, "{text}");
            assert_eq!(config.get_hosts(), [Host::Tcp("db.example".into())]);
            assert_eq!((config.get_user(), config.get_dbname()), (Some("me"), Some("use")));
            assert_eq!((config.get_ports(), config.get_password()), (&[6543][..], Some(&b"se?same"[..])));
            assert_eq!(config.get_connect_timeout().map(std::time::Duration::as_secs), Some(7));
        }
        let password = |text: &str| parse(text).config.get_password().map(<[u8]>::to_vec);
        assert_eq!(password(r"host=a password=\'it\\s'x").as_deref(), Some(&br"'it\s'x"[..]));
    }

    #[test]
    fn a_server_that_is_gone_is_noticed_as_soon_as_is_said() {
        let times = |text: &str| {
            let config = parse(text).config;
            let seconds = |it: Option<&Duration>| it.map(Duration::as_secs);
            let keepalive = (
                config.get_keepalives_idle().as_secs(),
                config.get_keepalives_interval(),
                config.get_keepalives_retries(),
            );
            (seconds(config.get_connect_timeout()), seconds(config.get_tcp_user_timeout()), keepalive)
        };
        let five = Some(Duration::from_secs(5));
        assert_eq!(times("postgres://db.example/use"), (Some(5), Some(20), (10, five, Some(3))));
        let said = "host=db.example connect_timeout=60 tcp_user_timeout=90 keepalives_idle=70 keepalives_interval=80 keepalives_retries=9";
        assert_eq!(times(said), (Some(60), Some(90), (70, Some(Duration::from_secs(80)), Some(9))));
    }

    #[test]
    fn what_the_connection_string_says_comes_first() {
        let otherwise = PostgresTls {
            sslmode: Some(SslMode::Require),
            sslrootcert: Some("ca.crt".into()),
            ..PostgresTls::default()
        };
        let tls = Address::parse("postgres://db.example/use?sslmode=disable", &otherwise).unwrap().tls;
        assert_eq!(tls, PostgresTls { sslmode: Some(SslMode::Disable), ..otherwise });
    }

    #[test]
    fn what_is_no_mode_or_no_connection_string_is_refused() {
        for wrong in [
            "postgres://db.example/use?sslmode=allow",
            "host=db.example sslmode=verify_full",
            "host=db.example sslmode",
            "host='db.example",
            "postgres://db.example/use?sslpassword=x",
        ] {
            assert!(Address::parse(wrong, &PostgresTls::default()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_unix_sockets_are_local() {
        assert!(parse("host=/run/postgresql user=me").local());
        for remote in ["host=localhost", "host=/run/postgresql,db.example", "host=/run/p hostaddr=192.0.2.1"]
        {
            assert!(!parse(remote).local(), "{remote}");
        }
    }
}
