//! Command line.

use crate::error::Error;
use aegis_usage::{PostgresTls, Retention, RetentionError, SslMode};
use clap::{Parser, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Takes what agents report of use, keeps it, and answers those who may know.
#[derive(Clone, Debug, Parser)]
#[command(version, args_override_self = true)]
pub struct Args {
    /// Where reports are taken and questions answered. Without a certificate only an address of this machine.
    #[arg(long, env = "AEGIS_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Certificate chain in PEM, the server's own first. It is read again when it changes.
    #[arg(long, env = "AEGIS_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key in PEM.
    #[arg(long, env = "AEGIS_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "AEGIS_METRICS_LISTEN", default_value = "0.0.0.0:8080")]
    pub metrics_listen: SocketAddr,
    /// File of SQLite, or `postgres://user:password@host/name`. Better given by the environment, which others on the machine don't see.
    #[arg(long, env = "AEGIS_DATABASE", hide_env_values = true)]
    pub database: String,
    /// How far PostgreSQL is believed, where the connection string doesn't say: `disable` (plain text), `prefer`, `require`, `verify-ca` or
    /// `verify-full`, as in libpq. Without either: `verify-full`, and on a Unix socket no TLS.
    #[arg(long, env = "PGSSLMODE")]
    pub postgres_sslmode: Option<SslMode>,
    /// Authorities in PEM of which PostgreSQL's certificate must be, or `system`, which is so without it, too.
    #[arg(long, env = "PGSSLROOTCERT")]
    pub postgres_sslrootcert: Option<PathBuf>,
    /// Certificate in PEM that is shown to a PostgreSQL that asks for one.
    #[arg(long, env = "PGSSLCERT", requires = "postgres_sslkey")]
    pub postgres_sslcert: Option<PathBuf>,
    /// Its private key in PEM.
    #[arg(long, env = "PGSSLKEY", requires = "postgres_sslcert")]
    pub postgres_sslkey: Option<PathBuf>,
    /// Hours for which figures of 10 seconds are kept.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(i64).range(1..=8_760))]
    pub keep_tens_hours: i64,
    /// Days for which figures of a minute are kept.
    #[arg(long, default_value_t = 14, value_parser = clap::value_parser!(i64).range(1..=3_650))]
    pub keep_minutes_days: i64,
    /// Days for which figures of an hour are kept.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(i64).range(1..=36_500))]
    pub keep_hours_days: i64,
    /// Audience of the tokens that are taken: one that is meant for somebody else is worth nothing here.
    #[arg(long, default_value = "aegis-collector")]
    pub audience: String,
    /// Service account of the agents, as NAMESPACE/NAME: nobody else may deliver.
    #[arg(long, default_value = "aegis-system/aegis-node-agent", value_parser = user)]
    pub agent_service_account: String,
    /// Questions may also be asked with tokens that are meant for the API server, as where people sign in by OIDC. Whoever has hold of the
    /// collector has these tokens, too.
    #[arg(long)]
    pub api_tokens: bool,
    /// Serves GraphiQL at /graphiql, to try questions; only on an address of this machine. Its scripts come from the internet and see the
    /// token that one puts in.
    #[arg(long)]
    pub development: bool,
    /// Where others reach this service, as `https://host:port`: the addresses of feeds begin so.
    #[arg(long, default_value = "https://localhost:8443", value_parser = base)]
    pub public_url: String,
    /// Log filter, as `info` or `aegis_collector=debug,info`.
    #[arg(long, env = "AEGIS_LOG", default_value = "info")]
    pub log: String,
    /// Form of the log.
    #[arg(long, env = "AEGIS_LOG_FORMAT", value_enum, ignore_case = true, default_value = "Json")]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl Args {
    /// What TLS to PostgreSQL is like where the connection string says nothing of it.
    pub fn postgres_tls(&self) -> PostgresTls {
        PostgresTls {
            sslmode: self.postgres_sslmode,
            sslrootcert: self.postgres_sslrootcert.clone(),
            sslcert: self.postgres_sslcert.clone(),
            sslkey: self.postgres_sslkey.clone(),
        }
    }

    /// That nothing is served to others that is for this machine.
    ///
    /// # Errors
    /// Tokens would go over the network in plain text, or others be offered what is for developers.
    pub fn served(&self) -> Result<(), Error> {
        let local = self.listen.ip().is_loopback();
        if !local && self.tls_cert.is_none() {
            return Err(Error::Plain(self.listen));
        }
        if !local && self.development {
            return Err(Error::Development(self.listen));
        }
        Ok(())
    }

    /// For how long each level is kept.
    ///
    /// # Errors
    /// A level is to be kept for less than a finer one.
    pub fn retention(&self) -> Result<Retention, RetentionError> {
        let days = 86_400;
        Retention::new(
            self.keep_tens_hours * 3_600,
            self.keep_minutes_days * days,
            self.keep_hours_days * days,
        )
    }
}

/// The user name of a service account.
fn user(account: &str) -> Result<String, String> {
    match account.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(format!("system:serviceaccount:{namespace}:{name}"))
        }
        _ => Err("must be NAMESPACE/NAME".into()),
    }
}

/// The begin of an address.
fn base(text: &str) -> Result<String, String> {
    let rest = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/[]".contains(c);
    match rest {
        Some(rest) if !rest.is_empty() && rest.chars().all(plain) => Ok(text.trim_end_matches('/').into()),
        _ => Err("must be https://HOST or https://HOST:PORT, and a path if there is one".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["aegis-collector", "--database=usage.db"], more].concat())
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(parse(&[]).unwrap().retention().is_ok());
        assert!(parse(&["--keep-minutes-days=500"]).unwrap().retention().is_err());
        for wrong in [
            "--keep-tens-hours=0",
            "--tls-cert=tls.crt",
            "--postgres-sslmode=allow",
            "--postgres-sslkey=tls.key",
            "--agent-service-account=agent",
            "--log-format=Xml",
            "--public-url=use.example",
            "--public-url=https://",
            "--public-url=https://use.example/\"<",
        ] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
        let served = |more: &[&str]| parse(more).unwrap().served();
        let tls = ["--tls-cert=a", "--tls-key=b"];
        assert!(matches!(served(&[]), Err(Error::Plain(_))));
        assert!(served(&tls).is_ok() && served(&["--listen=[::1]:0", "--development"]).is_ok());
        assert!(matches!(served(&[&tls[..], &["--development"]].concat()), Err(Error::Development(_))));
        let agent = parse(&["--agent-service-account=a/b"]).unwrap().agent_service_account;
        assert_eq!(agent, "system:serviceaccount:a:b");
        let url = parse(&["--public-url=https://use.example:8443/aegis/"]).unwrap().public_url;
        assert_eq!(url, "https://use.example:8443/aegis");
    }
}
