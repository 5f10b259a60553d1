//! For networks where somebody may write what was not sent: a keyed hash of each block.
//!
//! A CRC finds accidents; whoever wants to changes block and CRC together. The consumer draws a key for each
//! handoff and tells it to the producer over the pinned connection, which nobody else reads. What then arrives,
//! by whatever way, is the producer's own block in its own place, or is not taken.

use std::fmt;

use baton_types::HandoffKey;
use rustls::crypto::aws_lc_rs;

use crate::channel::TransferError;

/// What the blocks of this worker's handoffs are held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// CRC-64/NVME: against accidents.
    #[default]
    Crc,
    /// And BLAKE3 under a key that only the two workers know: against others on the network.
    Blake3,
}

/// The key of one handoff.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct MacKey(pub(crate) [u8; 32]);

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey")
    }
}

/// Of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 32]);

impl MacKey {
    /// A fresh one, where it is wanted.
    pub(crate) fn for_check(check: Check) -> Result<Option<Self>, TransferError> {
        if check == Check::Crc {
            return Ok(None);
        }
        let mut key = [0; 32];
        let filled = aws_lc_rs::default_provider().secure_random.fill(&mut key);
        let failed = |_| TransferError::Protocol("no random numbers for a key".to_owned());
        filled.map(|()| Some(Self(key))).map_err(failed)
    }

    /// Over whose block it is, its index u32, its length u64, and its bytes.
    pub(crate) fn of_block(&self, handoff: &HandoffKey, index: u32, bytes: &[u8]) -> Mac {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(handoff.epoch.as_bytes());
        hasher.update(handoff.id.as_bytes());
        hasher.update(&handoff.generation.0.to_le_bytes());
        hasher.update(&index.to_le_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
        Mac(hasher.finalize().into())
    }
}

impl Mac {
    /// In a time that does not depend on where they differ.
    pub(crate) fn agrees_with(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

#[cfg(test)]
mod tests {
    use baton_types::{Epoch, Generation, HandoffId};

    use super::*;

    #[test]
    fn a_mac_is_of_one_key_one_handoff_one_place_and_one_content() {
        let key = MacKey::for_check(Check::Blake3).unwrap().unwrap();
        assert_eq!(MacKey::for_check(Check::Crc), Ok(None));
        let handoff = HandoffKey {
            epoch: Epoch::from_u128(1),
            id: HandoffId::from_u128(2),
            generation: Generation(3),
        };
        let right = key.of_block(&handoff, 4, b"kv");
        assert!(right.agrees_with(&key.of_block(&handoff, 4, b"kv")));
        let others = [
            MacKey::for_check(Check::Blake3).unwrap().unwrap().of_block(&handoff, 4, b"kv"),
            key.of_block(&HandoffKey { epoch: Epoch::from_u128(9), ..handoff }, 4, b"kv"),
            key.of_block(&HandoffKey { id: HandoffId::from_u128(9), ..handoff }, 4, b"kv"),
            key.of_block(&HandoffKey { generation: Generation(9), ..handoff }, 4, b"kv"),
            key.of_block(&handoff, 9, b"kv"),
            key.of_block(&handoff, 4, b"kw"),
            key.of_block(&handoff, 4, b"kv\0"),
        ];
        assert!(others.iter().all(|other| !right.agrees_with(other)));
    }
}
