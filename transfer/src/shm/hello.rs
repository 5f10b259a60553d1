//! What a producer says of itself before anything else: kind 7, fingerprint 32, then where its arena is:
//! device u64, inode u64, bytes u64, length of the path u16, path. An arena of no bytes is none: its
//! blocks come over the socket.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use baton_arena::ArenaFile;
use bytes::{BufMut, Bytes, BytesMut};

use crate::frame::FrameError;

pub(super) const KIND: u8 = 7;
/// After the kind, up to the path.
pub(super) const HEAD_BYTES: usize = 32 + 8 + 8 + 8 + 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) fingerprint: [u8; 32],
    pub(super) arena: Option<ArenaFile>,
}

impl Hello {
    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(1 + HEAD_BYTES + 128);
        bytes.put_u8(KIND);
        bytes.put_slice(&self.fingerprint);
        // A path that is too long is no path that anybody could open.
        let path_bytes = |file: &ArenaFile| u16::try_from(file.path.as_os_str().len()).ok();
        match self.arena.as_ref().and_then(|file| Some((file, path_bytes(file)?))) {
            Some((file, path_bytes)) => {
                bytes.put_u64_le(file.device);
                bytes.put_u64_le(file.inode);
                bytes.put_u64_le(file.len_bytes);
                bytes.put_u16_le(path_bytes);
                bytes.put_slice(file.path.as_os_str().as_bytes());
            }
            None => bytes.put_bytes(0, HEAD_BYTES - 32),
        }
        bytes.freeze()
    }

    /// How long the path is that follows this head.
    pub(super) fn path_bytes(head: &[u8; HEAD_BYTES]) -> usize {
        let [.., low, high] = *head;
        u16::from_le_bytes([low, high]).into()
    }

    pub(super) fn decode(head: &[u8; HEAD_BYTES], path: &[u8]) -> Result<Self, FrameError> {
        let (fingerprint, mut rest) = head.split_first_chunk().ok_or(FrameError::Length)?;
        let mut number = || {
            let (number, after) = rest.split_first_chunk().ok_or(FrameError::Length)?;
            rest = after;
            Ok(u64::from_le_bytes(*number))
        };
        let (device, inode, len_bytes) = (number()?, number()?, number()?);
        let path = PathBuf::from(OsStr::from_bytes(path));
        if len_bytes > 0 && !Path::is_absolute(&path) {
            return Err(FrameError::Length);
        }
        let arena = (len_bytes > 0).then_some(ArenaFile { path, device, inode, len_bytes });
        Ok(Self { fingerprint: *fingerprint, arena })
    }
}

/// A hello that is taken is what would be said.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some((head, path)) = bytes.split_first_chunk()
        && let Ok(hello) = Hello::decode(head, path)
        && Hello::path_bytes(head) == path.len()
        && hello.arena.is_some()
    {
        assert_eq!(&hello.encode()[1..], bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(bytes: &[u8]) -> Result<Hello, FrameError> {
        let (head, path) = bytes[1..].split_first_chunk().unwrap();
        assert_eq!(Hello::path_bytes(head), path.len());
        Hello::decode(head, path)
    }

    proptest! {
        #[test]
        fn a_hello_arrives_as_it_was_said(
            fingerprint in any::<[u8; 32]>(),
            numbers in any::<(u64, u64, u64)>(),
            name in "[a-z0-9 .-]{0,200}",
        ) {
            let path = Path::new("/").join(name);
            let (device, inode, len_bytes) = (numbers.0, numbers.1, numbers.2.max(1));
            let arena = Some(ArenaFile { path, device, inode, len_bytes });
            for hello in [Hello { fingerprint, arena }, Hello { fingerprint, arena: None }] {
                prop_assert_eq!(decoded(&hello.encode()), Ok(hello));
            }
        }

        #[test]
        fn what_is_no_hello_is_an_error_at_worst(
            head in prop::collection::vec(any::<u8>(), HEAD_BYTES),
            path in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let head: [u8; HEAD_BYTES] = head.try_into().unwrap();
            if let Ok(hello) = Hello::decode(&head, &path)
                && let Some(arena) = hello.arena
            {
                prop_assert!(arena.path.is_absolute());
            }
        }
    }
}
