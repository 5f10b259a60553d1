use baton_types::{self as types, Epoch, Generation, HandoffId, Origin};

use crate::generated as wire;

/// A message whose fields a peer has no right to fill like this.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("{message}.{field} is missing")]
    Missing { message: &'static str, field: &'static str },
    #[error("{message}.{field} is {value}: expected {expected}")]
    Invalid { message: &'static str, field: &'static str, value: String, expected: &'static str },
}

impl From<types::Role> for wire::Role {
    fn from(role: types::Role) -> Self {
        match role {
            types::Role::Prefill => Self::Prefill,
            types::Role::Decode => Self::Decode,
        }
    }
}

impl TryFrom<wire::Role> for types::Role {
    type Error = WireError;

    fn try_from(role: wire::Role) -> Result<Self, WireError> {
        match role {
            wire::Role::Prefill => Ok(Self::Prefill),
            wire::Role::Decode => Ok(Self::Decode),
            wire::Role::Unspecified => Err(WireError::Missing { message: "Hello", field: "role" }),
        }
    }
}

impl From<types::Leg> for wire::Leg {
    fn from(leg: types::Leg) -> Self {
        match leg {
            types::Leg::Prefill => Self::Prefill,
            types::Leg::Decode => Self::Decode,
            types::Leg::Aggregated => Self::Aggregated,
            types::Leg::Lend => Self::Lend,
        }
    }
}

impl TryFrom<wire::Leg> for types::Leg {
    type Error = WireError;

    fn try_from(leg: wire::Leg) -> Result<Self, WireError> {
        match leg {
            wire::Leg::Prefill => Ok(Self::Prefill),
            wire::Leg::Decode => Ok(Self::Decode),
            wire::Leg::Aggregated => Ok(Self::Aggregated),
            wire::Leg::Lend => Ok(Self::Lend),
            wire::Leg::Unspecified => Err(WireError::Missing { message: "StartJob", field: "leg" }),
        }
    }
}

impl From<&types::Compatibility> for wire::Compatibility {
    fn from(c: &types::Compatibility) -> Self {
        Self {
            model: c.model.clone(),
            revision: c.revision.clone(),
            kv_dtype: c.kv_dtype.clone(),
            kv_layout: c.kv_layout.clone(),
            block_size_tokens: c.block_size_tokens,
            block_bytes: c.block_bytes,
            tensor_parallel_rank: c.tensor_parallel_rank,
            tensor_parallel_size: c.tensor_parallel_size,
            connector_version: c.connector_version.clone(),
            kv_heads: c.kv_heads.clone(),
            layer_groups: c.layer_groups,
        }
    }
}

impl From<wire::Compatibility> for types::Compatibility {
    fn from(c: wire::Compatibility) -> Self {
        Self {
            model: c.model,
            revision: c.revision,
            kv_dtype: c.kv_dtype,
            kv_layout: c.kv_layout,
            block_size_tokens: c.block_size_tokens,
            block_bytes: c.block_bytes,
            tensor_parallel_rank: c.tensor_parallel_rank,
            tensor_parallel_size: c.tensor_parallel_size,
            connector_version: c.connector_version,
            kv_heads: c.kv_heads,
            layer_groups: c.layer_groups.max(1),
        }
    }
}

impl wire::StepModel {
    /// A model that was fitted to so many observed steps.
    pub fn fitted(model: &types::StepModel, samples: u64) -> Self {
        Self {
            prefill_ms: model.prefill_ms.to_vec(),
            decode_ms: model.decode_ms.to_vec(),
            prefill_interference_factor: model.prefill_interference_factor,
            samples,
        }
    }
}

impl TryFrom<&wire::StepModel> for types::StepModel {
    type Error = WireError;

    fn try_from(model: &wire::StepModel) -> Result<Self, WireError> {
        let factor = model.prefill_interference_factor;
        let [prefill_interference_factor] =
            coefficients("prefill_interference_factor", &[factor], "a finite number from 0 up")?;
        let three = "three finite numbers from 0 up";
        Ok(Self {
            prefill_ms: coefficients("prefill_ms", &model.prefill_ms, three)?,
            decode_ms: coefficients("decode_ms", &model.decode_ms, three)?,
            prefill_interference_factor,
        })
    }
}

fn coefficients<const N: usize>(
    field: &'static str,
    values: &[f64],
    expected: &'static str,
) -> Result<[f64; N], WireError> {
    let possible = values.iter().all(|value| value.is_finite() && *value >= 0.0);
    values.try_into().ok().filter(|_| possible).ok_or_else(|| WireError::Invalid {
        message: "StepModel",
        field,
        value: format!("{values:?}"),
        expected,
    })
}

impl From<&types::Fault> for wire::Fault {
    fn from(fault: &types::Fault) -> Self {
        Self {
            origin: fault.origin.as_str().to_owned(),
            kind: fault.kind.as_str().to_owned(),
            message: fault.message.clone(),
        }
    }
}

impl TryFrom<wire::Fault> for types::Fault {
    type Error = WireError;

    fn try_from(fault: wire::Fault) -> Result<Self, WireError> {
        let origin = Origin::ALL.into_iter().find(|origin| origin.as_str() == fault.origin);
        let kind = types::FaultKind::ALL.into_iter().find(|kind| kind.as_str() == fault.kind);
        match (origin, kind) {
            (None, _) => Err(WireError::Invalid {
                message: "Fault",
                field: "origin",
                value: fault.origin,
                expected: "a name of baton_types::Origin",
            }),
            (_, None) => Err(WireError::Invalid {
                message: "Fault",
                field: "kind",
                value: fault.kind,
                expected: "a name of baton_types::FaultKind",
            }),
            (Some(origin), Some(kind)) => Ok(Self { origin, kind, message: fault.message }),
        }
    }
}

/// Reads the 16 bytes of an epoch.
pub fn epoch(message: &'static str, bytes: &[u8]) -> Result<Epoch, WireError> {
    Epoch::from_slice(bytes).map_err(|_| wrong_length(message, "epoch", bytes.len(), "16 bytes"))
}

/// Reads the 32 bytes of a certificate's SHA-256.
pub fn fingerprint(message: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| {
        wrong_length(message, "certificate_fingerprint", bytes.len(), "the 32 bytes of a SHA-256")
    })
}

impl wire::Handoff {
    /// Reads the id and generation.
    pub fn name(&self) -> Result<(HandoffId, Generation), WireError> {
        let id = HandoffId::from_slice(&self.id)
            .map_err(|_| wrong_length("Handoff", "id", self.id.len(), "16 bytes"))?;
        Ok((id, Generation(self.generation)))
    }
}

fn wrong_length(
    message: &'static str,
    field: &'static str,
    len: usize,
    expected: &'static str,
) -> WireError {
    WireError::Invalid { message, field, value: format!("{len} bytes"), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_model_that_cannot_be_is_refused() {
        let model = types::StepModel {
            prefill_ms: [16.0, 0.12, 2.5e-6],
            decode_ms: [11.0, 0.06, 2.6e-5],
            prefill_interference_factor: 0.8,
        };
        let wire = wire::StepModel::fitted(&model, 7);
        assert_eq!(types::StepModel::try_from(&wire).unwrap(), model);
        for decode_ms in [vec![1.0, 2.0], vec![1.0, -2.0, 3.0], vec![f64::NAN, 2.0, 3.0]] {
            let bad = wire::StepModel { decode_ms, ..wire.clone() };
            let error = types::StepModel::try_from(&bad).unwrap_err().to_string();
            assert!(error.starts_with("StepModel.decode_ms is ["), "{error}");
        }
        let bad = wire::StepModel { prefill_interference_factor: -1.0, ..wire };
        assert!(types::StepModel::try_from(&bad).is_err());
    }
}
