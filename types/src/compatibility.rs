use serde::{Deserialize, Serialize};

use crate::reslice::Split;

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
    /// Layer groups in which each block is handed over, one after the other. Each is a block of its own on its
    /// way: group `g` of the engine's block `b` goes by the index `b · layer_groups + g`.
    #[serde(default = "one")]
    pub layer_groups: u32,
    /// Bytes of one block on one rank, as it is handed over: of all layers of one group together.
    pub block_bytes: u64,
    pub tensor_parallel_rank: u32,
    pub tensor_parallel_size: u32,
    /// Version of the software that lays the blocks out.
    pub connector_version: String,
    /// Where each KV head lies in a block of one layer group, as a [`HeadLayout`](crate::HeadLayout); empty where
    /// the engine cannot tell. Blocks of engines that tell can be made of one another, whatever their number of ranks.
    #[serde(default)]
    pub kv_heads: String,
}

fn one() -> u32 {
    1
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
        digest(&self.fields())
    }

    /// A digest that is equal for engines between which KV can pass, as it is or made of one another's
    /// blocks: when [`Self::check`] finds nothing.
    pub fn pairing_digest(&self) -> [u8; 32] {
        digest(&self.to_be_equal())
    }

    /// The same of another tensor parallel rank of this engine.
    #[must_use]
    pub fn of_rank(&self, rank: u32) -> Self {
        Self { tensor_parallel_rank: rank, ..self.clone() }
    }

    /// Says in what the peer's engine differs so that KV cannot pass, so that an operator need not compare
    /// digests.
    pub fn check(&self, peer: &Self) -> Result<(), CompatibilityMismatch> {
        let compared = self.to_be_equal().into_iter().zip(peer.to_be_equal());
        let told = self.fields().into_iter().zip(peer.fields());
        let differing = compared.zip(told).find(|((ours, theirs), _)| ours != theirs);
        match differing {
            None => Ok(()),
            Some((_, ((field, ours), (_, theirs)))) => {
                let or_unknown =
                    |text: String| if text.is_empty() { "unknown".to_owned() } else { text };
                let (ours, theirs) = (or_unknown(ours), or_unknown(theirs));
                Err(CompatibilityMismatch { field, ours, theirs })
            }
        }
    }

    /// Says in what another rank of this engine differs, which it may in nothing but its number.
    pub fn check_ranks(&self, other: &Self) -> Result<(), CompatibilityMismatch> {
        let (ours, theirs) = (self.of_rank(0).fields(), other.of_rank(0).fields());
        let differing = ours.into_iter().zip(theirs).find(|(ours, theirs)| ours != theirs);
        differing.map_or(Ok(()), |((field, ours), (_, theirs))| {
            Err(CompatibilityMismatch { field, ours, theirs })
        })
    }

    /// The fields as far as they must be equal. Where heads can be told apart, only what is common to all
    /// ways of splitting them.
    fn to_be_equal(&self) -> [(&'static str, String); 11] {
        let Ok(split) = Split::of(self) else { return self.of_rank(0).fields() };
        let kv_heads = split.kin().to_string();
        let free = Self {
            kv_layout: String::new(),
            block_bytes: 0,
            tensor_parallel_rank: 0,
            tensor_parallel_size: 0,
            kv_heads,
            ..self.clone()
        };
        free.fields()
    }

    /// What says most comes first.
    fn fields(&self) -> [(&'static str, String); 11] {
        [
            ("model", self.model.clone()),
            ("revision", self.revision.clone()),
            ("kv_dtype", self.kv_dtype.clone()),
            ("block_size_tokens", self.block_size_tokens.to_string()),
            ("layer_groups", self.layer_groups.to_string()),
            ("connector_version", self.connector_version.clone()),
            ("kv_heads", self.kv_heads.clone()),
            ("tensor_parallel_size", self.tensor_parallel_size.to_string()),
            ("tensor_parallel_rank", self.tensor_parallel_rank.to_string()),
            ("kv_layout", self.kv_layout.clone()),
            ("block_bytes", self.block_bytes.to_string()),
        ]
    }
}

fn digest(fields: &[(&'static str, String)]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    // Who has but one layer group agrees with workers of the time before there were any.
    for (name, value) in fields.iter().filter(|field| **field != ("layer_groups", "1".to_owned())) {
        for part in [name.as_bytes(), value.as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    *hasher.finalize().as_bytes()
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
            layer_groups: 1,
            block_bytes: 4096,
            tensor_parallel_rank: 0,
            tensor_parallel_size: 1,
            connector_version: "1".into(),
            kv_heads: String::new(),
        }
    }

    /// Heads of 2 × 8 × 16 bytes, 4 of them in all.
    fn on_ranks(size: u32, kv_heads: &str, block_bytes: u64) -> Compatibility {
        Compatibility {
            block_bytes,
            kv_layout: format!("of {size}"),
            tensor_parallel_size: size,
            kv_heads: kv_heads.into(),
            ..sample()
        }
    }

    #[test]
    fn every_field_changes_the_digest_and_is_named() {
        type Change = fn(&mut Compatibility);
        let changes: [(&str, Change); 11] = [
            ("model", |c| c.model.push('x')),
            ("revision", |c| c.revision.push('x')),
            ("kv_dtype", |c| c.kv_dtype.push('x')),
            ("kv_layout", |c| c.kv_layout.push('x')),
            ("block_size_tokens", |c| c.block_size_tokens += 1),
            ("layer_groups", |c| c.layer_groups += 1),
            ("block_bytes", |c| c.block_bytes += 1),
            ("tensor_parallel_rank", |c| c.tensor_parallel_rank += 1),
            ("tensor_parallel_size", |c| c.tensor_parallel_size += 1),
            ("connector_version", |c| c.connector_version.push('x')),
            ("kv_heads", |c| c.kv_heads.push('x')),
        ];
        for (field, change) in changes {
            let mut other = sample();
            change(&mut other);
            assert_ne!(sample().digest(), other.digest(), "{field}");
            let checked = sample().check(&other);
            let is_paired = sample().pairing_digest() == other.pairing_digest();
            assert_eq!(is_paired, checked.is_ok(), "{field}");
            // Ranks of one engine are not told apart here.
            let named = checked.err().map_or("tensor_parallel_rank", |mismatch| mismatch.field);
            assert_eq!(named, field);
        }
        assert_eq!(sample().digest(), sample().digest());
    }

    #[test]
    fn engines_whose_heads_can_be_told_apart_are_paired_whatever_their_ranks() {
        let whole = on_ranks(1, "F/4/3*k2.t8.h4.16", 3072);
        let halves = on_ranks(2, "F/4/3*k2.h2.t8.16", 1536);
        let doubled = on_ranks(8, "F/4/3*t8.k2.h1.16", 768);
        for other in [&halves, &doubled, &whole.of_rank(3)] {
            assert_eq!(whole.check(other), Ok(()));
            assert_eq!(whole.pairing_digest(), other.pairing_digest());
        }
        for (other, told) in [
            (
                on_ranks(2, "", 1536),
                "kv_heads differs: F/4/3*k2.t8.h4.16 here, unknown at the peer",
            ),
            (on_ranks(2, "G/4/3*k2.t8.h2.16", 1536), "kv_heads differs"),
            (on_ranks(2, "F/4/3*k2.t4.h2.32", 1536), "kv_heads differs"),
            (
                Compatibility { layer_groups: 3, ..on_ranks(2, "F/4/1*k2.h2.t8.16", 512) },
                "layer_groups differs: 1 here, 3 at the peer",
            ),
            // Not what is said of it: not to be cut up.
            (on_ranks(3, "F/4/3*k2.t8.h2.16", 1536), "kv_heads differs"),
            (on_ranks(2, "F/4/3*k2.t8.h2.16", 1537), "kv_heads differs"),
        ] {
            assert_ne!(whole.pairing_digest(), other.pairing_digest());
            let mismatch = whole.check(&other).unwrap_err().to_string();
            assert!(mismatch.contains(told), "{mismatch}");
        }
        let unknown = on_ranks(2, "", 1536).check(&on_ranks(4, "", 768)).unwrap_err();
        assert_eq!(unknown.to_string(), "tensor_parallel_size differs: 2 here, 4 at the peer");
    }

    #[test]
    fn text_cannot_move_between_fields() {
        let (mut a, mut b) = (sample(), sample());
        (a.model, a.revision) = ("ab".into(), "c".into());
        (b.model, b.revision) = ("a".into(), "bc".into());
        assert_ne!(a.digest(), b.digest());
    }
}
