use serde::{Deserialize, Serialize};

/// What two engines must share before the KV of one means anything to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compatibility {
    /// Model name or path as the engine loaded it, without the machine's own directories.
    pub model: String,
    /// Revision or a digest of the model's configuration; empty where the engine knows none.
    pub revision: String,
    /// Element type of the KV cache, as the engine names it (`float32`, `fp8_e4m3`).
    pub kv_dtype: String,
    /// Memory order of one block, as the engine names it.
    pub kv_layout: String,
    pub block_size_tokens: u32,
    /// Bytes of one block on one rank, all layers together.
    pub block_bytes: u64,
    pub tensor_parallel_rank: u32,
    pub tensor_parallel_size: u32,
    /// Version of the software that lays the blocks out.
    pub connector_version: String,
}

/// The first field in which two engines differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} differs: {ours} here, {theirs} at the peer")]
pub struct CompatibilityMismatch {
    pub field: &'static str,
    pub ours: String,
    pub theirs: String,
}

impl Compatibility {
    /// A digest that is equal when every field is.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for (name, value) in self.fields() {
            for part in [name.as_bytes(), value.as_bytes()] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Says in what the peer differs, so that an operator need not compare digests.
    pub fn check(&self, peer: &Self) -> Result<(), CompatibilityMismatch> {
        let differing = self.fields().into_iter().zip(peer.fields()).find(|(a, b)| a != b);
        match differing {
            None => Ok(()),
            Some(((field, ours), (_, theirs))) => {
                Err(CompatibilityMismatch { field, ours, theirs })
            }
        }
    }

    fn fields(&self) -> [(&'static str, String); 9] {
        [
            ("model", self.model.clone()),
            ("revision", self.revision.clone()),
            ("kv_dtype", self.kv_dtype.clone()),
            ("kv_layout", self.kv_layout.clone()),
            ("block_size_tokens", self.block_size_tokens.to_string()),
            ("block_bytes", self.block_bytes.to_string()),
            ("tensor_parallel_rank", self.tensor_parallel_rank.to_string()),
            ("tensor_parallel_size", self.tensor_parallel_size.to_string()),
            ("connector_version", self.connector_version.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Compatibility {
        Compatibility {
            model: "m".into(),
            revision: "r".into(),
            kv_dtype: "float32".into(),
            kv_layout: "NHD".into(),
            block_size_tokens: 32,
            block_bytes: 4096,
            tensor_parallel_rank: 0,
            tensor_parallel_size: 1,
            connector_version: "1".into(),
        }
    }

    #[test]
    fn every_field_changes_the_digest_and_is_named() {
        type Change = fn(&mut Compatibility);
        let changes: [(&str, Change); 9] = [
            ("model", |c| c.model.push('x')),
            ("revision", |c| c.revision.push('x')),
            ("kv_dtype", |c| c.kv_dtype.push('x')),
            ("kv_layout", |c| c.kv_layout.push('x')),
            ("block_size_tokens", |c| c.block_size_tokens += 1),
            ("block_bytes", |c| c.block_bytes += 1),
            ("tensor_parallel_rank", |c| c.tensor_parallel_rank += 1),
            ("tensor_parallel_size", |c| c.tensor_parallel_size += 1),
            ("connector_version", |c| c.connector_version.push('x')),
        ];
        for (field, change) in changes {
            let mut other = sample();
            change(&mut other);
            assert_ne!(sample().digest(), other.digest(), "{field}");
            assert_eq!(sample().check(&other).unwrap_err().field, field);
        }
        assert_eq!(sample().digest(), sample().digest());
    }

    #[test]
    fn text_cannot_move_between_fields() {
        let (mut a, mut b) = (sample(), sample());
        (a.model, a.revision) = ("ab".into(), "c".into());
        (b.model, b.revision) = ("a".into(), "bc".into());
        assert_ne!(a.digest(), b.digest());
    }
}
