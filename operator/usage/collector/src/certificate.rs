//! The certificate, read again when it changes.

use crate::metrics::Metrics;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// How often the files are looked at. A Secret takes longer to reach them.
const EVERY: Duration = Duration::from_secs(2);

/// Why certificate and key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file is not PEM, or has not what is needed.
    #[error("{path}: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// They do not belong together, or are of a kind that nobody understands.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// Certificate and key in files.
#[derive(Debug)]
pub struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Reads them.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn open(chain: PathBuf, key: PathBuf) -> Result<Arc<Certificate>, CertificateError> {
        let provider = Arc::new(ring::default_provider());
        let files = read(&chain, &key)?;
        let current = RwLock::new(Arc::new(parse(&files, (&chain, &key), &provider)?));
        Ok(Arc::new(Certificate { chain, key, provider, current }))
    }

    /// How connections are made with it.
    ///
    /// # Errors
    /// The provider has no version of TLS in common with this.
    pub fn config(self: &Arc<Certificate>) -> Result<ServerConfig, CertificateError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Reads the files again whenever they change, for ever. Until they can be used those before stay in use.
    pub async fn follow(self: Arc<Certificate>, metrics: Metrics) {
        let mut tried = read(&self.chain, &self.key).ok();
        loop {
            tokio::time::sleep(EVERY).await;
            let files = match read(&self.chain, &self.key) {
                Ok(files) if tried.as_ref() == Some(&files) => continue,
                Ok(files) => files,
                // While they are replaced.
                Err(_) => continue,
            };
            match parse(&files, (&self.chain, &self.key), &self.provider) {
                Ok(new) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
                    tracing::info!("the certificate has changed");
                }
                Err(error) => {
                    metrics.certificate_failed();
                    tracing::warn!(%error, "the new certificate cannot be used; the one before stays");
                }
            }
            tried = Some(files);
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Bytes of the chain and of the key. They are small.
type Files = (Vec<u8>, Vec<u8>);

fn read(chain: &PathBuf, key: &PathBuf) -> Result<Files, CertificateError> {
    let file = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| CertificateError::Read { path: path.clone(), source })
    };
    Ok((file(chain)?, file(key)?))
}

fn parse(
    files: &Files,
    paths: (&PathBuf, &PathBuf),
    provider: &CryptoProvider,
) -> Result<CertifiedKey, CertificateError> {
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| CertificateError::Pem { path, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files.0).collect();
    let chain = chain.map_err(failed(paths.0))?;
    if chain.is_empty() {
        return Err(failed(paths.0)(pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_slice(&files.1).map_err(failed(paths.1))?;
    Ok(CertifiedKey::from_der(chain, key, provider)?)
}
