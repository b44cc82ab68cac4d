//! The words of `docs/decisions/host-driver.md`, as JSON.

use std::collections::BTreeMap;

use http::StatusCode;
use serde::{Deserialize, Serialize};

/// Kubernetes' resources and quantities: `cpu: 2`, `memory: 4Gi`.
pub type Amounts = BTreeMap<String, String>;

/// A kind of machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    pub name: String,
    /// GOARCH.
    pub arch: String,
    pub capacity: Amounts,
    /// What its Node will offer.
    pub allocatable: Amounts,
    pub offerings: Vec<Offering>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offering {
    pub zone: String,
    pub capacity_type: String,
    pub price: f64,
    pub available: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Class {
    pub name: String,
    /// A lab's hosts have none.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub class: Class,
    pub shape: String,
    pub zone: String,
    pub capacity_type: String,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub taints: Vec<Taint>,
    pub bootstrap: Bootstrap,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taint {
    pub key: String,
    pub effect: String,
}

/// How the host joins its cell, once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    pub server: String,
    /// PEM.
    pub authority: String,
    pub token: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    pub name: String,
    pub provider_id: String,
    pub class: String,
    pub shape: String,
    pub zone: String,
    pub capacity_type: String,
    pub labels: BTreeMap<String, String>,
    pub state: &'static str,
    pub created_at: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    OutOfCapacity,
    NotFound,
    Invalid,
    Conflict,
    /// To be asked again.
    Unavailable,
}

impl Code {
    pub fn status(self) -> StatusCode {
        match self {
            Self::OutOfCapacity => StatusCode::TOO_MANY_REQUESTS,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Conflict => StatusCode::CONFLICT,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub fn because(self, message: impl std::fmt::Display) -> Refusal {
        Refusal {
            code: self,
            message: message.to_string(),
        }
    }
}
