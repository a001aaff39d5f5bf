//! TLS to PostgreSQL: whom to believe, and what to do when that is not who answers.

use super::address::{Address, PostgresTls, SslMode};
use crate::sql::Error;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_postgres::config::SslMode as Negotiation;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Config, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Why TLS cannot be spoken as it is wanted.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A mode that is none, or that promises nothing.
    #[error("sslmode={0} is none of disable, prefer, require, verify-ca and verify-full")]
    Mode(String),
    /// Authorities that hand out certificates to everybody, without a look at the name.
    #[error(
        "sslmode={0} with the authorities of the system believes everybody who has a certificate: name the server's authority by sslrootcert, or use verify-full"
    )]
    Everybody(&'static str),
    /// Half of a client certificate.
    #[error("sslcert and sslkey go together")]
    Half,
    /// A file cannot be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: pem::Error,
    },
    /// There is nobody to trust.
    #[error("the system has no authorities to trust: name a file of them by sslrootcert")]
    Nobody,
    /// Of certificates or keys in files.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// Where the authorities come from.
enum Roots<'a> {
    System,
    File(&'a Path),
}

/// Connects, in a loop that goes on with what calls it. The files are read each time, since a renewed one may be there.
pub(super) async fn connect(address: &Address) -> Result<Client, Error> {
    let mode = match address.tls.sslmode {
        _ if address.local() => SslMode::Disable,
        mode => mode.unwrap_or(SslMode::VerifyFull),
    };
    let mut config = address.config.clone();
    let connected = if mode == SslMode::Disable {
        config.ssl_mode(Negotiation::Disable);
        dial(&config, NoTls).await
    } else {
        let plain = mode == SslMode::Prefer;
        config.ssl_mode(if plain { Negotiation::Prefer } else { Negotiation::Require });
        dial(&config, MakeRustlsConnect::new(client(&address.tls, mode)?)).await
    };
    connected.map_err(|error| match remedy(&error, mode) {
        Some(remedy) => Error::Connect { error, remedy },
        None => error.into(),
    })
}

async fn dial<T>(config: &Config, tls: T) -> Result<Client, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket, Stream: Send + 'static>,
{
    let (client, connection) = config.connect(tls).await?;
    tokio::spawn(async move {
        // Whoever asks is told, too.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to PostgreSQL ends");
        }
    });
    Ok(client)
}

fn client(tls: &PostgresTls, mode: SslMode) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let roots = match tls.sslrootcert.as_deref() {
        Some(path) if path != Path::new("system") => Roots::File(path),
        _ => Roots::System,
    };
    let builder = match (mode, roots) {
        (SslMode::VerifyFull, roots) => builder.with_root_certificates(authorities(roots)?),
        (SslMode::VerifyCa, Roots::System) => return Err(TlsError::Everybody("verify-ca")),
        (SslMode::VerifyCa | SslMode::Require, roots @ Roots::File(_)) => builder
            .dangerous()
            .with_custom_certificate_verifier(AnyName::of(Some(authorities(roots)?), &provider)),
        (SslMode::Require | SslMode::Prefer | SslMode::Disable, _) => {
            builder.dangerous().with_custom_certificate_verifier(AnyName::of(None, &provider))
        }
    };
    let mut config = match (&tls.sslcert, &tls.sslkey) {
        (None, None) => builder.with_no_client_auth(),
        (Some(chain), Some(path)) => {
            let source = |source| TlsError::File { path: path.clone(), source };
            builder.with_client_auth_cert(
                certificates(chain)?,
                PrivateKeyDer::from_pem_file(path).map_err(source)?,
            )?
        }
        _ => return Err(TlsError::Half),
    };
    // What servers of version 17 ask for where TLS comes first (sslnegotiation=direct).
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

fn authorities(from: Roots<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    match from {
        Roots::File(path) => certificates(path)?.into_iter().try_for_each(|it| roots.add(it))?,
        Roots::System => {
            // One that cannot be read is one less to trust.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TlsError::Nobody);
            }
        }
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File { path: path.into(), source };
    let found: Vec<_> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(failed)?;
    if found.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// Believes a server whatever its name is: with authorities, one of theirs; without, whoever it is.
#[derive(Debug)]
struct AnyName {
    roots: Option<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl AnyName {
    fn of(roots: Option<RootCertStore>, provider: &CryptoProvider) -> Arc<AnyName> {
        Arc::new(AnyName { roots, algorithms: provider.signature_verification_algorithms })
    }
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        server: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let server = ParsedCertificate::try_from(server)?;
            verify_server_cert_signed_by_trust_anchor(
                &server,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What somebody can do about a connection that failed.
fn remedy(error: &tokio_postgres::Error, mode: SslMode) -> Option<&'static str> {
    if mode == SslMode::Disable && error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) {
        return Some("if it wants TLS, take sslmode=disable away");
    }
    let cause = error.source()?;
    // The driver's own words; it has no other sign for it.
    if cause.to_string() == "server does not support TLS" {
        return Some(
            "switch it on there (ssl = on); or say sslmode=disable, where nobody can read the password and the figures on their way",
        );
    }
    let cause = cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::InvalidCertificate(cause) = cause else { return None };
    Some(match cause {
        CertificateError::UnknownIssuer | CertificateError::BadSignature | CertificateError::Other(_) => {
            "name the file of the authority that made its certificate by sslrootcert"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "connect by a name that is in its certificate (subjectAltName); or say sslmode=verify-ca, if that authority makes certificates for servers of yours only"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "renew its certificate",
        _ => return None,
    })
}
