//! Agreement of replicas on one leader, by compare-and-swap on a Lease.

mod candidate;

use crate::args::Args;
use crate::error::{Error, call};
use crate::gate::Gate;
use crate::metrics::Metrics;
use candidate::{Candidate, Step};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How often the lease is renewed, or looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Takes part in the election of a leader.
pub struct Election {
    /// Access to the Lease.
    pub leases: Api<Lease>,
    /// Name of the Lease.
    pub name: String,
    /// Opened while this replica leads.
    pub gate: Arc<Gate>,
    /// Told when this replica begins to lead.
    pub won: Arc<Notify>,
    /// For the gauge.
    pub metrics: Metrics,
    candidate: Candidate,
}

impl Election {
    /// Nobody leads yet.
    pub fn new(
        client: &Client,
        args: &Args,
        gate: Arc<Gate>,
        won: Arc<Notify>,
        metrics: Metrics,
    ) -> Election {
        Election {
            leases: Api::namespaced(client.clone(), &args.namespace),
            name: args.lease.clone(),
            gate,
            won,
            metrics,
            candidate: Candidate::new(&args.identity),
        }
    }

    /// Runs until `stop` resolves, then gives the lease back. Nothing may be written after `stop`.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let mut leading = false;
        loop {
            if let Err(error) = self.turn().await {
                tracing::warn!(error = %error, "leader election");
            }
            if self.gate.is_open() != leading {
                leading = !leading;
                tracing::info!(leading, "leader election");
                self.won.notify_one();
            }
            self.metrics.leading(leading);
            tokio::select! {
                () = &mut stop => break,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
        self.gate.shut();
        if let Err(error) = self.release().await {
            tracing::warn!(error = %error, "could not give the lease back");
        }
    }

    async fn turn(&mut self) -> Result<(), Error> {
        let lease = self.read().await?;
        let sent = self.gate.now();
        let meta = lease.as_ref().map(|lease| lease.metadata.clone());
        let step = self.candidate.step(lease.as_ref(), sent, Timestamp::now());
        let written = match (step, meta) {
            (Step::Write(spec), Some(metadata)) => {
                let lease = Lease { metadata, spec: Some(spec) };
                call(self.leases.replace(&self.name, &PostParams::default(), &lease)).await
            }
            (Step::Write(spec), None) => {
                let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
                call(self.leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) })).await
            }
            (Step::Wait, _) => return Ok(()),
        };
        match written {
            Ok(_) => {
                self.gate.open_until(self.candidate.wrote(sent));
                Ok(())
            }
            Err(error) if error.is_conflict() => {
                tracing::debug!("another replica wrote the lease first");
                Ok(())
            }
            Err(error) => Err(Error::WriteLease(error)),
        }
    }

    async fn release(&mut self) -> Result<(), Error> {
        let Some(lease) = self.read().await? else { return Ok(()) };
        let Some(spec) = self.candidate.release(&lease, Timestamp::now()) else { return Ok(()) };
        let lease = Lease { metadata: lease.metadata, spec: Some(spec) };
        call(self.leases.replace(&self.name, &PostParams::default(), &lease))
            .await
            .map(|_| tracing::info!("gave the lease back"))
            .map_err(Error::WriteLease)
    }

    async fn read(&self) -> Result<Option<Lease>, Error> {
        call(self.leases.get_opt(&self.name)).await.map_err(Error::ReadLease)
    }
}
