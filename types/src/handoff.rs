use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a UUID")]
pub struct ParseIdError(String);

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh random id. Draws from the system's randomness: not for the pure core,
            /// which takes its ids as arguments.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            pub const fn from_u128(value: u128) -> Self {
                Self(Uuid::from_u128(value))
            }

            pub fn from_slice(bytes: &[u8]) -> Result<Self, ParseIdError> {
                Uuid::from_slice(bytes)
                    .map(Self)
                    .map_err(|_| ParseIdError(format!("{} bytes", bytes.len())))
            }

            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.as_simple(), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.as_simple())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(text)
                    .map(Self)
                    .map_err(|_| ParseIdError(text.to_owned()))
            }
        }
    };
}

uuid_id! {
    /// One life of an engine's KV memory. A restarted engine has a new epoch, so that nothing that
    /// was said about the old memory is believed of the new.
    Epoch
}

uuid_id! {
    /// One passing of a prompt's KV from a prefill to a decode.
    HandoffId
}

impl Epoch {
    /// The name of one tensor parallel rank's part of this life, so that no rank's block passes for
    /// another's. The first rank has the engine's own.
    #[must_use]
    pub fn of_rank(self, rank: u32) -> Self {
        Self(Uuid::from_u128(self.0.as_u128() ^ u128::from(rank)))
    }
}

impl HandoffId {
    /// The name of the copy of a cached prefix that goes before this handoff: another one, and its own.
    #[must_use]
    pub fn of_pull(self) -> Self {
        Self(Uuid::from_u128(!self.0.as_u128()))
    }
}

/// Counts the attempts at one request: each retry is a fresh handoff of the next generation.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The fence: the full name of a handoff. Blocks that carry another are not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HandoffKey {
    /// Of the engine that produces the blocks.
    pub epoch: Epoch,
    pub id: HandoffId,
    pub generation: Generation,
}

impl fmt::Display for HandoffKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}", self.id, self.generation, self.epoch)
    }
}

/// SHA-256 over the prompt's token ids (each a little-endian `u32`), then whatever else its KV
/// depends on (adapter name, media hashes, cache salt). Both engines compute it for themselves: the
/// KV of one prompt can never be loaded for another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PromptDigest(pub [u8; 32]);

impl fmt::Debug for PromptDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PromptDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for PromptDigest {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        let malformed = || ParseIdError(text.to_owned());
        if text.len() != 64 || !text.is_ascii() {
            return Err(malformed());
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| malformed())?;
        }
        Ok(Self(bytes))
    }
}
