use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// A request's JSON object, read field by field, so that an error can name its field.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad_request("the request's body is not a JSON object")),
            Err(error) => Err(ApiError::bad_request(format!("JSON decode error: {error}"))),
        }
    }

    /// None where the field is missing or null. Can be taken once.
    pub(super) fn optional<T: DeserializeOwned>(
        &mut self,
        field: &str,
    ) -> Result<Option<T>, ApiError> {
        match self.0.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| ApiError::bad_field(field, format!("{field}: {error}"))),
        }
    }

    pub(super) fn required<T: DeserializeOwned>(&mut self, field: &str) -> Result<T, ApiError> {
        self.optional(field)?
            .ok_or_else(|| ApiError::bad_field(field, format!("{field}: field required")))
    }

    pub(super) fn flag(&mut self, field: &str) -> Result<bool, ApiError> {
        Ok(self.optional(field)?.unwrap_or(false))
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(|value| !value.is_null())
    }
}
