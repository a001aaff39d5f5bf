//! Custom resources of Aegis, API group `aegis.dev/v1alpha1`.
//!
//! These types are the only source of the CRD manifests: `crdgen` writes `crds/generated/`, and a drift between the
//! two fails the tests. Doc comments on fields are the user's manual (`kubectl explain`).

mod condition;
mod egress_address;
mod egress_allocation;
mod egress_application;
mod egress_node;
mod egress_policy;
mod prefix;
pub mod rules;
mod schema;
pub mod services;
mod usage_alert;
mod zone_binding;

pub use condition::{Condition, reason, type_};
pub use egress_address::*;
pub use egress_allocation::*;
pub use egress_application::*;
pub use egress_node::*;
pub use egress_policy::*;
pub use prefix::*;
pub use usage_alert::*;
pub use zone_binding::*;

/// API group of all kinds.
pub const GROUP: &str = "aegis.dev";
/// Version of all kinds.
pub const VERSION: &str = "v1alpha1";
/// Finalizer that the operator puts on objects which must outlive their use.
pub const FINALIZER: &str = "aegis.dev/in-use";
