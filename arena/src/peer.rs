use std::{
    fs, io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::PathBuf,
};

use memmap2::{MmapOptions, MmapRaw};
use serde::{Deserialize, Serialize};

use crate::{Arena, ArenaError};

/// By what another process finds an arena's file, and knows that it is the one that was meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArenaFile {
    pub path: PathBuf,
    pub device: u64,
    pub inode: u64,
    pub len_bytes: u64,
}

impl Arena {
    /// For a worker on the same host.
    pub fn file(&self) -> Result<ArenaFile, ArenaError> {
        let path = self.path().to_owned();
        let found = fs::symlink_metadata(&path).map_err(|source| ArenaError::Io {
            action: "look at",
            path: path.clone(),
            source,
        })?;
        let len_bytes = u64::try_from(self.len_bytes()).unwrap_or(u64::MAX);
        Ok(ArenaFile { path, device: found.dev(), inode: found.ino(), len_bytes })
    }
}

/// Another worker's arena, to be read.
#[derive(Debug)]
pub struct PeerArena {
    map: MmapRaw,
    file: ArenaFile,
}

impl PeerArena {
    /// Maps it. Refuses a file that is not the one that was named, or that others than this user could
    /// have written.
    pub fn open(file: &ArenaFile) -> Result<Self, ArenaError> {
        let path = &file.path;
        let io = |action| move |source| ArenaError::Io { action, path: path.clone(), source };
        let refused = |reason| ArenaError::NotAPeers { path: path.clone(), reason };
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(flags())
            .open(path)
            .map_err(io("open"))?;
        let found = opened.metadata().map_err(io("look at"))?;
        if !found.is_file() {
            return Err(refused("it is not a regular file"));
        }
        if (found.dev(), found.ino()) != (file.device, file.inode) {
            return Err(refused("it is another file"));
        }
        if found.uid() != rustix::process::geteuid().as_raw() {
            return Err(refused("it is another user's"));
        }
        if found.mode() & 0o077 != 0 {
            return Err(refused("others than its owner may open it"));
        }
        if found.len() < file.len_bytes {
            return Err(refused("it is shorter than its slots"));
        }
        let len = usize::try_from(file.len_bytes)
            .map_err(|_| refused("it is too long for this machine"))?;
        let map =
            MmapOptions::new().len(len).populate().map_raw_read_only(&opened).map_err(io("map"))?;
        Ok(Self { map, file: file.clone() })
    }

    pub fn file(&self) -> &ArenaFile {
        &self.file
    }

    /// Whether the file still has its name: its worker takes it away when it has done with it.
    pub fn is_there(&self) -> bool {
        let found = fs::symlink_metadata(&self.file.path);
        found.is_ok_and(|found| (found.dev(), found.ino()) == (self.file.device, self.file.inode))
    }

    /// What lies there, not copied: `len` bytes from so far into it on. Its worker may write there at any time,
    /// and another value may be read the second time: whoever reads them for more than their checksum copies
    /// them, and takes the checksum over the copy.
    pub fn bytes(&self, offset: u64, len: usize) -> Result<&[u8], ArenaError> {
        let begin = self.at(offset, len)?;
        // SAFETY: `at` checked that all of it lies in the mapping, which lives as long as this borrow. Who writes
        // there, in another process, can only change the bytes' values.
        Ok(unsafe { std::slice::from_raw_parts(begin, len) })
    }

    /// Where these bytes are, if they are all in it.
    pub(crate) fn at(&self, offset: u64, len: usize) -> Result<*const u8, ArenaError> {
        let start = usize::try_from(offset).ok();
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.map.len() => {
                Ok(self.map.as_ptr().wrapping_add(start))
            }
            _ => Err(ArenaError::Io {
                action: "read beyond the end of",
                path: self.file.path.clone(),
                source: io::ErrorKind::InvalidInput.into(),
            }),
        }
    }
}

/// Follows no link, and waits for nobody should it be a pipe.
fn flags() -> i32 {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    i32::try_from(flags.bits()).unwrap_or(0)
}

#[cfg(test)]
fn open_to(path: &std::path::Path, mode: u32) {
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, permissions).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ArenaLayout, PIECE_BYTES, Slot, SlotPool};

    fn arena(directory: &tempfile::TempDir, name: &str) -> Arena {
        let layout = ArenaLayout { slot_bytes: 4096, export_slots: 2, import_slots: 2 };
        Arena::create(&directory.path().join(name), layout).unwrap()
    }

    #[test]
    fn a_block_is_copied_from_a_peer() {
        let directory = tempfile::tempdir().unwrap();
        let (producer, consumer) = (arena(&directory, "a"), arena(&directory, "b"));
        producer.write(Slot(1), 8, b"kv").unwrap();
        let peer = PeerArena::open(&producer.file().unwrap()).unwrap();
        let offset =
            producer.offset_of(&producer.view(Slot(1), 10).unwrap().as_ref()[8..]).unwrap();
        assert_eq!(offset, 4096 + 8);
        let slot = SlotPool::new([Slot(3)]).try_reserve().unwrap();
        let landing = consumer.landing(slot, 2).unwrap();
        landing.copy_from(&peer, offset, |_| {}).unwrap();
        assert_eq!(landing.as_bytes(), b"kv");
        assert_eq!(producer.offset_of(consumer.view(Slot(0), 4).unwrap().as_ref()), None);
        assert_eq!(peer.bytes(offset, 2).unwrap(), b"kv");
        // Not beyond the end, whoever says so.
        for offset in [4 * 4096 - 1, 4 * 4096, u64::MAX] {
            assert!(landing.copy_from(&peer, offset, |_| {}).is_err());
            assert!(peer.bytes(offset, 2).is_err());
        }
        // As its worker changes it.
        producer.write(Slot(1), 8, b"vk").unwrap();
        assert_eq!(peer.bytes(offset, 2).unwrap(), b"vk");
        landing.copy_from(&peer, 4 * 4096 - 2, |_| {}).unwrap();
    }

    #[test]
    fn every_piece_is_shown_where_it_was_laid() {
        let directory = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(2 * PIECE_BYTES + 3).collect();
        let layout =
            ArenaLayout { slot_bytes: bytes.len() as u64, export_slots: 1, import_slots: 0 };
        let made = |name| Arena::create(&directory.path().join(name), layout).unwrap();
        let (producer, consumer) = (made("a"), made("b"));
        producer.write(Slot(0), 0, &bytes).unwrap();
        let peer = PeerArena::open(&producer.file().unwrap()).unwrap();
        let slot = SlotPool::new([Slot(0)]).try_reserve().unwrap();
        let landing = consumer.landing(slot, bytes.len() as u64).unwrap();
        let mut shown = Vec::new();
        landing.copy_from(&peer, 0, |piece| shown.push((piece.as_ptr(), piece.to_vec()))).unwrap();
        let laid = landing.as_bytes();
        assert_eq!(laid, bytes);
        let expected: Vec<_> =
            laid.chunks(PIECE_BYTES).map(|piece| (piece.as_ptr(), piece.to_vec())).collect();
        assert_eq!(shown, expected);
    }

    #[test]
    fn only_what_was_meant_is_mapped() {
        let directory = tempfile::tempdir().unwrap();
        let producer = arena(&directory, "a");
        let file = producer.file().unwrap();
        let why = |file: &ArenaFile| PeerArena::open(file).unwrap_err().to_string();
        open_to(&file.path, 0o640);
        assert!(why(&file).contains("others than its owner"));
        open_to(&file.path, 0o600);
        assert!(why(&ArenaFile { inode: file.inode + 1, ..file.clone() }).contains("another file"));
        assert!(why(&ArenaFile { len_bytes: 1 << 40, ..file.clone() }).contains("shorter"));
        assert!(why(&ArenaFile { path: directory.path().into(), ..file }).contains("regular"));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&file.path, &link).unwrap();
        assert!(why(&ArenaFile { path: link, ..file }).contains("cannot open"));
        PeerArena::open(&file).unwrap();
    }
}
