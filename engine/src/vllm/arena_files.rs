use std::{fs, path::PathBuf, process};

use baton_arena::ArenaLayout;
use baton_config::ArenaConfig;
use baton_types::Epoch;

/// Slots begin on page bounds, for engines that register or pin them.
const SLOT_ALIGNMENT_BYTES: u64 = 4096;
/// With fewer than two, copying a block and sending one could not overlap.
const MIN_SLOTS: u64 = 2;

#[derive(Debug, thiserror::Error)]
#[error(
    "{key} of {bytes} bytes has room for fewer than {MIN_SLOTS} KV blocks of {slot_bytes} bytes on each of \
     {ranks} ranks: it must be {needed} at least"
)]
pub(super) struct ArenaTooSmall {
    key: &'static str,
    bytes: u64,
    slot_bytes: u64,
    ranks: u32,
    needed: u64,
}

/// Cuts the configured bytes into slots of one block each, as many for each of so many ranks.
pub(super) fn layout(
    config: &ArenaConfig,
    block_bytes: u64,
    ranks: u32,
) -> Result<ArenaLayout, ArenaTooSmall> {
    let slot_bytes =
        block_bytes.div_ceil(SLOT_ALIGNMENT_BYTES).max(1).saturating_mul(SLOT_ALIGNMENT_BYTES);
    let slots = |key, bytes: u64| {
        let slots = bytes / slot_bytes / u64::from(ranks);
        if slots < MIN_SLOTS {
            let needed = slot_bytes.saturating_mul(MIN_SLOTS).saturating_mul(ranks.into());
            return Err(ArenaTooSmall { key, bytes, slot_bytes, ranks, needed });
        }
        // The two halves together must be countable in 32 bits.
        Ok(u32::try_from(slots).unwrap_or(u32::MAX).min(u32::MAX / 2 / ranks) * ranks)
    };
    Ok(ArenaLayout {
        slot_bytes,
        export_slots: slots("arena.export_bytes", config.export_bytes)?,
        import_slots: slots("arena.import_bytes", config.import_bytes)?,
    })
}

/// A name that no other arena has, and that shows whose it is.
pub(crate) fn fresh_path(config: &ArenaConfig, worker_name: &str) -> PathBuf {
    let pid = process::id();
    let start = start_of(pid).unwrap_or_default();
    let name = format!("{}{pid}.{start}-{}", prefix(worker_name), Epoch::random());
    config.directory.join(name)
}

/// When a process that is there was started, in clock ticks since boot (proc_pid_stat(5)). In a
/// container every life of a worker has the same process id.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_command) = stat.rsplit_once(')')?;
    // The third field of all comes first here, the start is the 22nd.
    after_command.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Removes what workers of this name left behind when they were killed.
pub(crate) fn remove_stale(config: &ArenaConfig, worker_name: &str) {
    let prefix = prefix(worker_name);
    let Ok(entries) = fs::read_dir(&config.directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(&prefix))
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(owner, _)| owner.split_once('.'))
            .and_then(|(pid, start)| Some((pid.parse().ok()?, start.parse::<u64>().ok()?)));
        if let Some((pid, start)) = owner
            && start_of(pid) != Some(start)
            && fs::remove_file(entry.path()).is_ok()
        {
            tracing::info!(arena = %entry.path().display(), "removed the arena of a worker that is gone");
        }
    }
}

fn prefix(worker_name: &str) -> String {
    let safe: String = worker_name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' })
        .take(64)
        .collect();
    format!("baton-kv.{safe}.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(export_bytes: u64, import_bytes: u64) -> ArenaConfig {
        ArenaConfig { export_bytes, import_bytes, ..ArenaConfig::default() }
    }

    #[test]
    fn slots_are_whole_pages_and_an_arena_too_small_names_its_key() {
        let layout_of = |block| layout(&config(1 << 20, 1 << 16), block, 1);
        assert_eq!(
            layout_of(5000).unwrap(),
            ArenaLayout { slot_bytes: 8192, export_slots: 128, import_slots: 8 }
        );
        let error = layout_of(40_000).unwrap_err().to_string();
        assert!(error.contains("arena.import_bytes") && error.contains("81920"), "{error}");
        assert!(layout_of(u64::MAX).is_err());
        // Three ranks share them out evenly.
        assert_eq!(
            layout(&config(1 << 20, 1 << 16), 5000, 3).unwrap(),
            ArenaLayout { slot_bytes: 8192, export_slots: 126, import_slots: 6 }
        );
        assert!(layout(&config(1 << 20, 1 << 16), 5000, 5).is_err());
    }

    #[test]
    fn only_arenas_of_dead_workers_of_the_same_name_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let config = ArenaConfig { directory: dir.path().into(), ..ArenaConfig::default() };
        let live = fresh_path(&config, "p0");
        // Above the largest pid of Linux (2^22).
        let dead = dir.path().join("baton-kv.p0.99999999.1-x");
        let other = dir.path().join("baton-kv.p01.99999999.1-x");
        // Of an earlier process of the same number.
        let former = dir.path().join(format!("baton-kv.p0.{}.1-x", process::id()));
        for path in [&live, &dead, &other, &former] {
            fs::write(path, "").unwrap();
        }
        remove_stale(&config, "p0");
        assert!(live.exists() && other.exists() && !dead.exists() && !former.exists());
    }
}
